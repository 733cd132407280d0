"""Cases of attention and of the write to its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volta.triton_kernels.case import DTYPES, Case, Tensors, cdiv


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """unified_attention: one kernel for prefill, two for the decode of a small batch."""

    dtype: str
    kv: str = ""
    """The type of the cache; empty if it is ``dtype``."""
    head_size: int
    heads: int
    kv_heads: int
    block_size: int = 16
    window: int | None = None
    alibi: bool = False
    softcap: float = 0
    sinks: bool = False
    sequences: int = 2
    query: int = 1
    """New tokens of each sequence."""
    context: int = 40
    """Tokens of each sequence that are already in the cache."""
    blocks: int = 256
    """Columns of the block table: the number of blocks of the longest sequence."""
    scale: float | None = None

    @property
    def label(self) -> str:  # type: ignore[override]
        return "attention-2d" if self.query > 1 else "attention-3d"

    @property
    def kernels(self) -> tuple[str, ...]:  # type: ignore[override]
        decode = "kernel_unified_attention_3d", "reduce_segments"
        return ("kernel_unified_attention_2d",) if self.query > 1 else decode

    def tensors(self, make: Tensors) -> dict[str, Any]:
        dtype, tokens, size = DTYPES[self.dtype], self.sequences * self.query, self.head_size
        # As in a model, query, key and value are views of one projection's result.
        qkv = make.normal(tokens, (self.heads + 2 * self.kv_heads) * size, dtype=dtype)
        length = self.context + self.query
        each = cdiv(length, self.block_size)
        shape = self.sequences * each + 1, 2, self.block_size, self.kv_heads, size
        keys, values = make.normal(*shape, dtype=DTYPES[self.kv or self.dtype]).unbind(1)
        table = make.exactly([[1 + row * each + column for column in range(each)] for row in range(self.sequences)])
        table = torch.nn.functional.pad(table, (0, self.blocks - each))
        scale = make.exactly(1.0, torch.float32).expand(self.sequences, self.kv_heads)
        return {
            "q": qkv[:, : self.heads * size].view(tokens, self.heads, size), "k": keys, "v": values,
            "out": make.normal(tokens, self.heads, size, dtype=dtype),
            "cu_seqlens_q": make.exactly([self.query * number for number in range(self.sequences + 1)]),
            "max_seqlen_q": self.query, "seqused_k": make.exactly([length] * self.sequences), "max_seqlen_k": length,
            "softmax_scale": self.scale or size**-0.5, "causal": True,
            "window_size": (self.window - 1, 0) if self.window else (-1, -1),
            "block_table": table, "softcap": self.softcap, "q_descale": None, "k_descale": scale, "v_descale": scale,
            "alibi_slopes": make.normal(self.heads, dtype=torch.float32, scale=0.1) if self.alibi else None,
            "sinks": make.normal(self.heads, dtype=dtype) if self.sinks else None,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.attention.ops.triton_unified_attention import unified_attention

        unified_attention(**arguments)
        return arguments["out"]


@dataclass(frozen=True, kw_only=True)
class Cache(Case):
    """triton_reshape_and_cache_flash."""

    kernels = ("reshape_and_cache_kernel_flash",)
    label = "reshape-and-cache"
    dtype: str = "fp16"
    kv: str = ""
    heads: int = 0
    """Query heads that precede the keys in the projection's result."""
    kv_heads: int
    head_size: int
    block_size: int = 16
    tokens: int = 33

    def tensors(self, make: Tensors) -> dict[str, Any]:
        dtype, width = DTYPES[self.dtype], self.kv_heads * self.head_size
        qkv = make.normal(self.tokens, self.heads * self.head_size + 2 * width, dtype=dtype)
        key, value = qkv[:, -2 * width : -width], qkv[:, -width:]
        shape = cdiv(self.tokens, self.block_size) + 1, 2, self.block_size, self.kv_heads, self.head_size
        keys, values = make.normal(*shape, dtype=DTYPES[self.kv or self.dtype]).unbind(1)
        scale = make.exactly(1.0, torch.float32)
        return {
            "key": key.view(self.tokens, self.kv_heads, self.head_size),
            "value": value.view(self.tokens, self.kv_heads, self.head_size),
            "key_cache": keys, "value_cache": values,
            "slot_mapping": make.exactly(list(range(self.tokens)), torch.int64),
            "kv_cache_dtype": f"fp8_{self.kv}" if self.kv else "auto", "k_scale": scale, "v_scale": scale,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

        triton_reshape_and_cache_flash(**arguments)
        return arguments["key_cache"], arguments["value_cache"]
