"""Which kernels vLLM picks on a card of one compute capability, or the sentence with which it refuses. Needs no GPU.

Run with the Python of an environment that has our vLLM: `python -m volta.choices` prints one JSON line per case,
`--markdown FILE` writes the tables of docs/volta.md. vLLM's own code decides: its engine arguments make the
configuration, its loader builds the model's layers (without storage), its worker joins the cards. Pretended are only
the platform's answers (CUDA, this capability, NVLink or not) and that a P2P check passes. No kernel is run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from volta.checkpoints import (
    CARDS,
    ENVIRONMENT,
    FAMILIES,
    FILES,
    JOINED,
    KV_CACHES,
    KV_FAMILIES,
    QUANTIZATIONS,
    ROUTERS,
    SMALL,
    WEIGHTS,
)


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


def pretended(capability: tuple[int, int]) -> None:
    """Make vLLM believe in cards of this capability. To be called once, before anything else of vllm is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DISABLE_PYNCCL="1",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
        VLLM_DISABLE_SHARED_EXPERTS_STREAM="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_LOGGING_LEVEL="INFO",
    )
    from volta import pretend

    pretend.capability(capability)
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
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:
                for other in children:  # which wait for it in vain
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise RuntimeError(f"the process of one of {count} pretended cards ended with status {status}")
        return [Choice(**one) for one in json.loads((folder / "answers").read_text())]


def as_card(some: list[Case], rank: int, linked: bool, folder: Path) -> None:
    """What one card's process does: join once, then answer to every case."""
    from volta.pretend import Platform

    Platform.joined = linked
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
    text += f"\nSeveral cards, with {'; '.join(JOINED)}, for Llama and Mixtral:\n\n"
    text += rows(
        ("cards", "layers", "sums are made by; the log says"),
        ((cards, *with_cards(answers, cards)) for cards, (count, _, _) in CARDS.items() if count > 1),
    )
    known = {choice.refused for choice in alone.values()}
    several = {
        choice.refused for choice in answers.values() if choice.when == "start" and "cards cannot" in choice.refused
    }
    text += "".join(f"\nRefused there: {sentence}\n" for sentence in sorted(several - known))
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
                changed.append(
                    f"{case.quantization}, {case.family}: `{choice.linear}`"
                    if choice.linear
                    else f"{case.quantization}, {case.family}: refused"
                )
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
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of docs/volta.md there, too")
    words = parser.parse_args()
    if words.only and words.markdown:
        parser.error("--markdown needs all cases: leave out --only")
    pretended(words.capability)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        answers = table(case for case in cases() if words.only in ", ".join(asdict(case).values()))
    for case, choice in answers.items():
        print(json.dumps({**asdict(case), **asdict(choice)}))
    if words.markdown:
        words.markdown.write_text(markdown(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
