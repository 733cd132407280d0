"""Let vLLM select the kernels of each case, in one forked process for each pretended card."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from volta.kernel_selection.case import Case, Choice
from volta.kernel_selection.checkpoints import CARDS
from volta.kernel_selection.startup import configured, environment, joined, kernels

# The errors with which vLLM refuses. Any other error, and every CUDA error, is a fault of this program.
REFUSALS = (ValueError, NotImplementedError, RuntimeError, ImportError, AssertionError)


def refusal(error: Exception) -> str:
    """Return vLLM's message without pydantic's additions; raise the error again if it is a CUDA error."""
    if re.search(r"cuda(Get|Error)|CUDA (error|driver)|NVIDIA driver|CUDA GPUs", str(error)):
        raise error
    text = str(error) if not isinstance(error, RuntimeError) else " ".join(str(argument) for argument in error.args)
    text = re.sub(r"^\d+ validation errors? for \w+\n\s*(Value error, )?", "", text)
    text = re.sub(r"\s*\[type=.*", "", text, flags=re.DOTALL)
    text = text.split(" Supported architectures:")[0]
    return " ".join(text.split()) or type(error).__name__


def chosen(case: Case, join: Callable[[Any, Path], str]) -> Choice:
    """Return vLLM's answer to one case."""
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


def answers_of_cards(cases: list[Case]) -> list[Choice]:
    """Return the answers to cases with the same cards, from one forked process for each card.

    They are the answers of the first card.

    Raises:
        RuntimeError: a process fails.
    """
    count, linked, _ = CARDS[cases[0].cards]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)  # gloo writes to the standard output
                try:
                    as_card(cases, rank, linked, folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:
                for waiting in children:
                    os.kill(waiting, signal.SIGKILL)
                    os.waitpid(waiting, 0)
                raise RuntimeError(f"the process of one of {count} pretended cards exited with wait status {status}")
        return [Choice(**answer) for answer in json.loads((folder / "answers").read_text())]


def as_card(cases: list[Case], rank: int, linked: bool, folder: Path) -> None:
    """Run one card's process: join the others once, then write the answer to every case."""
    from volta.pretended_gpu import Platform

    Platform.nvlink = linked
    first: list[str] = []

    def join(config: Any, _: Path) -> str:
        if not first:
            first.append(joined(config, rank, folder))
        return first[0]

    answers = [asdict(chosen(case, join)) for case in cases]
    if rank == 0:
        (folder / "answers").write_text(json.dumps(answers))


def table(wanted: Iterable[Case]) -> dict[Case, Choice]:
    """Return the answers to all cases, grouped by cards."""
    groups: dict[str, list[Case]] = {}
    for case in wanted:
        groups.setdefault(case.cards, []).append(case)
    return {
        case: choice for cases in groups.values() for case, choice in zip(cases, answers_of_cards(cases), strict=True)
    }
