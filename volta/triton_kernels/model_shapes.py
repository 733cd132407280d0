"""List the shapes of common models, as in their config.json; their kernels are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TENSOR_PARALLEL = (1, 2, 4)
IN_FLOAT32 = ("gemma2", "gemma3", "gemma3_text", "plamo2", "glm4")
"""Model types that vLLM refuses in float16 (_FLOAT16_NOT_SUPPORTED_MODELS in vllm/config/model.py)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The properties of a model that determine its kernels."""

    models: str
    heads: int
    kv_heads: int
    head_size: int
    dtype: str = "fp16"
    """fp32 for models that vLLM refuses to compute in float16."""
    windows: tuple[int | None, ...] = (None,)
    """Sliding windows of the layers; ``None`` for a layer without one."""
    softcap: float = 0
    alibi: bool = False
    mrope: tuple[int, int, int] | None = None
    awq: int = 0
    """The group size of AWQ, for all layers but experts; 0 for none. All models share these kernels."""
    experts: int = 0
    top_k: int = 0
    hidden: int = 0
    width: int = 0
    """The intermediate size of an expert."""
    bits: tuple[int, ...] = (16, 4)
    """Bits of the experts' weights."""
    group: int = 128
    zeros: bool = True
    """True if 4-bit experts have zero points."""

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> Shape:
        """Return the shape of a Hugging Face config.json.

        Raises:
            KeyError: a key is missing.
            TypeError, AttributeError, ValueError: a value has the wrong type.
        """
        text = {**config, **(config.get("text_config") or {})}
        heads = int(text["num_attention_heads"])
        windows: set[int | None] = {None}
        if text.get("sliding_window") and text.get("use_sliding_window", True):
            alternate = text.get("layer_types") or text.get("sliding_window_pattern") or "gemma" in str(text)
            windows = {int(text["sliding_window"]), *([None] if alternate else [])}
        quantized = config.get("quantization_config") or text.get("quantization_config") or {}
        method = quantized.get("quant_method")
        groups = quantized.get("config_groups") or {}  # compressed-tensors
        weights = next(iter(groups.values()))["weights"] if groups else quantized
        bits, group = int(weights.get("bits") or weights.get("num_bits") or 0), int(weights.get("group_size") or -1)
        rope = text.get("rope_scaling") or {}
        experts = int(text.get("num_local_experts") or text.get("num_experts") or 0)
        nope, rope_size = text.get("qk_nope_head_dim"), text.get("qk_rope_head_dim")  # MLA run as ordinary attention
        size = nope + rope_size if nope and rope_size else text.get("head_dim") or text["hidden_size"] // heads
        return cls(
            models=name, heads=heads, kv_heads=int(text.get("num_key_value_heads") or heads), head_size=int(size),
            dtype="fp32" if {config.get("model_type"), text.get("model_type")} & set(IN_FLOAT32) else "fp16",
            windows=tuple(sorted(windows, key=lambda window: window or 0)),
            softcap=text.get("attn_logit_softcapping") or 0, alibi=bool(text.get("alibi")),
            mrope=tuple(rope["mrope_section"]) if "mrope_section" in rope else None,
            awq=group if method == "awq" and group > 0 else 0,
            experts=experts, top_k=int(text.get("num_experts_per_tok") or 0), hidden=int(text["hidden_size"]),
            width=int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 0),
            bits=(bits,) if bits in (4, 8) and group > 0 else (16,), group=max(group, 32),
            zeros=method == "awq" or not weights.get("sym", weights.get("symmetric", True)),
        )  # fmt: skip


SHAPES = (
    Shape(models="Llama 3.1 8B, Mistral 7B v0.3, Qwen3 4B and 8B", heads=32, kv_heads=8, head_size=128, awq=128),
    Shape(models="Qwen2.5 7B, Qwen2.5-VL 7B", heads=28, kv_heads=4, head_size=128, mrope=(16, 24, 24)),
    Shape(models="Qwen2.5 14B and 32B, QwQ 32B, Qwen3 14B", heads=40, kv_heads=8, head_size=128),
    Shape(models="Llama 3.3 70B, Qwen2.5 72B, Qwen3 32B", heads=64, kv_heads=8, head_size=128),
    Shape(models="Llama 3.2 1B", heads=32, kv_heads=8, head_size=64),
    Shape(models="Gemma 2 9B", heads=16, kv_heads=8, head_size=256, dtype="fp32", windows=(None, 4096), softcap=50.0),
    Shape(models="Gemma 3 12B", heads=16, kv_heads=8, head_size=256, dtype="fp32", windows=(None, 1024)),
    Shape(models="Mixtral 8x7B", heads=32, kv_heads=8, head_size=128, experts=8, top_k=2, hidden=4096, width=14336),
    Shape(models="Qwen3 30B A3B", heads=32, kv_heads=4, head_size=128, experts=128, top_k=8, hidden=2048, width=768),
)
