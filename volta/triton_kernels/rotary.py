"""Cases of the rotary embedding of models with images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from volta.triton_kernels.case import DTYPES, Case, Tensors


@dataclass(frozen=True, kw_only=True)
class Mrope(Case):
    """triton_mrope: rotary embedding of models with images. With Inductor, vLLM uses its PyTorch function instead."""

    kernels = ("_triton_mrope_forward",)
    label = "mrope"
    dtype: str = "fp16"
    heads: int
    kv_heads: int
    head_size: int = 128
    sections: tuple[int, int, int] = (16, 24, 24)
    interleaved: bool = False
    tokens: int = 33

    def tensors(self, make: Tensors) -> dict[str, Any]:
        dtype = DTYPES[self.dtype]
        return {
            "q": make.normal(self.tokens, self.heads * self.head_size, dtype=dtype),
            "k": make.normal(self.tokens, self.kv_heads * self.head_size, dtype=dtype),
            "cos": make.normal(3, self.tokens, self.head_size // 2, dtype=dtype),
            "sin": make.normal(3, self.tokens, self.head_size // 2, dtype=dtype),
            "mrope_section": list(self.sections), "head_size": self.head_size, "rotary_dim": self.head_size,
            "mrope_interleaved": self.interleaved,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.rotary_embedding.mrope import triton_mrope

        return triton_mrope(**arguments)
