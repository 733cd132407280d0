"""Runs the rows of a bundle on this machine's NVIDIA card and prints one table: kernel, error, bound, time, verdict.

A process of its own works through the rows; one that hangs is ended and named, one that loses the card is replaced, and
the other rows still run. Exit status: 0 if every row is right, 1 if one is not, 5 if there is no GPU that can be used.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volta.gpu import rows
from volta.gpu.card import Card, CardError, NoCardError, dotted, driver_release, needed
from volta.gpu.rows import Bundle, Pointer, Row

NO_GPU = 5
"""The status if no GPU can be used."""
PATIENCE = 60.0
"""Seconds that one row may take; what the driver's JIT takes is in it."""
START = 120.0
"""Seconds until a card can be used; a first context takes some on a machine with many cards."""


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


HEADINGS = ("kernel", "configuration", "relative error", "bound", "µs", "verdict")


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
            took = card.seconds(row.launches, memories)
    except CardError as error:
        if error.lost:
            raise
        return Verdict(row.kernels, row.name, row.bound, said=str(error))
    return Verdict(row.kernels, row.name, row.bound, error, 1e6 * took)


def flaws(row: Row) -> Iterator[str]:
    """What is wrong with a row as far as can be seen without a GPU."""
    for launch in row.launches:
        kinds = parameters(launch.image.ptx, launch.symbol)
        if kinds is None:
            yield f"{launch.symbol} is not in its PTX"
            continue
        given = [8 if isinstance(one, Pointer) else np.dtype(rows.KINDS[one.kind]).itemsize for one in launch.arguments]
        if given != kinds:
            yield f"{launch.symbol} takes parameters of {kinds} bytes, and is given {given}"
        for one in launch.arguments:
            if isinstance(one, Pointer) and not 0 <= one.offset <= row.buffers[one.buffer].nbytes:
                yield f"{launch.symbol} is given an address outside of its buffer"
        if ".target sm_70" not in launch.image.ptx:
            yield f"the PTX of {launch.symbol} is not for 7.0"
        if not launch.image.cubin.startswith(b"\x7fELF"):
            yield f"{launch.symbol} has no cubin for 7.0"
        needed(launch.image.ptx)
    if not row.results:
        yield "nothing is compared"
    for result in row.results:
        right = result.right
        if right.dtype.kind == "f" and not np.isfinite(right[~np.isnan(right)]).any():
            yield "its reference has no number"
        before = row.buffers[result.buffer].tobytes()
        if rows.error(result, before) <= row.bound:
            yield "it is right before anything was launched"


def parameters(ptx: str, symbol: str) -> list[int] | None:
    """The sizes of a kernel's parameters in bytes, as its PTX declares them; ``None`` if it is not there.

    A parameter is ``.param .u64 name``, ``.param .align 4 .b8 name[12]``, ``.param .u64 .ptr .global .align 1 name``
    (PTX ISA, kernel function parameters).
    """
    at = ptx.find(f".entry {symbol}(")
    if at < 0:
        return None
    sizes = []
    for line in ptx[at : ptx.index(")", at)].split(".param")[1:]:
        words = line.replace(",", " ").split()
        kind = next(word for word in words if word[1:2] in "usbf" and word[2:].isdigit())
        size = int(kind[2:]) // 8
        name = words[-1]
        sizes.append(size * int(name[name.index("[") + 1 : -1]) if name.endswith("]") else size)
    return sizes


# --- the worker: the process that has the card ---


def work(bundle: Bundle, numbers: Sequence[int], device: int) -> int:
    """Run rows, and print a line of JSON about the card, before each row, and after it."""
    with contextlib.ExitStack() as stack:
        try:
            card = Card(stack.enter_context(driver(bundle.archive)), device)
        except NoCardError as error:
            _tell({"none": str(error)})
            return NO_GPU
        version = dotted(card.version)
        told = {"card": card.name, "capability": list(card.capability), "cuda": version, "driver": driver_release()}
        _tell(told)
        for number in numbers:
            _tell({"begin": number})
            try:
                made = tried(card, bundle.row(number))
            except CardError as error:
                _tell({"lost": str(error)})
                return 1
            _tell({"end": vars(made)})
    return 0


