"""Which kernels vLLM picks on a card of one compute capability, or the sentence with which it refuses. Needs no GPU.

Run with the Python of an environment that has our vLLM: `python -m volta.choices` prints one JSON line per case,
`--markdown` the tables of docs/volta.md. vLLM's own code decides: its engine arguments make the configuration, its
loader builds the model's layers (without storage), its worker joins the cards. Pretended are only the platform's
answers (CUDA, this capability, NVLink or not) and that a P2P check passes. No kernel is run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Two layers of each family: the sizes are small, but their ratios and the head sizes are those of real models.
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
# What else a model's folder must hold.
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
# What chooses among the experts: no checkpoint quantizes it.
ROUTERS = {
    "Mixtral": "block_sparse_moe.gate",
    **dict.fromkeys(("Qwen3 MoE", "DeepSeek V2 (MLA)", "DeepSeek V2, VLLM_MLA_DISABLE=1"), "mlp.gate"),
}
QKVO = tuple(f"self_attn.{one}_proj" for one in "qkvo")
MLP = ("gate_proj", "up_proj", "down_proj")
LATENT_WEIGHTS = (
    *(f"self_attn.{one}" for one in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(
        f"mlp.{where}.{one}"
        for where in ("shared_experts", *(f"experts.{expert}" for expert in range(8)))
        for one in MLP
    ),
)
# The linear layers of one layer, as checkpoints call them. GPTQ and AWQ learn from the files which are quantized.
WEIGHTS: dict[str, tuple[str, ...]] = {
    **{name: (*QKVO, *(f"mlp.{one}" for one in MLP)) for name in ("Llama", "Qwen2", "Gemma 2")},
    "Mixtral": (*QKVO, *(f"block_sparse_moe.experts.{expert}.w{one}" for expert in range(8) for one in (1, 2, 3))),
    "Qwen3 MoE": (*QKVO, *(f"mlp.experts.{expert}.{one}" for expert in range(8) for one in MLP)),
    "DeepSeek V2 (MLA)": LATENT_WEIGHTS,
    "DeepSeek V2, VLLM_MLA_DISABLE=1": LATENT_WEIGHTS,
}


def compressed(bits: int, form: str = "pack-quantized", inputs: dict[str, Any] | None = None, **weights: Any) -> Any:
    """A compressed-tensors checkpoint's quantization_config."""
    group = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", *(f"re:.*{router}$" for router in sorted(set(ROUTERS.values())))],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": inputs}},
    }


def gptq(bits: int, **others: Any) -> Any:
    """A GPTQ checkpoint's quantization_config."""
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
    """Activations quantized as they come, as compressed-tensors writes it."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


# Name: what the checkpoint's config.json says, and what the person says.
QUANTIZATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none, float16": ({}, {}),
    "none, bfloat16 checkpoint, dtype auto": ({"torch_dtype": "bfloat16"}, {}),
    "none, --dtype bfloat16": ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "GPTQ 4 bit": ({"quantization_config": gptq(4)}, {}),
    "GPTQ 4 bit, act-order": ({"quantization_config": gptq(4, desc_act=True)}, {}),
    "GPTQ 4 bit, asymmetric": ({"quantization_config": gptq(4, sym=False)}, {}),
    "GPTQ 8 bit": ({"quantization_config": gptq(8)}, {}),
    "AWQ": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}},
        {},
    ),
    "compressed-tensors W4A16": ({"quantization_config": compressed(4)}, {}),
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
# Name: how many cards, whether NVLink joins them all, and what the person says.
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
JOINED = ("none, float16", "GPTQ 4 bit", "GPTQ 4 bit, act-order", "AWQ", "compressed-tensors W4A16")


@dataclass(frozen=True)
class Case:
    """One cell of the table, by the names above."""

    quantization: str
    family: str
    kv_cache: str = "auto"
    cards: str = "one"


@dataclass(frozen=True)
class Choice:
    """What vLLM picks for a case; the names are those of its classes. Empty where there is nothing of the kind."""

    dtype: str = ""
    linear: str = ""
    """The kernels of the linear layers."""
    experts: str = ""
    """The kernels of the experts."""
    attention: str = ""
    all_reduce: str = ""
    """What adds up the cards' parts, and what the log says about it."""
    refused: str = ""
    """The sentence with which it refuses."""
    when: str = ""
    """When it refuses: at "start", before any process or weight is loaded, or while "building" the layers."""


