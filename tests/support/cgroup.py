"""Real control groups with a limit of memory or CPU time, where this machine allows them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
FILES = {
    "memory.max": ("memory.current", "memory.events", "memory.swap.max"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "memory.oom_control", "memory.memsw.limit_in_bytes"),
}
"""By the file with the limit: the files with the usage, the count of killed processes and the limit with swap; versions
2 and 1.
"""


PERIOD = 100_000
"""Microseconds of a scheduling period."""


@dataclass(frozen=True)
class Group:
    """A control group."""

    path: Path

    def enter(self) -> None:
        """Move this process into the group; for ``preexec_fn``."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def end(self) -> None:
        """Kill all processes of the group and wait until they are gone."""
        while pids := (self.path / "cgroup.procs").read_text().split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@dataclass(frozen=True)
class Limited(Group):
    """A group with limited memory."""

    used: str
    events: str

    @property
    def held(self) -> int:
        """The bytes that its processes hold, without the file cache."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(stat.get("total_rss") or stat["anon"])

    @property
    def killed(self) -> int:
        """The number of processes that the kernel killed for lack of memory."""
        events = dict(line.split() for line in (self.path / self.events).read_text().splitlines())
        return int(events["oom_kill"])


@contextlib.contextmanager
def limited(limit: int) -> Iterator[Limited]:
    """Make a group whose processes may hold ``limit`` bytes together.

    Raises:
        OSError: this machine does not allow it.
    """
    with _made("memory") as (path, alone):
        found = next((name for name in FILES if (path / name).exists()), None)
        if not found:
            raise OSError(f"{path.parent} has no memory controller")
        used, events, swap = FILES[found]
        (path / found).write_text(str(limit))
        with contextlib.suppress(OSError):
            (path / swap).write_text(str(limit) if alone else "0")
        yield Limited(path, used, events)


@contextlib.contextmanager
def slowed(cores: float) -> Iterator[Group]:
    """Make a group whose processes together get the time of some cores.

    Raises:
        OSError: this machine does not allow it.
    """
    with _made("cpu") as (path, alone):
        quota = round(cores * PERIOD)
        name, text = ("cpu.cfs_quota_us", f"{quota}") if alone else ("cpu.max", f"{quota} {PERIOD}")
        (path / name).write_text(text)
        yield Group(path)


@contextlib.contextmanager
def _made(controller: str) -> Iterator[tuple[Path, bool]]:
    """Make the folder of a new group, and return whether the controller has its own hierarchy, as in version 1."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, names, path in lines if controller in names.split(",")), None)
    around = MOUNT / controller / own.strip("/") if own else MOUNT / lines[0][2].strip("/")
    around = around if around.is_dir() else (MOUNT / controller if own else MOUNT)
    path = around / f"voltforge-test-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    try:
        yield path, own is not None
    finally:
        path.rmdir()
