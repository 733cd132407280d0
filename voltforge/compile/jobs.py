"""The cores and the memory that compile jobs may use on this machine, with the limits of its control groups."""

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
MAX_JOBS = 1024
"""A larger number of jobs is taken for a mistake."""
MOUNT = Path("/sys/fs/cgroup")
"""The folder where control groups are mounted (cgroups(7))."""
OWN_GROUPS = Path("/proc/self/cgroup")
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


def memory(mount: Path = MOUNT, own: Path = OWN_GROUPS) -> Memory | None:
    """Return the memory that the machine has, or that its control groups leave if that is less; ``None`` if unknown.

    The groups of both versions are read, from the process's own outwards. A group without a limit, or with files that
    cannot be parsed, is skipped.
    """
    try:
        system = psutil.virtual_memory()
        least: Memory | None = Memory(system.available, system.total)
    except (OSError, ValueError, KeyError, RuntimeError):  # psutil raises if /proc/meminfo is incomplete
        least = None
    for group in _groups(mount, own):
        for limit, used, cache in FILES:
            of_group = _group_memory(group, limit, used, cache)
            if of_group and least:
                least = Memory(min(of_group.free, least.free), min(of_group.limit, least.limit))
            else:
                least = of_group or least
    return least


def parse(text: str) -> int | None:
    """Return the number in ``text``, valid or not; ``None`` for an empty text.

    Raises:
        VoltforgeError: ``text`` is not a number.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise VoltforgeError(f"jobs={text} is not a number", hint=f"jobs=N with N from 1 to {MAX_JOBS}")
    return int(text)


def chosen(text: str) -> int | None:
    """Return the number of jobs that the user chose; ``None`` if the machine decides.

    A number out of range, such as 0 or 10,000, is reported and ignored.

    Raises:
        VoltforgeError: ``text`` is not a number.
    """
    if (count := parse(text)) is None or 1 <= count <= MAX_JOBS:
        return count
    console.warn(f"jobs={text} is not between 1 and {MAX_JOBS} and is ignored: this machine decides the number of jobs")
    return None


def count(text: str, memory_per_job: int) -> tuple[int, str]:
    """Return the number of jobs for builds that no scheduler controls, and the reason for it.

    Raises:
        VoltforgeError: ``text``, which :func:`chosen` parses, is not a number.
    """
    if jobs := chosen(text):
        return jobs, "as chosen"
    available = memory()
    if available is None:
        return cores(), "by cores; the free memory is unknown"
    by_memory = available.room // memory_per_job
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
        yield from [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]


def _group_memory(group: Path, limit: str, used: str, cache: str) -> Memory | None:
    """Return the memory that a control group leaves; ``None`` if it has no limit or its files cannot be parsed."""
    try:
        maximum, usage = int((group / limit).read_text()), int((group / used).read_text())  # either can be "max"
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Memory(max(maximum - usage + int(stat.get(cache, 0)), 0), maximum)
    except (OSError, ValueError):
        return None
