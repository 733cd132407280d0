"""Running a program: its own process group, every line of its output seen, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from voltforge.errors import VoltforgeError

GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL when a program must end."""


class ProgramFailed(VoltforgeError):
    """A program ended with another status than 0, ran too long, or could not be started."""

    def __init__(self, argv: Sequence[str], status: int | None, output: str, log: Path | None, why: str) -> None:
        where = f"; its log is {log}" if log else ""
        super().__init__(f"{Path(argv[0]).name} {why}{where}")
        self.argv = tuple(argv)
        self.status = status
        """The exit status, negative for a signal; ``None`` if it never started or ran too long."""
        self.output = output
        """The last lines that it printed."""
        self.log = log


@dataclass
class Usage:
    """What a program and all its children used."""

    wall: float = 0.0
    """Seconds from start to end."""
    cpu: float = 0.0
    """Seconds of processor time, user and system, of all processes that were waited for."""
    peak: int = 0
    """Largest resident memory of all processes together at one moment, in bytes (sampled)."""
    peak_one: int = 0
    """Largest resident memory of any one process, in bytes (sampled)."""
    now: int = 0
    """Resident memory of all processes together at the last sample, in bytes."""


@dataclass(frozen=True)
class Completed:
    """A program that ended with status 0."""

    output: str
    """What it printed, both streams together: all of it, or the last lines if it went to a log."""
    usage: Usage = field(default_factory=Usage)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    watch: Callable[[str, Usage], None] | None = None,
    timeout: float | None = None,
    ok: Sequence[int] = (0,),
) -> Completed:
    """Run ``argv`` to its end and give what it printed.

    With ``log``, every line goes to that file as it comes. ``watch`` is called with each line, and
    with an empty one about twice a second, together with the usage so far. The program has a process
    group of its own, which ends with this call however it is left.

    Raises:
        ProgramFailed: it could not start, ended with a status not in ``ok``, or took over ``timeout`` seconds.
    """
    words = [str(word) for word in argv]
    start = time.monotonic()
    try:
        child = subprocess.Popen(
            words, cwd=cwd, env=None if env is None else dict(env), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise ProgramFailed(words, None, "", None, f"could not be started: {error.strerror}") from error
    usage = Usage()
    kept: deque[str] = deque(maxlen=2000 if log else None)
    timed_out = threading.Event()
    done = threading.Event()
    assert child.stdout is not None

    def sample() -> None:
        while not done.wait(0.5):
            _measure(child.pid, usage)
            usage.wall = time.monotonic() - start
            if watch:
                watch("", usage)
            if timeout is not None and usage.wall > timeout:
                timed_out.set()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        with _opened(log) as sink:
            if sink:
                sink.write(f"$ {shlex.join(words)}\n".encode())
            for raw in child.stdout:
                if sink:
                    sink.write(raw)
                    sink.flush()
                line = raw.decode(errors="replace").rstrip("\n")
                kept.append(line)
                if watch:
                    watch(line, usage)
        _, raw_status, resources = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(raw_status)
        usage.cpu = resources.ru_utime + resources.ru_stime
        usage.peak_one = max(usage.peak_one, resources.ru_maxrss * 1024)
        usage.peak = max(usage.peak, usage.peak_one)
    finally:
        done.set()
        end_group(child)
        sampler.join()
        child.stdout.close()
    usage.wall = time.monotonic() - start
    output = "\n".join(kept)
    if timed_out.is_set():
        raise ProgramFailed(words, None, output, log, f"was ended after {timeout:.0f} s")
    if child.returncode not in ok:
        status = child.returncode
        why = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
        raise ProgramFailed(words, status, output, log, why)
    return Completed(output, usage)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End every process of the child's group: SIGTERM, a moment to tidy up, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + GRACE
        while number == signal.SIGTERM and time.monotonic() < deadline and _group_lives(child):
            time.sleep(0.02)
    with contextlib.suppress(ChildProcessError):
        child.wait()


def _group_lives(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _measure(pid: int, usage: Usage) -> None:
    total = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                resident = process.memory_info().rss
                total += resident
                usage.peak_one = max(usage.peak_one, resident)
    usage.now = total
    usage.peak = max(usage.peak, total)


@contextlib.contextmanager
def _opened(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        yield sink
