"""The number of compile jobs that this machine can run at once, by its cores and its memory."""

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
"""Bytes left to other programs, or an eighth of the memory if that is less."""
MOST = 1024
"""A larger number of jobs is taken for a mistake."""
MOUNT = Path("/sys/fs/cgroup")
"""The folder where control groups are mounted (cgroups(7))."""
OWN = Path("/proc/self/cgroup")
"""The file that lists the control groups of this process."""
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""The files of a group with its limit and its usage, and the line of memory.stat for reclaimable cache; versions 2 and
1.
"""


@dataclass(frozen=True)
class Memory:
    """The memory of this machine, in bytes."""

    free: int
    """The memory that is free now."""
    limit: int
    """The most that could ever be free: the machine's memory, or a limit of a control group or of the user."""

    @property
    def room(self) -> int:
        """The memory that is free now, less what is left to other programs."""
        return self.free - min(RESERVE, self.limit // 8)

    def within(self, limit: int, used: int) -> Memory:
        """Return the memory for a program that holds ``used`` bytes and may hold no more than ``limit``."""
        return Memory(min(self.free, max(limit - used, 0)), min(self.limit, limit))


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory(mount: Path = MOUNT, own: Path = OWN) -> Memory | None:
    """Return the memory that the machine has, or that its control groups leave if that is less; ``None`` if unknown.

    The groups of both versions are read, from the process's own outwards. A group without a limit, or with files that
    cannot be parsed, is skipped.
    """
    try:
        system = psutil.virtual_memory()
        found = Memory(system.available, system.total)
    except (OSError, ValueError, KeyError, RuntimeError):  # psutil raises if /proc/meminfo is incomplete
        found = None
    for group in _groups(mount, own):
        for limit, used, cache in FILES:
            told = _told(group, limit, used, cache)
            if told and (found is None or told.limit < found.limit or told.free < found.free):
                found = Memory(min(told.free, found.free), min(told.limit, found.limit)) if found else told
    return found


def number(text: str) -> int | None:
    """Return the number in ``text``, valid or not; ``None`` for an empty text.

    Raises:
        VoltforgeError: ``text`` is not a number.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise VoltforgeError(f"jobs={text} is not a number", hint=f"jobs=N with N from 1 to {MOST}")
    return int(text)


def asked(text: str) -> int | None:
    """Return the number of jobs that the user chose; ``None`` if the machine decides.

    A number out of range, such as 0 or 10,000, is reported and ignored.

    Raises:
        VoltforgeError: ``text`` is not a number.
    """
    if (count := number(text)) is None or 1 <= count <= MOST:
        return count
    console.warn(f"jobs={text} is not between 1 and {MOST} and is ignored: this machine decides the number of jobs")
    return None


def count(text: str, memory_per_job: int) -> tuple[int, str]:
    """Return the number of jobs for builds that no scheduler controls, and the reason for it.

    Raises:
        VoltforgeError: ``text``, which :func:`asked` parses, is not a number.
    """
    if sure := asked(text):
        return sure, "as chosen"
    there = memory()
    if there is None:
        return cores(), "by cores; the free memory is unknown"
    by_memory = there.room // memory_per_job
    if by_memory < cores():
        return max(1, by_memory), f"by memory, {size(memory_per_job)} per job"
    return cores(), "by cores"


def _groups(mount: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the memory groups of this process, from the innermost outwards."""
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
        most, held = int((group / limit).read_text()), int((group / used).read_text())  # the file may contain "max"
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Memory(max(most - held + int(stat.get(cache, 0)), 0), most)
    except (OSError, ValueError):
        return None
