"""Runs the rows of a bundle on this machine's NVIDIA card and prints one table: kernel, error, bound, time, verdict.

A process of its own works through the rows; one that hangs is ended and named, one that loses the card is replaced, and
the other rows still run. Exit status: 0 if every row is right, 1 if one is not, 2 if it cannot be run as asked, 5 if
there is no GPU that can be used.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
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

from volta.gpu.card import NoCardError, dotted
from volta.gpu.check import check
from volta.gpu.rows import Bundle
from volta.gpu.worker import NO_GPU, Verdict, work

MISUSED, INTERRUPTED = 2, 130
"""Statuses if it cannot be run as asked, and after Ctrl-C."""
PATIENCE = 60.0
"""Seconds that one row may take; what the driver's JIT takes is in it."""
START = 120.0
"""Seconds until a card can be used; a first context takes some on a machine with many cards."""
GRACE = 5.0
"""Seconds that a process may take to end after its last row."""
HEADINGS = ("kernel", "configuration", "relative error", "bound", "µs", "verdict")


class Worker:
    """A worker process, from which lines come or do not."""

    def __init__(self, words: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
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

    def end(self, *, at_once: bool) -> None:
        """End it, whatever it does; ``at_once`` if it has more to do than to end by itself."""
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
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
        with tempfile.TemporaryDirectory() as folder:
            while left:
                worker = Worker([*self.command, "--folder", folder, "--worker", ",".join(map(str, left))])
                try:
                    yield from self._some(worker, left)
                except NoCardError as error:
                    if len(left) == len(numbers):
                        raise
                    yield from (self._failed(one, f"not run: {error}") for one in left)
                    return
                finally:
                    worker.end(at_once=bool(left))

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


def seconds(text: str) -> float:
    """A number of seconds from a second to a day, for argparse."""
    value = float(text)
    if not 1 <= value <= 86400:  # which no NaN is
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 86400")
    return value


def main(words: Sequence[str] | None = None, path: str | None = None) -> int:
    """The command; ``path`` is the bundle, if it is not the program itself."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return _main(words, path)
    except KeyboardInterrupt:
        print("x interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of a reader that has seen enough, as head(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return MISUSED


def _main(words: Sequence[str] | None, path: str | None) -> int:
    parser = argparse.ArgumentParser(prog="python3 BUNDLE", description=__doc__)
    parser.add_argument("--check", action="store_true", help="look at the bundle itself; needs no GPU")
    parser.add_argument("--list", action="store_true", help="name the rows and run nothing")
    parser.add_argument("--only", default="", help="rows with this in their name or kernel")
    parser.add_argument("--device", type=int, default=0, help="the number of the card")
    parser.add_argument("--patience", type=seconds, default=PATIENCE, help="seconds for one row, then it is ended")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file, too")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--bundle", default=path or "", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    asked.program = [path] if path else ["-m", "volta.gpu.run"]
    try:
        bundle = Bundle.open(asked.bundle)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        return _misused(f"{asked.bundle} is no bundle ({error}): ./doit gpu-bundle makes one")
    if asked.worker:
        return work(bundle, [int(one) for one in asked.worker.split(",")], asked.device, asked.folder)
    names = [f"{one['kernels']}: {one['name']}" for one in bundle.listed]
    wanted = [number for number, name in enumerate(names) if asked.only in name]
    if not wanted:
        return _misused(f"no row has {asked.only!r} in its name: --list names all")
    if asked.check:
        return check(bundle)
    if asked.list:
        print("\n".join(names[one] for one in wanted))
        return 0
    for file in filter(None, (asked.json, asked.markdown)):
        try:
            file.open("a").close()
        except OSError as error:
            return _misused(f"{file} cannot be written: {error.strerror}")
    return _run(bundle, wanted, asked)


def _misused(why: str) -> int:
    print(f"x {why}", file=sys.stderr)
    return MISUSED


def _run(bundle: Bundle, wanted: Sequence[int], asked: argparse.Namespace) -> int:
    command = [sys.executable, *asked.program, "--bundle", asked.bundle, "--device", str(asked.device)]
    run, verdicts = Run(bundle, command, asked.patience), []
    try:
        for one in run.verdicts(wanted):
            if run.card and not verdicts:
                code = "the cubins for 7.0" if tuple(run.card["capability"]) == (7, 0) else "from PTX for 7.0"
                print(f"{_on(run.card)}, {code}", flush=True)
                print(f"{'error':>8} {'bound':>8} {'µs':>9}  verdict, kernel and configuration", flush=True)
            verdicts.append(one)
            kernels, name, error, bound, took, verdict = one.cells()
            print(f"{error:>8} {bound:>8} {took:>9}  {verdict}  {kernels}: {name}", flush=True)
    except NoCardError as error:
        print(f"x {error}", file=sys.stderr)
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
