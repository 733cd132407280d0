"""Write the checkpoint of a small Llama, in float16 or quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, WORDS = 4, 512, 1024, 8, 2, 64, 1024
GROUP = 128
"""Inputs that share a scale, in a quantized matrix."""
PROMPTS = (1, 7, 33, 100)
"""How many tokens each prompt has: less than a tile of attention, and more than one."""
SEED = 70
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": WORDS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float16",
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""The matrices of a layer, outputs x inputs."""
GAINS = {"self_attn": 0.8, "mlp": 1.2}
"""How much a matrix enlarges what it is given: attention as much as errors of an e5m2 cache allow, see VARIANTS."""


Tensors = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to keep the weights and the cache."""

    name: str
    bound: float
    """How far a logarithm of a probability may be off."""
    quantization: str = ""
    """``gptq`` or ``awq``."""
    cache: str = "auto"


# The logits have a standard deviation of about 4.5. With transformers in float16 instead of vLLM, logarithms are off by
# 0.03 at most, and by 0.24 with an e5m2 cache: the reference rounds that too, but float16 and float32 may stand on two
# sides of a half, a quarter apart. The bounds are two to three times that. A cache that is not rounded is off by 0.7.
VARIANTS = (
    Variant("float16", 0.1),
    Variant("float16, fp8_e5m2 cache", 0.5, cache="fp8_e5m2"),
    Variant("GPTQ 4 bit", 0.1, "gptq"),
    Variant("AWQ 4 bit", 0.1, "awq"),
)


def weights(quantization: str = "", seed: int = SEED) -> tuple[Tensors, Tensors]:
    """The model twice: the tensors of a checkpoint, and the exact weights that they stand for, in float32."""
    import torch

    random = torch.Generator().manual_seed(seed)
    stored: Tensors = {}
    exact: Tensors = {}

    def normal(*shape: int, scale: float) -> Any:
        return torch.randn(shape, generator=random) * scale

    def plain(name: str, values: Any) -> None:
        stored[name] = values.half()
        exact[name] = values.half().float()

    plain("model.embed_tokens.weight", normal(WORDS, HIDDEN, scale=1))
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"model.layers.{layer}.{norm}.weight", 1 + normal(HIDDEN, scale=0.1))
        for matrix, (outputs, inputs) in SHAPES.items():
            name = f"model.layers.{layer}.{matrix}"
            values = normal(outputs, inputs, scale=GAINS[matrix.split(".")[0]] / math.sqrt(inputs))
            if quantization:
                parts, kept = {"gptq": gptq, "awq": awq}[quantization](values.T)
                stored.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
                exact[f"{name}.weight"] = kept.T.contiguous()
            else:
                plain(f"{name}.weight", values)
    plain("model.norm.weight", 1 + normal(HIDDEN, scale=0.1))
    plain("lm_head.weight", normal(WORDS, HIDDEN, scale=0.2))
    return stored, exact


def gptq(values: Any) -> tuple[Tensors, Any]:
    """A matrix, inputs x outputs, as GPTQ keeps it: symmetric, in groups; and what that stands for.

    Eight numbers of a column lie in a word, the first one lowest. A zero point is stored less 1.
    """
    import torch

    inputs, outputs = values.shape
    scales = (_grouped(values).abs().amax(1) / 7.5).half()
    numbers = (values / _spread(scales)).round().add(8).clamp(0, 15).long()
    parts = {
        "qweight": packed(numbers.T.reshape(outputs, -1, 8), range(8)).T.contiguous(),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": scales,
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }
    return parts, (numbers - 8) * _spread(scales)


def awq(values: Any) -> tuple[Tensors, Any]:
    """A matrix, inputs x outputs, as AWQ keeps it: with zero points, in groups; and what that stands for.

    Eight numbers of a row lie in a word, in the order of :data:`volta.reference.AWQ_ORDER`.
    """
    from volta.reference import AWQ_ORDER

    inputs, outputs = values.shape
    low, high = _grouped(values).amin(1), _grouped(values).amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).long()
    less = zeros.repeat_interleave(GROUP, 0)
    numbers = ((values / _spread(scales)).round().long() + less).clamp(0, 15)
    parts = {
        "qweight": packed(numbers.reshape(inputs, -1, 8), AWQ_ORDER),
        "qzeros": packed(zeros.reshape(-1, outputs // 8, 8), AWQ_ORDER),
        "scales": scales,
    }
    return parts, (numbers - less) * _spread(scales)


def packed(numbers: Any, places: Sequence[int]) -> Any:
    """Words of 32 bits, each from the eight numbers of the last axis; ``places`` says which four bits each one gets."""
    import torch

    shifts = 4 * torch.tensor(list(places))
    words = (numbers << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _grouped(values: Any) -> Any:
    return values.reshape(-1, GROUP, values.shape[1])


def _spread(scales: Any) -> Any:
    return scales.float().repeat_interleave(GROUP, 0)


def quantization_config(quantization: str) -> dict[str, Any]:
    """What a checkpoint's config.json says of it."""
    if quantization == "gptq":
        said = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
        return {"quantization_config": {**said, "lm_head": False}}
    if quantization == "awq":
        return {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}}
    return {}


def write(folder: Path, variant: Variant) -> Tensors:
    """Put a variant's checkpoint into a folder; gives the exact weights."""
    from safetensors.torch import save_file

    stored, exact = weights(variant.quantization)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **quantization_config(variant.quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return exact


def prompts(seed: int = SEED) -> list[list[int]]:
    """Token ids, of the lengths in :data:`PROMPTS`."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, WORDS, (count,), generator=random).tolist() for count in PROMPTS]
