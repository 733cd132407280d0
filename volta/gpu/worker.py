"""Run rows on the card in a process of its own, and print each verdict as a line of JSON."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
import threading
import types
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta.gpu import rows
from volta.gpu.card import Card, CardError, NoCardError, dotted, driver_release
from volta.gpu.rows import Bundle, Row

NO_GPU = 5
"""The exit status if there is no usable GPU."""


@dataclass(frozen=True)
class Verdict:
    """The result of one row."""

    kernels: str
    name: str
    bound: float
    error: float | None = None
    microseconds: float | None = None
    reason: str = ""
    """The reason why there is no error to compare; empty if there is one."""

    @property
    def right(self) -> bool:
        """True if the error is within the bound."""
        return self.error is not None and self.error <= self.bound

    @property
    def verdict(self) -> str:
        """``ok``, ``WRONG``, or ``FAILED`` with the reason."""
        return "ok" if self.right else f"FAILED: {self.reason}" if self.reason else "WRONG"

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Return the cells of the table: kernel, configuration, error, bound, microseconds, verdict."""
        error = "-" if self.error is None else f"{self.error:.1e}"
        took = "-" if self.microseconds is None else f"{self.microseconds:.1f}"
        return self.kernels, self.name, error, f"{self.bound:.1e}", took, self.verdict


def run_row(card: Any, row: Row) -> Verdict:
    """Run one row on a card.

    Raises:
        CardError: this process cannot use the card any more.
    """
    try:
        with card.buffers(row.buffers) as memories:
            for launch in row.launches:
                card.launch(launch, memories)
            contents = {result.buffer: card.read(memories[result.buffer]) for result in row.results}
            error = max(rows.error(result, contents[result.buffer]) for result in row.results)
            took = 1e6 * card.seconds(row.launches, memories)
    except CardError as error:
        if error.lost:
            raise
        return Verdict(row.kernels, row.name, row.bound, reason=str(error))
    if not math.isfinite(error):
        why = "the result differs from exact bits, is not finite, or lies where nothing may be written"
        return Verdict(row.kernels, row.name, row.bound, None, took, why)
    return Verdict(row.kernels, row.name, row.bound, error, took)


def work(bundle: Bundle, numbers: Sequence[int], device: int, folder: Path) -> int:
    """Run rows; print a line of JSON about the card, before each row and after it. Return the exit status.

    The process exits when its standard input is closed, so that it does not outlive its parent if a kernel hangs. The
    parent removes ``folder``, which is for unpacked files.
    """
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        card = Card(driver(bundle.archive, folder), device)
    except NoCardError as error:
        _print({"none": str(error)})
        return NO_GPU
    version = dotted(card.version)
    _print({"card": card.name, "capability": list(card.capability), "cuda": version, "driver": driver_release()})
    for number in numbers:
        _print({"begin": number})
        try:
            verdict = run_row(card, bundle.row(number))
        except CardError as error:
            _print({"lost": str(error)})
            return 1
        _print({"end": vars(verdict)})
    return 0


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def driver(archive: zipfile.ZipFile, folder: Path) -> Any:
    """Import ``cuda.bindings.driver``: the machine's, or the bundle's for this Python, unpacked in ``folder``.

    Raises:
        NoCardError: neither can be imported.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        prefix = f"site/cp{sys.version_info[0]}{sys.version_info[1]}/"
    bindings = [name for name in archive.namelist() if name.startswith(prefix)]
    if not bindings:
        version = sys.version.split()[0]
        raise NoCardError(f"the bundle has no cuda-python for Python {version}: pip install cuda-bindings")
    unpacked = tempfile.mkdtemp(dir=folder)
    archive.extractall(unpacked, bindings)
    for name in [module for module in sys.modules if module == "cuda" or module.startswith("cuda.")]:
        del sys.modules[name]
    # cuda is a namespace package. An older cuda-python elsewhere on the path is a regular package and would hide it.
    namespace = types.ModuleType("cuda")
    namespace.__path__ = [f"{unpacked}/{prefix}cuda"]
    sys.modules["cuda"] = namespace
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise NoCardError(f"the bundle's cuda-python cannot be imported ({error})") from error


def _print(message: Any) -> None:
    print(json.dumps(message), flush=True)