@contextlib.contextmanager
def driver(archive: zipfile.ZipFile) -> Iterator[Any]:
    """``cuda.bindings.driver``: the machine's own, or the bundle's for the Python that runs.

    Raises:
        NoCardError: there is neither.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield importlib.import_module("cuda.bindings.driver")
            return
        except ImportError:
            place = f"site/cp{sys.version_info[0]}{sys.version_info[1]}/"
            bindings = [name for name in archive.namelist() if name.startswith(place)]
            if not bindings:
                raise NoCardError(
                    f"the bundle has no cuda-python for Python {sys.version.split()[0]}: pip install cuda-bindings"
                ) from None
            archive.extractall(folder, bindings)
            for name in [one for one in sys.modules if one == "cuda" or one.startswith("cuda.")]:
                del sys.modules[name]
            sys.path.insert(0, f"{folder}/{place}")
            importlib.invalidate_caches()
            yield importlib.import_module("cuda.bindings.driver")


def _tell(what: Any) -> None:
    print(json.dumps(what), flush=True)


# --- the one who waits: no CUDA in this process ---


class Worker:
    """A worker process, from which lines come or do not."""

    def __init__(self, words: Sequence[str]) -> None:
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.complaint = ""
        self.readers = [threading.Thread(target=one, daemon=True) for one in (self._read, self._listen)]
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.complaint = line.strip() or self.complaint

    def said(self, patience: float) -> dict[str, Any] | None:
        """The next line; ``None`` if the process is no more.

        Raises:
            TimeoutError: nothing came in so many seconds.
        """
        try:
            line = self.lines.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(5)


@dataclass
class Run:
    """The rows of a bundle on their way over a card."""

    bundle: Bundle
    command: Sequence[str]
    """What starts a worker, but for the rows."""
    patience: float = PATIENCE
    start: float = START
    card: dict[str, Any] | None = None

    def verdicts(self, numbers: Sequence[int]) -> Iterator[Verdict]:
        """One verdict for each row, as they come.

        Raises:
            NoCardError: there is no card that can be used.
        """
        left = list(numbers)
        while left:
            worker = Worker([*self.command, ",".join(map(str, left))])
            try:
                yield from self._some(worker, left)
            finally:
                worker.end()

    def _some(self, worker: Worker, left: list[int]) -> Iterator[Verdict]:
        """Verdicts until the worker has done all, or was lost; what is done is taken from ``left``."""
        at_work = False
        while left:
            try:
                said = worker.said(self.patience if at_work else self.start)
            except TimeoutError:
                if not at_work:
                    raise NoCardError(f"the card gave no answer in {self.start:.0f} s") from None
                yield self._failed(left.pop(0), f"it hung and was ended after {self.patience:.0f} s")
                return
            if said is None:
                worker.process.wait()
                worker.readers[1].join(5)
                why = f"the process ended with status {worker.process.returncode}"
                if not at_work:
                    raise NoCardError(f"{why}: {worker.complaint}")
                yield self._failed(left.pop(0), f"{why} ({worker.complaint})" if worker.complaint else why)
                return
            if "none" in said:
                raise NoCardError(said["none"])
            if "card" in said:
                self.card = said
            if "begin" in said:
                at_work = True
            if "lost" in said:
                yield self._failed(left.pop(0), said["lost"])
                return
            if "end" in said:
                left.pop(0)
                yield Verdict(**said["end"])

    def _failed(self, number: int, why: str) -> Verdict:
        said = self.bundle.listed[number]
        return Verdict(said["kernels"], said["name"], said["bound"], said=why)


def markdown(verdicts: Sequence[Verdict], title: str) -> str:
    """The table in Markdown."""
    lines = [title, "", f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    lines += [f"| {' | '.join(one.cells())} |" for one in verdicts]
    return "\n".join(lines) + "\n"


def check(bundle: Bundle) -> int:
    """What can be seen of a bundle without a GPU; gives the exit status."""
    try:
        broken = bundle.archive.testzip()
    except zlib.error as error:
        broken = f"a part of it ({error})"
    if broken:
        print(f"x {broken} is damaged: make or copy the bundle again", file=sys.stderr)
        return 1
    problems, launches = [], 0
    for number in range(len(bundle.listed)):
        row = bundle.row(number)
        launches += len(row.launches)
        problems += [f"{row.kernels}: {row.name}: {one}" for one in flaws(row)]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    count = len(bundle.listed)
    print(f"{count} rows with {launches} launches; {len(problems)} flaws. Nothing was run: that takes a GPU.")
    return 1 if problems or not count else 0


def main(words: Sequence[str] | None = None, path: str | None = None) -> int:
    """The command; ``path`` is the bundle, if it is not the program itself."""
    parser = argparse.ArgumentParser(prog="python3 BUNDLE", description=__doc__)
    parser.add_argument("--check", action="store_true", help="look at the bundle itself; needs no GPU")
    parser.add_argument("--list", action="store_true", help="name the rows and run nothing")
    parser.add_argument("--only", default="", help="rows with this in their name or kernel")
    parser.add_argument("--device", type=int, default=0, help="the number of the card")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one row, then it is ended")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file, too")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--bundle", default=path or "", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    asked.program = [path] if path else ["-m", "volta.gpu.run"]
    try:
        bundle = Bundle.open(asked.bundle)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        print(f"x {asked.bundle} is no bundle ({error}): ./doit gpu-bundle makes one", file=sys.stderr)
        return 2
    if asked.worker:
        return work(bundle, [int(one) for one in asked.worker.split(",")], asked.device)
    wanted = [
        number for number, one in enumerate(bundle.listed) if asked.only in f"{one['kernels']} {one['name']}"
    ]  # fmt: skip
    if not wanted:
        print(f"x no row has {asked.only!r} in its name: --list names all", file=sys.stderr)
        return 2
    if asked.check:
        return check(bundle)
    if asked.list:
        print("\n".join(f"{bundle.listed[one]['kernels']}: {bundle.listed[one]['name']}" for one in wanted))
        return 0
    return _run(bundle, wanted, asked)


def _run(bundle: Bundle, wanted: Sequence[int], asked: argparse.Namespace) -> int:
    command = [sys.executable, *asked.program, "--bundle", asked.bundle, "--device", str(asked.device), "--worker"]
    run, verdicts, told = Run(bundle, command, asked.patience), [], False
    try:
        for one in run.verdicts(wanted):
            if run.card and not told:
                told = True
                code = "the cubins for 7.0" if tuple(run.card["capability"]) == (7, 0) else "from PTX for 7.0"
                print(f"{_on(run.card)}, {code}", flush=True)
                print(f"{'error':>8} {'bound':>8} {'µs':>9}  verdict, kernel and configuration", flush=True)
            verdicts.append(one)
            kernels, name, error, bound, took, verdict = one.cells()
            print(f"{error:>8} {bound:>8} {took:>9}  {verdict}  {kernels}: {name}", flush=True)
    except NoCardError as error:
        print(f"x {error}", file=sys.stderr)
        if not verdicts:
            return NO_GPU
    right = sum(one.right for one in verdicts)
    today = datetime.date.today().isoformat()
    summary = f"{right} of {len(wanted)} rows are right on {_on(run.card) if run.card else 'no card'}, {today}"
    print(summary)
    if asked.json:
        asked.json.write_text(json.dumps({"card": run.card, "rows": [vars(one) for one in verdicts]}, indent=1))
    if asked.markdown:
        asked.markdown.write_text(markdown(verdicts, f"{summary}."), encoding="utf-8")
    return 0 if right == len(wanted) else 1


def _on(card: dict[str, Any]) -> str:
    driver = " ".join(["driver", *([card["driver"]] if card["driver"] else [])])
    return f"{card['card']} ({dotted(tuple(card['capability']))}), {driver} for CUDA {card['cuda']}"


if __name__ == "__main__":
    sys.exit(main())