def cases() -> Iterator[Case]:
    """Every quantization with every family; KV caches and several cards with some of them."""
    for quantization in QUANTIZATIONS:
        for family in FAMILIES:
            for kv_cache in KV_CACHES if family in KV_FAMILIES else KV_CACHES[:1]:
                yield Case(quantization, family, kv_cache)
    for cards, (count, _, _) in CARDS.items():
        if count > 1:
            for quantization in JOINED:
                for family in ("Llama", "Mixtral"):
                    yield Case(quantization, family, cards=cards)


# The pretence -----------------------------------------------------------------------------------------------------


def pretend(capability: tuple[int, int]) -> None:
    """Make vLLM believe in cards of this capability. To be called once, before vllm is imported."""
    os.environ.update(
        # vLLM takes Triton for usable if no card is visible, and for unusable if no driver is there.
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DISABLE_PYNCCL="1",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
        VLLM_DISABLE_SHARED_EXPERTS_STREAM="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_LOGGING_LEVEL="INFO",
    )
    import torch

    # GPTQ's conversion to BitBLAS asks torch rather than the platform, Marlin's workspace has the card's size.
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=80)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Pretended(NonNvmlCudaPlatform):
        joined = False

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "the card"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 16 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return cls.joined

    vllm.platforms._current_platform = Pretended()
    from vllm.model_executor.models import registry

    # A fresh interpreter for each architecture is there to keep CUDA out of this process, which has none.
    registry._run_in_subprocess = lambda function: function()


def weights(family: str) -> bytes:
    """A safetensors file with the names and types of a GPTQ or AWQ checkpoint's tensors, each of one element."""
    from safetensors.torch import save
    from torch import float16, int32, zeros

    tensors = {"model.norm.weight": zeros(1, dtype=float16)}
    for layer in range(SMALL["num_hidden_layers"]):
        if family in ROUTERS:
            tensors[f"model.layers.{layer}.{ROUTERS[family]}.weight"] = zeros(1, dtype=float16)
        for name in WEIGHTS.get(family, ()):
            tensors[f"model.layers.{layer}.{name}.qweight"] = zeros(1, dtype=int32)
            tensors[f"model.layers.{layer}.{name}.scales"] = zeros(1, dtype=float16)
    return bytes(save(tensors))


def quiet() -> None:
    """Everything below a warning of vLLM's log goes, for a log of hundreds of starts says nothing."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


# What vLLM does at its start --------------------------------------------------------------------------------------


@contextlib.contextmanager
def environment(family: str) -> Iterator[None]:
    """The variables that this family's name promises."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT.get(family, {}))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def configured(case: Case, folder: Path) -> Any:
    """The VllmConfig, by the way of the engine's arguments; raises what vLLM raises."""
    from vllm.engine.arg_utils import EngineArgs

    written, said = QUANTIZATIONS[case.quantization]
    count, _, parallel = CARDS[case.cards]
    for file, content in {"config.json": {**FAMILIES[case.family], **written}, **FILES.get(case.family, {})}.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "model.safetensors").write_bytes(weights(case.family))
    arguments = {"tensor_parallel_size": count, **parallel, **said}
    if count > 1:
        arguments["distributed_executor_backend"] = "mp"
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=case.family not in FILES,
        load_format="dummy",
        kv_cache_dtype=case.kv_cache,
        **arguments,
    ).create_engine_config()


