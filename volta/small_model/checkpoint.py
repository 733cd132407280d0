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
"""The number of inputs that share a scale in a quantized matrix."""
PROMPTS = (1, 7, 33, 100)
"""The number of tokens of each prompt: less than a tile of attention, and more."""
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
"""The shapes of a layer's matrices: outputs x inputs."""
GAINS = {"self_attn": 0.8, "mlp": 1.2}
"""The factor by which a matrix enlarges its input; for attention the errors of an e5m2 cache limit it."""


Tensors = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A format of the weights and the KV cache."""

    name: str
    bound: float
    """The largest error of a log probability that passes."""
    quantization: str = ""
    """``gptq``, ``awq``, or empty for float16."""
    cache: str = "auto"


# The logits have a standard deviation of about 4.5. With transformers in float16 instead of vLLM, the largest error of
# a log probability is 0.03, and 0.24 with an e5m2 cache. The reference rounds its cache, too, but float16 and float32
# can round a number near a tie in different directions. The bounds are two to three times these errors. A cache that is
# not rounded has an error of 0.7.
VARIANTS = (
    Variant("float16", 0.1),
    Variant("float16, fp8_e5m2 cache", 0.5, cache="fp8_e5m2"),
    Variant("GPTQ 4 bit", 0.1, "gptq"),
    Variant("AWQ 4 bit", 0.1, "awq"),
)


def weights(quantization: str = "", seed: int = SEED) -> tuple[Tensors, Tensors]:
    """Return the tensors of a checkpoint, and the exact weights that they represent, in float32."""
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
                parts, exact_values = {"gptq": gptq, "awq": awq}[quantization](values.T)
                stored.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
                exact[f"{name}.weight"] = exact_values.T.contiguous()
            else:
                plain(f"{name}.weight", values)
    plain("model.norm.weight", 1 + normal(HIDDEN, scale=0.1))
    plain("lm_head.weight", normal(WORDS, HIDDEN, scale=0.2))
    return stored, exact


def gptq(values: Any) -> tuple[Tensors, Any]:
    """Quantize a matrix, inputs x outputs, as GPTQ: symmetric, in groups. Return its tensors and exact weights.

    A word holds eight numbers of a column, the first in the lowest bits. A zero point is stored minus 1.
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
    """Quantize a matrix, inputs x outputs, as AWQ: with zero points, in groups. Return its tensors and exact weights.

    A word holds eight numbers of a row, in the order of :data:`volta.reference.AWQ_ORDER`.
    """
    from volta.reference import AWQ_ORDER

    inputs, outputs = values.shape
    low, high = _grouped(values).amin(1), _grouped(values).amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).long()
    offsets = zeros.repeat_interleave(GROUP, 0)
    numbers = ((values / _spread(scales)).round().long() + offsets).clamp(0, 15)
    parts = {
        "qweight": packed(numbers.reshape(inputs, -1, 8), AWQ_ORDER),
        "qzeros": packed(zeros.reshape(-1, outputs // 8, 8), AWQ_ORDER),
        "scales": scales,
    }
    return parts, (numbers - offsets) * _spread(scales)


def packed(numbers: Any, places: Sequence[int]) -> Any:
    """Pack the eight 4-bit numbers of the last axis into 32-bit words; ``places`` are their positions in the word."""
    import torch

    shifts = 4 * torch.tensor(list(places))
    words = (numbers << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _grouped(values: Any) -> Any:
    return values.reshape(-1, GROUP, values.shape[1])


def _spread(scales: Any) -> Any:
    return scales.float().repeat_interleave(GROUP, 0)


def quantization_config(quantization: str) -> dict[str, Any]:
    """Return the entries of config.json for a quantization."""
    if quantization == "gptq":
        config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
        return {"quantization_config": {**config, "lm_head": False}}
    if quantization == "awq":
        return {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}}
    return {}


def write(folder: Path, variant: Variant) -> Tensors:
    """Write a variant's checkpoint to a folder; return the exact weights."""
    from safetensors.torch import save_file

    stored, exact = weights(variant.quantization)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **quantization_config(variant.quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return exact


def prompts(seed: int = SEED) -> list[list[int]]:
    """Return random token ids of the lengths in :data:`PROMPTS`."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, WORDS, (count,), generator=random).tolist() for count in PROMPTS]
