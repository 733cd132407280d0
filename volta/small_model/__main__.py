"""Run a small Llama with vLLM on this GPU and compare its answers with transformers in float32 on the CPU.

`python -m volta.small_model` writes a random checkpoint for each variant (float16, with an fp8_e5m2 cache, GPTQ, AWQ).
vLLM answers some prompts greedily, with and without CUDA graphs. Two rows are printed for each run: the number of
tokens that differ from the reference where its choice is decided, and the largest error of a log probability. The exit
status is 0 if all is right, 1 if not, 5 if there is no card of compute capability 7.0. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from volta.small_model.checkpoint import VARIANTS, Variant, prompts, write
from volta.small_model.comparison import compare
from volta.small_model.generation import generate, run_vllm
from volta.small_model.reference import Answer, Reference
from volta.torch_operations import machine
from volta.torch_operations.operation import NO_GPU, OperationResult
from volta.torch_operations.table import line as plain_line


def rows(variant: Variant, folder: Path, device: str) -> Iterator[OperationResult]:
    """Yield the rows of a variant: vLLM with and without CUDA graphs, or on the CPU transformers in float16."""
    exact = write(folder, variant)
    reference = Reference(exact, variant)
    runs: dict[str, Callable[[], tuple[list[Answer], float | None]]] = {
        "eager": lambda: run_vllm(folder, variant, graphs=False),
        "CUDA graphs": lambda: run_vllm(folder, variant, graphs=True),
    }
    if device == "cpu":
        short = Reference(exact, variant, "float16")
        runs = {"transformers in float16": lambda: ([short.greedy(prompt) for prompt in prompts()], None)}
    for label, run in runs.items():
        name = f"{variant.name}, {label}"
        try:
            answers, took = run()
        except RuntimeError as problem:
            yield OperationResult(name, bound=variant.bound, reason=str(problem)[:300])
            continue
        yield from compare(name, answers, reference, took)


def line(row: OperationResult) -> str:
    """Return a row as a line of a printed table, with the reason also if it is right."""
    return f"{plain_line(row)}: {row.reason}" if row.verdict == "right" else plain_line(row)


def absent(any_card: bool) -> str:
    """Return a message if there is no card that can run the model; empty if there is one."""
    if why := machine.absent():
        return why
    import torch

    capability = torch.cuda.get_device_capability()
    if capability != (7, 0) and not any_card:
        return (
            f"This machine's card has compute capability {capability[0]}.{capability[1]}, and the wheel is for 7.0. "
            "With a vLLM that is compiled for this card, add --any-card."
        )
    return ""


def main(words: Sequence[str] | None = None) -> int:
    """Run all variants; return the exit status."""
    parser = argparse.ArgumentParser(prog="volta.small_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--any-card", action="store_true", help="run on any card; needs a vLLM that is compiled for it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: use transformers in float16 instead of vLLM, to test the comparison")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORDS", help="only variants whose name contains this text")
    parser.add_argument("--json", action="store_true", help="print JSON lines: the machine, then each row")
    for inner in ("--generate", "--to"):
        parser.add_argument(inner, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--graphs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.generate:
        generate(
            options.generate,
            next(variant for variant in VARIANTS if variant.name == options.variant),
            options.graphs,
            options.to,
        )
        return 0
    if options.device == "cuda" and (why := absent(options.any_card)):
        print(why, file=sys.stderr)
        return NO_GPU
    wanted = [variant for variant in VARIANTS if options.only in variant.name]
    if not wanted:
        parser.error(f"no variant has {options.only!r} in its name")
    about = machine.machine(options.device)
    print(
        json.dumps(about) if options.json else ", ".join(f"{name} {value}" for name, value in about.items()), flush=True
    )
    fine = True
    with tempfile.TemporaryDirectory(prefix="volta-model-") as folder:
        for number, variant in enumerate(wanted):
            for row in rows(variant, Path(folder) / str(number), options.device):
                print(json.dumps(asdict(row)) if options.json else line(row), flush=True)
                fine = fine and row.fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