def joined(config: Any, rank: int, folder: Path) -> str:
    """Join this process with the others as a worker does, and tell what will add up their parts."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators import custom_all_reduce
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    count = config.parallel_config.world_size
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(card) for card in range(count))
    asked: list[int] = []
    said: list[str] = []

    def can_p2p(rank: int, world_size: int) -> bool:
        # On real cards the check would pass and the kernel be taken; here it must not go on to CUDA.
        asked.append(rank)
        return False

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    custom_all_reduce._can_p2p = can_p2p
    log = logging.getLogger(custom_all_reduce.__name__)
    log.setLevel(logging.INFO)
    log.addFilter(hear)
    with set_current_vllm_config(config):
        init_worker_distributed_environment(config, rank, f"file://{folder}/rendezvous", rank, "gloo")
    if count == 1 or parallel_state.get_tp_group().world_size == 1:
        return ""
    wanted = [line for line in said if "P2P test failed" not in line]
    return " ".join([f"{'custom kernel' if asked else 'NCCL'}.", *wanted])


def kernels(config: Any) -> Choice:
    """Build the model's layers, without storage, and read off what they were given."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = config.model_config.dtype
    with set_current_vllm_config(config), set_default_torch_dtype(dtype), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    found: dict[str, set[str]] = {"linear": set(), "experts": set(), "attention": set()}
    for name, layer in model.named_modules():
        if isinstance(layer, FusedMoE):
            found["experts"].add(named(layer.quant_method, layer))
        elif isinstance(layer, LinearBase) and not name.endswith(".gate"):  # a router is never quantized
            found["linear"].add(named(layer.quant_method, layer))
        elif hasattr(layer, "attn_backend"):
            backend = layer.attn_backend  # a class, or for an encoder's attention a name
            found["attention"].add(backend.get_name() if hasattr(backend, "get_name") else backend.name)
    return Choice(str(dtype).removeprefix("torch."), **{kind: " + ".join(sorted(some)) for kind, some in found.items()})


def named(method: Any, layer: Any) -> str:
    """The name of what computes a layer: of a scheme's kernel rather than of the scheme, with Triton where it is."""
    scheme = getattr(layer, "scheme", None)
    method = getattr(scheme, "kernel", None) or scheme or method
    name = type(method).__name__
    gemm = getattr(method, "gemm", None)
    if gemm and "triton" in gemm.__name__:
        return f"{name} (Triton)"
    if getattr(getattr(layer, "exllama_state", None), "name", "") == "UNUSED":
        return f"{name} (without Exllama)"
    return name


# Driving it -------------------------------------------------------------------------------------------------------


# How vLLM refuses. Anything else, and every error of the CUDA that is not here, is this program's own failure.
REFUSALS = (ValueError, NotImplementedError, RuntimeError, ImportError, AssertionError)


def refusal(error: Exception) -> str:
    """vLLM's sentence, without what pydantic puts around it. Raises the error again if it is none of vLLM's."""
    if re.search(r"cuda(Get|Error)|CUDA (error|driver)|NVIDIA driver|CUDA GPUs", str(error)):
        raise error
    text = str(error) if not isinstance(error, RuntimeError) else " ".join(str(one) for one in error.args)
    text = re.sub(r"^\d+ validation errors? for \w+\n\s*(Value error, )?", "", text)
    text = re.sub(r"\s*\[type=.*", "", text, flags=re.DOTALL)
    text = text.split(" Supported architectures:")[0]
    return " ".join(text.split()) or type(error).__name__


def chosen(case: Case, join: Callable[[Any, Path], str]) -> Choice:
    """What vLLM answers to one case."""
    with tempfile.TemporaryDirectory() as name, environment(case.family):
        folder = Path(name)
        try:
            config = configured(case, folder)
        except REFUSALS as error:
            return Choice(refused=refusal(error), when="start")
        all_reduce = join(config, folder)
        try:
            return Choice(**{**asdict(kernels(config)), "all_reduce": all_reduce})
        except REFUSALS as error:
            return Choice(refused=refusal(error), when="building")


