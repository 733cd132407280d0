"""Start vLLM as far as it selects kernels: engine arguments, distributed workers, layers without storage."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volta.kernel_selection.case import Case, Choice
from volta.kernel_selection.checkpoints import (
    CARDS,
    ENVIRONMENT,
    FAMILIES,
    FILES,
    QUANTIZATIONS,
    ROUTERS,
    SMALL,
    WEIGHTS,
)


def pretended(capability: tuple[int, int]) -> None:
    """Pretend cards of this capability; call this once, before any other module of vllm is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DISABLE_PYNCCL="1",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
        VLLM_DISABLE_SHARED_EXPERTS_STREAM="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_LOGGING_LEVEL="INFO",
    )
    from volta import pretended_gpu

    pretended_gpu.capability(capability)
    from vllm.model_executor.models import registry

    # vLLM inspects each model class in a new process to avoid CUDA in this one. There is no CUDA here.
    registry._run_in_subprocess = lambda function: function()


def weights(family: str) -> bytes:
    """Return a safetensors file with the tensor names and types of a GPTQ or AWQ checkpoint; each has one element."""
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
    """Log only vLLM's errors: the log of hundreds of starts is not useful."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


@contextlib.contextmanager
def environment(family: str) -> Iterator[None]:
    """Set the environment variables of a family inside the block."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT.get(family, {}))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def configured(case: Case, folder: Path) -> Any:
    """Return the VllmConfig, from the engine's arguments; raises vLLM's errors."""
    from vllm.engine.arg_utils import EngineArgs

    config, options = QUANTIZATIONS[case.quantization]
    count, _, parallel = CARDS[case.cards]
    for file, content in {"config.json": {**FAMILIES[case.family], **config}, **FILES.get(case.family, {})}.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "model.safetensors").write_bytes(weights(case.family))
    arguments = {"tensor_parallel_size": count, **parallel, **options}
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
    """Join this process with the others as a worker does, and return the all-reduce with its log message."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators import custom_all_reduce
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    count = config.parallel_config.world_size
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(card) for card in range(count))
    checked: list[int] = []
    messages: list[str] = []

    def can_p2p(rank: int, world_size: int) -> bool:
        # On real cards the check passes and vLLM uses the custom kernel. Here False stops before CUDA is called.
        checked.append(rank)
        return False

    def collect(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    custom_all_reduce._can_p2p = can_p2p
    log = logging.getLogger(custom_all_reduce.__name__)
    log.setLevel(logging.INFO)
    log.addFilter(collect)
    with set_current_vllm_config(config):
        init_worker_distributed_environment(config, rank, f"file://{folder}/rendezvous", rank, "gloo")
    if count == 1 or parallel_state.get_tp_group().world_size == 1:
        return ""
    wanted = [line for line in messages if "P2P test failed" not in line]
    return " ".join([f"{'custom kernel' if checked else 'NCCL'}.", *wanted])


def kernels(config: Any) -> Choice:
    """Build the model's layers without storage and return their kernels."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = config.model_config.dtype
    with set_current_vllm_config(config), set_default_torch_dtype(dtype), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    names: dict[str, set[str]] = {"linear": set(), "experts": set(), "attention": set()}
    for name, layer in model.named_modules():
        if isinstance(layer, FusedMoE):
            names["experts"].add(named(layer.quant_method, layer))
        elif isinstance(layer, LinearBase) and not name.endswith(".gate"):  # a router is never quantized
            names["linear"].add(named(layer.quant_method, layer))
        elif hasattr(layer, "attn_backend"):
            backend = layer.attn_backend  # a class, or for an encoder's attention a name
            names["attention"].add(backend.get_name() if hasattr(backend, "get_name") else backend.name)
    return Choice(
        str(dtype).removeprefix("torch."), **{kind: " + ".join(sorted(members)) for kind, members in names.items()}
    )


def named(method: Any, layer: Any) -> str:
    """Return the class name of a layer's kernel, scheme or method, in this order; "(Triton)" marks Triton kernels."""
    scheme = getattr(layer, "scheme", None)
    method = getattr(scheme, "kernel", None) or scheme or method
    name = type(method).__name__
    gemm = getattr(method, "gemm", None)
    if gemm and "triton" in gemm.__name__:
        return f"{name} (Triton)"
    if getattr(getattr(layer, "exllama_state", None), "name", "") == "UNUSED":
        return f"{name} (without Exllama)"
    return name
