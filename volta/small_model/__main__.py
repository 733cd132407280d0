"""A small Llama made on the spot, run by vLLM on this GPU and held against transformers on the CPU in float32.

`python -m volta.small_model` makes a folder for each variant (float16, with an fp8_e5m2 cache, GPTQ, AWQ), lets vLLM
answer some prompts greedily, with and without CUDA graphs, and prints rows as `volta.torch_operations` does: is each
token the reference's own wherever that is decided, and how far are its logarithms of probabilities off? The exit status
is 0 if all is right, 1 if not, 5 if there is no card of compute capability 7.0. Nothing is downloaded.
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
from volta.small_model.generation import asked, generate
from volta.small_model.reference import Answer, Reference
from volta.torch_operations import machine
from volta.torch_operations.operation import NO_GPU, Row
from volta.torch_operations.table import line as plain_line


def rows(variant: Variant, folder: Path, device: str) -> Iterator[Row]:
    """All rows of a variant: vLLM's with and without CUDA graphs, or on the CPU those of transformers in float16."""
    exact = write(folder, variant)
    reference = Reference(exact, variant)
    runs: dict[str, Callable[[], tuple[list[Answer], float | None]]] = {
        "eager": lambda: asked(folder, variant, graphs=False),
        "CUDA graphs": lambda: asked(folder, variant, graphs=True),
    }
    if device == "cpu":
        short = Reference(exact, variant, "float16")
        runs = {"transformers in float16": lambda: ([short.greedy(prompt) for prompt in prompts()], None)}
    for how, ask in runs.items():
        name = f"{variant.name}, {how}"
        try:
            answers, took = ask()
        except RuntimeError as problem:
            yield Row(name, bound=variant.bound, said=str(problem)[:300])
            continue
        yield from compare(name, answers, reference, took)


def line(row: Row) -> str:
    """A row for people; here what is said of a right one is worth reading too."""
    return f"{plain_line(row)}: {row.said}" if row.verdict == "right" else plain_line(row)


def absent(any_card: bool) -> str:
    """Why there is no card to run it on, in a sentence; empty where there is one."""
    if why := machine.absent():
        return why
    import torch

    found = torch.cuda.get_device_capability()
    if found != (7, 0) and not any_card:
        return (
            f"This machine's card is of compute capability {found[0]}.{found[1]} and the wheel is for 7.0 alone: "
            "--any-card tries all the same, with a vLLM that has code for this card."
        )
    return ""


def main(words: Sequence[str] | None = None) -> int:
    """Run all variants."""
    parser = argparse.ArgumentParser(prog="volta.small_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--any-card", action="store_true", help="not only on 7.0: needs a vLLM with code for this card")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: transformers in float16 stands in for vLLM, to try the comparison")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORDS", help="only variants that have these words in the name")
    parser.add_argument("--json", action="store_true", help="one JSON value a line: what it runs on, then each row")
    for inner in ("--generate", "--to"):
        parser.add_argument(inner, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--graphs", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args(words)
    if said.generate:
        generate(said.generate, next(one for one in VARIANTS if one.name == said.variant), said.graphs, said.to)
        return 0
    if said.device == "cuda" and (why := absent(said.any_card)):
        print(why, file=sys.stderr)
        return NO_GPU
    wanted = [one for one in VARIANTS if said.only in one.name]
    if not wanted:
        parser.error(f"no variant has {said.only} in its name")
    about = machine.machine(said.device)
    print(json.dumps(about) if said.json else ", ".join(f"{name} {what}" for name, what in about.items()), flush=True)
    fine = True
    with tempfile.TemporaryDirectory(prefix="volta-model-") as folder:
        for number, variant in enumerate(wanted):
            for row in rows(variant, Path(folder) / str(number), said.device):
                print(json.dumps(asdict(row)) if said.json else line(row), flush=True)
                fine = fine and row.fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