def together(some: list[Case]) -> list[Choice]:
    """The answers to cases with the same cards, from one forked process per card. The first card's are given."""
    count, linked, _ = CARDS[some[0].cards]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)  # gloo writes to the standard output
                try:
                    as_card(some, rank, linked, folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(ended):
            raise RuntimeError(f"the processes of {count} pretended cards ended with {ended}")
        return [Choice(**one) for one in json.loads((folder / "answers").read_text())]


def as_card(some: list[Case], rank: int, linked: bool, folder: Path) -> None:
    """What one card's process does: join once, then answer to every case."""
    from vllm.platforms import current_platform

    type(current_platform).joined = linked
    first: list[str] = []

    def join(config: Any, _: Path) -> str:
        if not first:
            first.append(joined(config, rank, folder))
        return first[0]

    answers = [asdict(chosen(case, join)) for case in some]
    if rank == 0:
        (folder / "answers").write_text(json.dumps(answers))


def table(wanted: Iterable[Case]) -> dict[Case, Choice]:
    """All answers, in the order of their cards."""
    groups: dict[str, list[Case]] = {}
    for case in wanted:
        groups.setdefault(case.cards, []).append(case)
    return {case: choice for some in groups.values() for case, choice in zip(some, together(some), strict=True)}


# The tables ------------------------------------------------------------------------------------------------------


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    written = [list(heads), *(list(line) for line in lines)]
    written.insert(1, ["---"] * len(written[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in written)


def places(cases: Iterable[Case]) -> str:
    """Where the same answer is given: families after the quantization that they share, "all" for all of them."""
    families: dict[str, list[str]] = {}
    for case in cases:
        families.setdefault(case.quantization, []).append(case.family)
    quantizations: dict[str, list[str]] = {}
    for quantization, some in families.items():
        quantizations.setdefault("; ".join(some), []).append(quantization)
    words = [
        f"{'any quantization' if len(some) == len(QUANTIZATIONS) else '; '.join(some)}: {which}"
        for which, some in quantizations.items()
    ]
    return "<br>".join(words)


def gathered(answers: dict[Case, Choice]) -> dict[Choice, list[Case]]:
    """The cases of each answer."""
    found: dict[Choice, list[Case]] = {}
    for case, choice in answers.items():
        found.setdefault(choice, []).append(case)
    return found


def markdown(answers: dict[Case, Choice]) -> str:
    """The tables of docs/volta.md."""
    alone = {case: choice for case, choice in answers.items() if case.cards == "one" and case.kv_cache == "auto"}
    runs = gathered({case: choice for case, choice in alone.items() if not choice.refused})
    refusals = gathered({case: choice for case, choice in alone.items() if choice.refused})
    text = "What is taken, on one card with `--kv-cache-dtype auto`:\n\n"
    text += rows(
        ("quantization: families", "dtype", "linear layers", "experts", "attention"),
        (
            (places(some), one.dtype, f"`{one.linear}`", f"`{one.experts}`" if one.experts else "-", one.attention)
            for one, some in runs.items()
        ),
    )
    text += "\nWhat is refused, before anything is loaded unless it is said otherwise:\n\n"
    text += rows(
        ("quantization: families", "in these words"),
        (
            (places(some), one.refused if one.when == "start" else f"while the layers are built: {one.refused}")
            for one, some in refusals.items()
        ),
    )
    text += f"\nOther KV caches, with any quantization, for {', '.join(KV_FAMILIES)}:\n\n"
    text += rows(("`--kv-cache-dtype`", "answer"), ((f"`{kv}`", with_cache(answers, kv)) for kv in KV_CACHES[1:]))
    text += f"\nSeveral cards, with {', '.join(JOINED)}, for Llama and Mixtral:\n\n"
    text += rows(
        ("cards", "layers", "sums are made by; the log says"),
        ((cards, *with_cards(answers, cards)) for cards, (count, _, _) in CARDS.items() if count > 1),
    )
    return text


def with_cache(answers: dict[Case, Choice], kv_cache: str) -> str:
    """What a KV cache changes against auto."""
    said = set()
    for case, choice in answers.items():
        auto = answers[Case(case.quantization, case.family, cards=case.cards)]
        if case.kv_cache == kv_cache and choice != auto:
            said.add(f"refused at the start: {choice.refused}" if choice.when == "start" else f"{case}: {choice}")
    return "<br>".join(sorted(said)) or "as with auto"


def with_cards(answers: dict[Case, Choice], cards: str) -> tuple[str, str]:
    """What several cards change against one, and what adds up their parts."""
    changed, reduced = [], set()
    for case, choice in answers.items():
        if case.cards == cards:
            alone = answers[Case(case.quantization, case.family)]
            if replace(choice, all_reduce="") != alone:
                changed.append(f"{case.quantization}, {case.family}: `{choice.linear or choice.refused}`")
            if not choice.refused:
                reduced.add(choice.all_reduce or "nothing to sum")
    return "<br>".join(changed) or "as on one", "<br>".join(sorted(reduced))


def capability(text: str) -> tuple[int, int]:
    """'7.0' as (7, 0)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> None:
    """Answer to all cases, as JSON lines or as tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=capability, default=(7, 0), metavar="7.0", help="which card is pretended")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the cases that have these words in them")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/volta.md instead of JSON lines")
    words = parser.parse_args()
    pretend(words.capability)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        answers = table(case for case in cases() if words.only in ", ".join(asdict(case).values()))
    if words.markdown:
        print(markdown(answers), end="")
    else:
        for case, choice in answers.items():
            print(json.dumps({**asdict(case), **asdict(choice)}))


if __name__ == "__main__":
    main()
