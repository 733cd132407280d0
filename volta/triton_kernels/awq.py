"""Cases of AWQ: the dequantization of a matrix, and the product with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volta.triton_kernels.case import Case, Tensors


@dataclass(frozen=True, kw_only=True)
class AwqDequantize(Case):
    """awq_dequantize_triton, which vLLM calls for prompts of 256 tokens and more."""

    kernels = ("awq_dequantize_kernel",)
    label = "awq-dequantize"
    rows: int
    columns: int
    group: int = 128

    def tensors(self, make: Tensors) -> dict[str, Any]:
        groups, packed = self.rows // self.group, self.columns // 8
        return {
            "qweight": make.integers(-(2**31), 2**31, self.rows, packed),
            "scales": make.normal(groups, self.columns, dtype=torch.float16, scale=0.01),
            "zeros": make.integers(-(2**31), 2**31, groups, packed),
        }

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.quantization.awq_triton import awq_dequantize_triton

        return awq_dequantize_triton(**arguments)


@dataclass(frozen=True, kw_only=True)
class AwqGemm(Case):
    """awq_gemm_triton; ``parts`` is the number of parts along K, 8 in vLLM's awq.py."""

    kernels = ("awq_gemm_kernel",)
    label = "awq-gemm"
    tokens: int
    rows: int
    columns: int
    group: int = 128
    parts: int = 8

    def tensors(self, make: Tensors) -> dict[str, Any]:
        groups, packed = self.rows // self.group, self.columns // 8
        return {
            "input": make.normal(self.tokens, self.rows, dtype=torch.float16),
            "qweight": make.integers(-(2**31), 2**31, self.rows, packed),
            "scales": make.normal(groups, self.columns, dtype=torch.float16, scale=0.01),
            "qzeros": make.integers(-(2**31), 2**31, groups, packed),
            "split_k_iters": self.parts,
        }

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.quantization.awq_triton import awq_gemm_triton

        return awq_gemm_triton(**arguments)
