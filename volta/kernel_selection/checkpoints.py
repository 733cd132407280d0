"""List small checkpoints of common model families and quantizations, as their config.json."""

from __future__ import annotations

from typing import Any

# Each family has two layers. The sizes are small; their ratios and the head sizes are those of real models.
SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    **SMALL,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 10000,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL},
    "Qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SMALL},
    "Gemma 2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **SMALL,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "Mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **SMALL,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen3 MoE": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **SMALL,
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "DeepSeek V2 (MLA)": LATENT,
    "DeepSeek V2, VLLM_MLA_DISABLE=1": LATENT,
    "Whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "d_model": 512,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 1024,
        "decoder_ffn_dim": 1024,
        "num_mel_bins": 80,
        "vocab_size": 256,
        "max_source_positions": 128,
        "max_target_positions": 128,
        "pad_token_id": 0,
        "torch_dtype": "float16",
    },
    "T5": {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
    "BART": {"architectures": ["BartForConditionalGeneration"], "model_type": "bart", "is_encoder_decoder": True},
}
# Other files that a model's folder must contain.
FILES: dict[str, dict[str, Any]] = {
    "Whisper": {
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "WhisperProcessor",
            "feature_size": 80,
        },
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor"},
        "vocab.json": {"<|endoftext|>": 0, "<|startoftranscript|>": 1},
        "merges.txt": "#version: 0.2\n",
        "special_tokens_map.json": {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    }
}
ENVIRONMENT = {"DeepSeek V2, VLLM_MLA_DISABLE=1": {"VLLM_MLA_DISABLE": "1"}}
# The routers of experts, which no checkpoint quantizes.
ROUTERS = {
    "Mixtral": "block_sparse_moe.gate",
    **dict.fromkeys(("Qwen3 MoE", "DeepSeek V2 (MLA)", "DeepSeek V2, VLLM_MLA_DISABLE=1"), "mlp.gate"),
}
QKVO = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
MLP = ("gate_proj", "up_proj", "down_proj")
LATENT_WEIGHTS = (
    *(f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(
        f"mlp.{parent}.{name}"
        for parent in ("shared_experts", *(f"experts.{expert}" for expert in range(8)))
        for name in MLP
    ),
)
# The linear layers of one layer, by their names in checkpoints. GPTQ and AWQ read from the files which are quantized.
WEIGHTS: dict[str, tuple[str, ...]] = {
    **{name: (*QKVO, *(f"mlp.{matrix}" for matrix in MLP)) for name in ("Llama", "Qwen2", "Gemma 2")},
    "Mixtral": (
        *QKVO,
        *(f"block_sparse_moe.experts.{expert}.w{number}" for expert in range(8) for number in (1, 2, 3)),
    ),
    "Qwen3 MoE": (*QKVO, *(f"mlp.experts.{expert}.{matrix}" for expert in range(8) for matrix in MLP)),
    "DeepSeek V2 (MLA)": LATENT_WEIGHTS,
    "DeepSeek V2, VLLM_MLA_DISABLE=1": LATENT_WEIGHTS,
}


def compressed(bits: int, form: str = "pack-quantized", inputs: dict[str, Any] | None = None, **weights: Any) -> Any:
    """Return the quantization_config of a compressed-tensors checkpoint."""
    group = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", *(f"re:.*{router}$" for router in sorted(set(ROUTERS.values())))],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": inputs}},
    }


def gptq(bits: int, **others: Any) -> Any:
    """Return the quantization_config of a GPTQ checkpoint."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        **others,
    }


def per_token(kind: str) -> dict[str, Any]:
    """Return the compressed-tensors configuration of dynamically quantized activations."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


# By name: additions to the checkpoint's config.json, and engine arguments of the user.
QUANTIZATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none, float16": ({}, {}),
    "none, bfloat16 checkpoint, dtype auto": ({"torch_dtype": "bfloat16"}, {}),
    "none, --dtype bfloat16": ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "GPTQ 4 bit": ({"quantization_config": gptq(4)}, {}),
    "GPTQ 4 bit, act-order": ({"quantization_config": gptq(4, desc_act=True)}, {}),
    "GPTQ 4 bit, asymmetric": ({"quantization_config": gptq(4, sym=False)}, {}),
    "GPTQ 4 bit, per channel": ({"quantization_config": gptq(4, group_size=-1)}, {}),
    "GPTQ 8 bit": ({"quantization_config": gptq(8)}, {}),
    "AWQ": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}},
        {},
    ),
    "AWQ, per channel": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True}},
        {},
    ),
    "compressed-tensors W4A16": ({"quantization_config": compressed(4)}, {}),
    "compressed-tensors W4A16, act-order": ({"quantization_config": compressed(4, actorder="group")}, {}),
    "compressed-tensors W4A16, per channel": (
        {"quantization_config": compressed(4, strategy="channel", group_size=None)},
        {},
    ),
    "compressed-tensors W4A16, asymmetric": ({"quantization_config": compressed(4, symmetric=False)}, {}),
    "compressed-tensors W8A16": ({"quantization_config": compressed(8)}, {}),
    "compressed-tensors W8A8 int8": (
        {"quantization_config": compressed(8, "int-quantized", per_token("int"), strategy="channel", group_size=None)},
        {},
    ),
    "compressed-tensors FP8": (
        {
            "quantization_config": compressed(
                8, "float-quantized", per_token("float"), type="float", strategy="channel", group_size=None
            )
        },
        {},
    ),
    "FP8": ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, {}),
    "bitsandbytes 4 bit": (
        {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_compute_dtype": "float16",
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": False,
            }
        },
        {},
    ),
}
KV_FAMILIES = ("Llama", "Gemma 2", "Mixtral")
KV_CACHES = ("auto", "fp8_e5m2", "fp8", "fp8_e4m3")
# By name: the number of cards, True if NVLink connects them all, and engine arguments of the user.
CARDS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "one": (1, False, {}),
    "2, NVLink": (2, True, {}),
    "2, PCIe": (2, False, {}),
    "2, PCIe, --no-disable-custom-all-reduce": (2, False, {"disable_custom_all_reduce": False}),
    "2, NVLink, --disable-custom-all-reduce": (2, True, {"disable_custom_all_reduce": True}),
    "4, NVLink": (4, True, {}),
    "4, PCIe": (4, False, {}),
    "4, PCIe, --no-disable-custom-all-reduce": (4, False, {"disable_custom_all_reduce": False}),
    "2 in a pipeline": (2, False, {"pipeline_parallel_size": 2, "tensor_parallel_size": 1}),
}
JOINED = (
    "none, float16",
    "GPTQ 4 bit",
    "GPTQ 4 bit, act-order",
    "AWQ",
    "compressed-tensors W4A16",
    "compressed-tensors W4A16, act-order",
)
