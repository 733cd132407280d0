"""How many compile jobs this machine can hold at once: by its cores, and by its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from voltforge.errors import VoltforgeError
from voltforge.system import console
from voltforge.system.files import size

RESERVE = 1 << 30
"""Bytes that are left to the rest of the machine, or an eighth of what there is, if that is less."""
MOST = 1024
"""Jobs at once beyond which nobody meant the number."""
MOUNT = Path("/sys/fs/cgroup")
"""Where control groups are shown (cgroups(7))."""
OWN = Path("/proc/self/cgroup")
"""Which of them this process is in."""
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a group: its limit, what it holds, and the line of memory.stat for cache that gives way; in version 2 and 1."""


@dataclass(frozen=True)
class Memory:
    """What there is of memory, in bytes."""

    free: int
    """What can be had now."""
    limit: int
    """The most that could ever be had: what the machine has, or what a control group or a person allows."""

    @property
    def room(self) -> int:
        """What can be had now, less what is left to the rest of the machine."""
        return self.free - min(RESERVE, self.limit // 8)

    def within(self, limit: int, used: int) -> Memory:
        """The same for something that holds ``used`` bytes and is allowed no more than ``limit``."""
        return Memory(min(self.free, max(limit - used, 0)), min(self.limit, limit))


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory(mount: Path = MOUNT, own: Path = OWN) -> Memory | None:
    """What the machine has available, or what its control groups leave, if less; ``None`` where nothing tells.

    Groups are looked at from the process's own outwards, of both versions; one without a limit, or whose files make no
    sense, does not count.
    """
    try:
        system = psutil.virtual_memory()
        found = Memory(system.available, system.total)
    except (OSError, ValueError, KeyError, RuntimeError):  # as psutil has it where /proc/meminfo is odd
        found = None
    for group in _groups(mount, own):
        for limit, used, cache in FILES:
            told = _told(group, limit, used, cache)
            if told and (found is None or told.limit < found.limit or told.free < found.free):
                found = Memory(min(told.free, found.free), min(told.limit, found.limit)) if found else told
    return found


def number(text: str) -> int | None:
    """The number that ``text`` is, sensible or not; ``None`` where it is empty.

    Raises:
        VoltforgeError: it is no number.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise VoltforgeError(f"jobs={text} is no number of jobs", hint=f"jobs=N with N from 1 to {MOST}")
    return int(text)


def asked(text: str) -> int | None:
    """The number of jobs that a person asks for; ``None`` for as many as the machine holds.

    A number that is none of jobs, such as 0 or 10,000, is told, and the machine decides.

    Raises:
        VoltforgeError: it is no number.
    """
    if (count := number(text)) is None or 1 <= count <= MOST:
        return count
    console.warn(f"jobs={text} is not from 1 to {MOST}: this machine decides how many jobs run at once")
    return None


def count(text: str, memory_per_job: int) -> tuple[int, str]:
    """The jobs to run at once where nothing lets each through by itself, and why so many.

    Raises:
        VoltforgeError: ``text``, which :func:`asked` takes, is no number.
    """
    if sure := asked(text):
        return sure, "as asked"
    there = memory()
    if there is None:
        return cores(), "by cores, for nothing here tells how much memory there is"
    by_memory = there.room // memory_per_job
    if by_memory < cores():
        return max(1, by_memory), f"by memory, {size(memory_per_job)} a job"
    return cores(), "by cores"


def _groups(mount: Path, own: Path) -> Iterator[Path]:
    """The folders of the memory groups that this process is in, each before the one around it."""
    try:
        lines = own.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / controllers if controllers else mount
        group = top / path.strip("/")
        yield from [one for one in (group, *group.parents) if one.is_relative_to(top)]


def _told(group: Path, limit: str, used: str, cache: str) -> Memory | None:
    try:
        most, held = int((group / limit).read_text()), int((group / used).read_text())  # "max" is no number
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Memory(max(most - held + int(stat.get(cache, 0)), 0), most)
    except (OSError, ValueError):
        return None
