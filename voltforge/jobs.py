"""How many compile jobs this machine can hold at once: by its cores, and by its memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from voltforge.errors import VoltforgeError

RESERVE = 1 << 30
"""Bytes that are left to the rest of the machine."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had now: what the system has available, or what the control group leaves, if less.

    The group's files are those of cgroup v2; where there are none, only the system counts.
    """
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cache = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def count(asked: str, memory_per_job: int) -> tuple[int, str]:
    """The jobs to run at once and why so many; ``asked`` is a number, or empty for as many as the machine holds.

    Raises:
        VoltforgeError: ``asked`` is no number from 1 to 1024.
    """
    if asked:
        if not asked.isdecimal() or not 1 <= int(asked) <= 1024:
            hint = "jobs=N with N from 1 to 1024, or leave it out"
            raise VoltforgeError(f"jobs={asked} is no number of jobs", hint=hint)
        return int(asked), "as asked"
    by_memory = (free_memory() - RESERVE) // memory_per_job
    if by_memory < cores():
        return max(1, by_memory), f"by memory, {memory_per_job / 2**30:.1f} GiB a job"
    return cores(), "by cores"
