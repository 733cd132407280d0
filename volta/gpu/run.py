"""Run the rows of a bundle on this machine's NVIDIA card and print a table: kernel, error, bound, time, verdict.

A worker process runs the rows. If a row hangs, the worker is killed; if the card becomes unusable, the worker is
replaced. The row gets a verdict and the other rows still run. Exit status: 0 if every row passes, 1 if one does not,
2 for wrong arguments, 5 if there is no usable GPU.
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
"""Exit statuses for wrong arguments and after Ctrl-C."""
PATIENCE = 60.0
"""Seconds that one row may take, including the driver's JIT."""
START = 120.0
"""Seconds until the card can be used; the first context is slow on a machine with many cards."""
GRACE = 5.0
"""Seconds that a worker may take to exit after its last row."""
HEADINGS = ("kernel", "configuration", "relative error", "bound", "µs", "verdict")


class Worker:
    """A worker process; two threads read its output."""

    def __init__(self, words: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.error_line = ""
        self.readers = [
            threading.Thread(target=target, daemon=True) for target in (self._read_output, self._read_errors)
        ]
        for reader in self.readers:
            reader.start()

    def _read_output(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.error_line = line.strip() or self.error_line

    def message(self, patience: float) -> dict[str, Any] | None:
        """Return the next message; ``None`` if the process has exited.

        Raises:
            TimeoutError: there is no message within ``patience`` seconds.
        """
        try:
            line = self.lines.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    def end(self, *, at_once: bool) -> None:
        """End the process; unless ``at_once``, wait first for it to exit by itself."""
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(5)


@dataclass
class Run:
    """A run of a bundle's rows on a card."""

    bundle: Bundle
    command: Sequence[str]
    """The command of a worker, without its rows."""
    patience: float = PATIENCE
    start: float = START
    card: dict[str, Any] | None = None

    def verdicts(self, numbers: Sequence[int]) -> Iterator[Verdict]:
        """Yield a verdict for each row as soon as it is known.

        Raises:
            NoCardError: there is no usable card.
        """
        left = list(numbers)
        with tempfile.TemporaryDirectory() as folder:
            while left:
                worker = Worker([*self.command, "--folder", folder, "--worker", ",".join(map(str, left))])
                try:
                    yield from self._work(worker, left)
                except NoCardError as error:
                    if len(left) == len(numbers):
                        raise
                    yield from (self._failed(number, f"not run: {error}") for number in left)
                    return
                finally:
                    worker.end(at_once=bool(left))

    def _work(self, worker: Worker, left: list[int]) -> Iterator[Verdict]:
        """Yield verdicts until the worker has finished or failed; remove each finished row from ``left``."""
        at_work = False
        while left:
            try:
                message = worker.message(self.patience if at_work else self.start)
            except TimeoutError:
                if not at_work:
                    raise NoCardError(f"the card did not answer within {self.start:.0f} s") from None
                yield self._failed(left.pop(0), f"it was killed after {self.patience:.0f} s without a result")
                return
            if message is None:
                worker.process.wait()
                worker.readers[1].join(5)
                why = f"the worker exited with status {worker.process.returncode}"
                if not at_work:
                    raise NoCardError(f"{why}: {worker.error_line}")
                yield self._failed(left.pop(0), f"{why} ({worker.error_line})" if worker.error_line else why)
                return
            if "none" in message:
                raise NoCardError(message["none"])
            if "card" in message:
                self.card = message
            if "begin" in message:
                at_work = True
            if "lost" in message:
                yield self._failed(left.pop(0), message["lost"])
                return
            if "end" in message:
                left.pop(0)
                yield Verdict(**message["end"])

    def _failed(self, number: int, why: str) -> Verdict:
        row = self.bundle.listed[number]
        return Verdict(row["kernels"], row["name"], row["bound"], reason=why)


def markdown(verdicts: Sequence[Verdict], title: str) -> str:
    """Return the table in Markdown."""
    lines = [title, "", f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    lines += [f"| {' | '.join(verdict.cells())} |" for verdict in verdicts]
    return "\n".join(lines) + "\n"


def seconds(text: str) -> float:
    """Parse a number of seconds from 1 to 86400 (a day), for argparse."""
    value = float(text)
    if not 1 <= value <= 86400:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 86400")
    return value


def main(words: Sequence[str] | None = None, path: str | None = None) -> int:
    """Run the command; return its exit status. ``path`` is the bundle if the bundle is the program."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return _main(words, path)
    except KeyboardInterrupt:
        print("x interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe, as head(1) does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return MISUSED


def _main(words: Sequence[str] | None, path: str | None) -> int:
    parser = argparse.ArgumentParser(prog="python3 BUNDLE", description=__doc__)
    parser.add_argument("--check", action="store_true", help="check the bundle itself, without a GPU")
    parser.add_argument("--list", action="store_true", help="list the rows and run nothing")
    parser.add_argument("--only", default="", help="only rows whose name or kernel contains this text")
    parser.add_argument("--device", type=int, default=0, help="the number of the card (default: 0)")
    parser.add_argument("--patience", type=seconds, default=PATIENCE, help="seconds after which a row is killed")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--bundle", default=path or "", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.program = [path] if path else ["-m", "volta.gpu.run"]
    try:
        bundle = Bundle.open(options.bundle)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        return _misused(f"{options.bundle} is no bundle ({error}): make one with ./doit gpu-bundle")
    if options.worker:
        return work(bundle, [int(number) for number in options.worker.split(",")], options.device, options.folder)
    names = [f"{row['kernels']}: {row['name']}" for row in bundle.listed]
    wanted = [number for number, name in enumerate(names) if options.only in name]
    if not wanted:
        return _misused(f"no row has {options.only!r} in its name: --list prints all names")
    if options.check:
        return check(bundle)
    if options.list:
        print("\n".join(names[number] for number in wanted))
        return 0
    for file in filter(None, (options.json, options.markdown)):
        try:
            file.open("a").close()
        except OSError as error:
            return _misused(f"{file} cannot be written: {error.strerror}")
    return _run(bundle, wanted, options)


def _misused(why: str) -> int:
    print(f"x {why}", file=sys.stderr)
    return MISUSED


def _run(bundle: Bundle, wanted: Sequence[int], options: argparse.Namespace) -> int:
    command = [sys.executable, *options.program, "--bundle", options.bundle, "--device", str(options.device)]
    run, verdicts = Run(bundle, command, options.patience), []
    try:
        for verdict in run.verdicts(wanted):
            if run.card and not verdicts:
                code = "the cubins for 7.0" if tuple(run.card["capability"]) == (7, 0) else "from PTX for 7.0"
                print(f"{_on(run.card)}, {code}", flush=True)
                print(f"{'error':>8} {'bound':>8} {'µs':>9}  verdict, kernel and configuration", flush=True)
            verdicts.append(verdict)
            kernels, name, error, bound, took, result = verdict.cells()
            print(f"{error:>8} {bound:>8} {took:>9}  {result}  {kernels}: {name}", flush=True)
    except NoCardError as error:
        print(f"x {error}", file=sys.stderr)
        return NO_GPU
    right = sum(verdict.right for verdict in verdicts)
    today = datetime.date.today().isoformat()
    summary = f"{right} of {len(wanted)} rows are right on {_on(run.card) if run.card else 'no card'}, {today}"
    print(summary)
    if options.json:
        options.json.write_text(
            json.dumps({"card": run.card, "rows": [vars(verdict) for verdict in verdicts]}, indent=1)
        )
    if options.markdown:
        options.markdown.write_text(markdown(verdicts, f"{summary}."), encoding="utf-8")
    return 0 if right == len(wanted) else 1


def _on(card: dict[str, Any]) -> str:
    driver = " ".join(["driver", *([card["driver"]] if card["driver"] else [])])
    return f"{card['card']} ({dotted(tuple(card['capability']))}), {driver} for CUDA {card['cuda']}"


if __name__ == "__main__":
    sys.exit(main())
