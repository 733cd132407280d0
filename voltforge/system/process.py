"""Run a program in a process group of its own, pass on each line of its output, and end all its processes."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from voltforge.errors import VoltforgeError
from voltforge.system.files import size

GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL, and the longest wait for background processes that keep the output open."""
TICK = 0.5
"""Seconds between two samples of a program's memory."""
TAIL = 2000
"""Lines of output that are kept in memory for a program with a log."""


class ProgramFailed(VoltforgeError):  # noqa: N818 - named for the event
    """A program failed, ran too long, or could not be started."""

    def __init__(self, argv: Sequence[str], status: int | None, output: str, log: Path | None, why: str) -> None:
        where = f"; its log is {log}" if log else ""
        super().__init__(f"{Path(argv[0]).name} {why}{where}")
        self.argv = tuple(argv)
        self.status = status
        """The exit status, negative for a signal; ``None`` if the program did not start or ran too long."""
        self.output = output
        """The last lines of its output."""
        self.log = log


@dataclass
class Usage:
    """The processor time and memory of a program and all its children."""

    wall: float = 0.0
    """Seconds from start to end."""
    cpu: float = 0.0
    """Seconds of processor time, user and system, of all processes that were waited for."""
    peak: int = 0
    """Largest resident memory of all processes together at one moment, in bytes (sampled)."""
    peak_one: int = 0
    """Largest resident memory of any one process, in bytes (sampled, or the kernel's own figure if that is larger)."""
    now: int = 0
    """Resident memory of all processes together at the last sample, in bytes."""

    def __str__(self) -> str:
        memory = f"{size(self.peak)} at most, {size(self.peak_one)} in one process"
        return f"{self.wall:.0f} s, {self.cpu:.0f} s of CPU, {memory}"

    def add(self, resources: resource.struct_rusage) -> None:
        """Add what wait4(2) reports about a program that has ended.

        Its largest resident memory counts from fork(2) on, when the child was a copy of this process. A figure that is
        no larger than our own is therefore ignored.
        """
        self.cpu = resources.ru_utime + resources.ru_stime
        if resources.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
            self.peak_one = max(self.peak_one, resources.ru_maxrss * 1024)
            self.peak = max(self.peak, self.peak_one)


@dataclass(frozen=True)
class Completed:
    """A program that succeeded."""

    output: str
    """Its standard output and error together: all of it, or the last lines if it has a log."""
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
    """Run ``argv`` to its end and return its output.

    With ``log``, the output is appended to that file at once. ``watch`` is called with each line, and with an empty
    line about twice a second, together with the usage so far. All processes of the program's group are ended when the
    call returns or raises.

    Raises:
        ProgramFailed: the program could not start, its status is not in ``ok``, or it ran over ``timeout`` seconds.
    """
    words = [str(word) for word in argv]
    usage, start, late = Usage(), time.monotonic(), False
    kept: deque[str] = deque(maxlen=TAIL if log else None)
    with _opened(log) as sink:
        if sink:
            sink.write(f"$ {shlex.join(words)}\n".encode())
            sink.flush()
        child = _started(words, cwd, env)
        try:
            for line in _lines(child, sink):
                if line is None:
                    _measure(child.pid, usage)
                else:
                    kept.append(line)
                usage.wall = time.monotonic() - start
                if watch:
                    watch(line or "", usage)
                if late := timeout is not None and usage.wall > timeout:
                    break
            else:
                _, status, resources = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                usage.add(resources)
        finally:
            end_group(child)
    usage.wall = time.monotonic() - start
    output = "\n".join(kept)
    if late:
        raise ProgramFailed(words, None, output, log, f"was ended after {timeout:g} s")
    if child.returncode not in ok:
        raise ProgramFailed(words, child.returncode, output, log, _why(child.returncode))
    return Completed(output, usage)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End all processes of the child's group: SIGTERM, then SIGKILL after :data:`GRACE` seconds."""
    try:
        _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while _group_lives(child) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:  # a second Ctrl-C skips the wait, but not the SIGKILL
        _signal(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            child.wait()
        if child.stdout:
            child.stdout.close()


def _started(words: Sequence[str], cwd: Path | None, env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            words, cwd=cwd, env=None if env is None else dict(env), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        where = f" in {cwd}" if cwd and not cwd.is_dir() else ""
        why = f"could not be started{where}: {getattr(error, 'strerror', None) or error}"
        raise ProgramFailed(words, None, "", None, why) from error


def _lines(child: subprocess.Popen[bytes], sink: IO[bytes] | None) -> Iterator[str | None]:
    """Yield each line of output, and ``None`` twice a second, until the output and the program have ended.

    A background process may keep the output open for ever; the wait for it is at most :data:`GRACE` seconds.
    """
    assert child.stdout is not None
    poll, rest = select.poll(), bytearray()
    poll.register(child.stdout)
    tick, ended, delay = time.monotonic() + TICK, None, 0.001
    while True:
        now = time.monotonic()
        if now >= tick:
            tick = now + TICK
            yield None
            if ended is None and _has_ended(child):
                ended = now
        if ended is not None and now - ended > GRACE:
            break
        if not poll.poll(max(0.0, tick - now) * 1000):
            continue
        data = os.read(child.stdout.fileno(), 1 << 16)
        if not data:
            break
        if sink:
            sink.write(data)
            sink.flush()
        first, *others = data.split(b"\n")
        rest += first
        for other in others:
            yield rest.decode(errors="replace")
            rest = bytearray(other)
    if rest:
        yield rest.decode(errors="replace")
    while not _has_ended(child):
        time.sleep(delay)
        delay = min(2 * delay, 0.05)
        if time.monotonic() >= tick:
            tick += TICK
            yield None


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Return True if the program has ended; its status and usage stay available to wait4(2)."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _why(status: int) -> str:
    if status >= 0:
        return f"failed with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was ended by signal {-status}"


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _group_lives(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
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
