"""The process that has the card: it works through rows and says what became of each, in lines of JSON."""

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
"""The status if no GPU can be used."""


@dataclass(frozen=True)
class Verdict:
    """What became of one row."""

    kernels: str
    name: str
    bound: float
    error: float | None = None
    microseconds: float | None = None
    said: str = ""
    """Why there is no error, where there is none."""

    @property
    def right(self) -> bool:
        """Whether the row stands."""
        return self.error is not None and self.error <= self.bound

    @property
    def verdict(self) -> str:
        """``ok``, ``WRONG``, or why it was not run to its end."""
        return "ok" if self.right else f"FAILED: {self.said}" if self.said else "WRONG"

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Kernel, configuration, error, bound, microseconds, verdict."""
        error = "-" if self.error is None else f"{self.error:.1e}"
        took = "-" if self.microseconds is None else f"{self.microseconds:.1f}"
        return self.kernels, self.name, error, f"{self.bound:.1e}", took, self.verdict


def tried(card: Any, row: Row) -> Verdict:
    """Run one row on a card.

    Raises:
        CardError: the card is lost for this process.
    """
    try:
        with card.buffers(row.buffers) as memories:
            for launch in row.launches:
                card.launch(launch, memories)
            held = {one.buffer: card.read(memories[one.buffer]) for one in row.results}
            error = max(rows.error(one, held[one.buffer]) for one in row.results)
            took = 1e6 * card.seconds(row.launches, memories)
    except CardError as error:
        if error.lost:
            raise
        return Verdict(row.kernels, row.name, row.bound, said=str(error))
    if not math.isfinite(error):
        why = "not to the bit what it should be, or not finite, or where nothing may be written"
        return Verdict(row.kernels, row.name, row.bound, None, took, why)
    return Verdict(row.kernels, row.name, row.bound, error, took)


def work(bundle: Bundle, numbers: Sequence[int], device: int, folder: Path) -> int:
    """Run rows, and print a line of JSON about the card, before each row, and after it.

    It ends with whoever has the other end of its standard input: nobody else would end a kernel that hangs.
    ``folder`` is for files that are removed by the one who waits.
    """
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    try:
        card = Card(driver(bundle.archive, folder), device)
    except NoCardError as error:
        _tell({"none": str(error)})
        return NO_GPU
    version = dotted(card.version)
    _tell({"card": card.name, "capability": list(card.capability), "cuda": version, "driver": driver_release()})
    for number in numbers:
        _tell({"begin": number})
        try:
            made = tried(card, bundle.row(number))
        except CardError as error:
            _tell({"lost": str(error)})
            return 1
        _tell({"end": vars(made)})
    return 0


def _end_with_the_other() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def driver(archive: zipfile.ZipFile, folder: Path) -> Any:
    """``cuda.bindings.driver``: the machine's own, or the bundle's for the Python that runs, unpacked in ``folder``.

    Raises:
        NoCardError: there is neither.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        place = f"site/cp{sys.version_info[0]}{sys.version_info[1]}/"
    bindings = [name for name in archive.namelist() if name.startswith(place)]
    if not bindings:
        version = sys.version.split()[0]
        raise NoCardError(f"the bundle has no cuda-python for Python {version}: pip install cuda-bindings")
    there = tempfile.mkdtemp(dir=folder)
    archive.extractall(there, bindings)
    for name in [one for one in sys.modules if one == "cuda" or one.startswith("cuda.")]:
        del sys.modules[name]
    # A namespace package, which an older release of cuda-python, a plain package elsewhere on the path, would hide.
    ours = types.ModuleType("cuda")
    ours.__path__ = [f"{there}/{place}cuda"]
    sys.modules["cuda"] = ours
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise NoCardError(f"the bundle's cuda-python cannot be imported ({error})") from error


def _tell(what: Any) -> None:
    print(json.dumps(what), flush=True)
