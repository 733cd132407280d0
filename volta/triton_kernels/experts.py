"""Cases of the experts of a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volta.triton_kernels.case import DTYPES, Case, Tensors


@dataclass(frozen=True, kw_only=True)
class Experts(Case):
    """fused_experts_impl: the two matrix products of a MoE layer."""

    kernels = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
    label = "moe"
    dtype: str = "fp16"
    bits: int = 16
    """Bits of a weight; 4 and 8 are the WNA16 kernels."""
    zeros: bool = False
    """True if there are zero points, as in AWQ."""
    group: int = 128
    experts: int
    top_k: int
    hidden: int
    width: int
    """Width of an expert on one card: the intermediate size divided by the tensor parallel size."""
    tokens: int

    def tensors(self, make: Tensors) -> dict[str, Any]:
        dtype = DTYPES[self.dtype]
        arguments: dict[str, Any] = {
            "hidden_states": make.normal(self.tokens, self.hidden, dtype=dtype),
            "topk_weights": make.normal(self.tokens, self.top_k, dtype=torch.float32),
            "topk_ids": make.integers(0, self.experts, self.tokens, self.top_k),
        }
        for number, (out, into) in {1: (2 * self.width, self.hidden), 2: (self.hidden, self.width)}.items():
            if self.bits == 16:
                arguments[f"w{number}"] = make.normal(self.experts, out, into, dtype=dtype, scale=into**-0.5)
                continue
            packs, groups = 8 // self.bits, into // self.group
            arguments[f"w{number}"] = make.integers(0, 256, self.experts, out, into // packs, dtype=torch.uint8)
            arguments[f"w{number}_scale"] = make.normal(self.experts, out, groups, dtype=dtype, scale=0.01)
            if self.zeros:
                arguments[f"w{number}_zp"] = make.integers(
                    0, 256, self.experts, out // packs, groups, dtype=torch.uint8
                )
        if self.bits < 16:
            kind = "use_int4_w4a16" if self.bits == 4 else "use_int8_w8a16"
            arguments |= {kind: True, "block_shape": [0, self.group]}
        return arguments

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_impl

        return fused_experts_impl(**arguments)
