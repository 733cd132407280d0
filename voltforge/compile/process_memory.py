"""Measure the memory of processes with all their children, from /proc."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Collection
from dataclasses import dataclass, field

PAGE_SIZE = resource.getpagesize()


@dataclass
class MemorySample:
    """The memory of process trees at one moment, in bytes."""

    trees: dict[int, int]
    """Resident bytes of each root and its descendants. A process that is below two roots belongs to the nearer one."""
    peaks: dict[int, int]
    """The largest peak of a single process in each tree."""
    run: int = 0
    """Resident bytes of the whole run: its main process and all descendants."""
    pids: Collection[int] = field(default_factory=tuple)
    """All processes of the machine."""


def sample_memory(roots: Collection[int], main: int) -> MemorySample:
    """Measure the trees below ``roots``, and the tree below ``main``, by process numbers."""
    parents, sizes = _processes()
    sample = MemorySample(dict.fromkeys(roots, 0), dict.fromkeys(roots, 0), pids=sizes.keys())
    for pid, size in sizes.items():
        ancestor, seen = pid, set()
        root = 0
        while ancestor and ancestor not in seen:  # a number that is reused during the walk can form a circle
            seen.add(ancestor)
            if not root and ancestor in sample.trees:
                root = ancestor
            if ancestor == main:
                sample.run += size
                break
            ancestor = parents.get(ancestor, 0)
        if root:
            sample.trees[root] += size
            sample.peaks[root] = max(sample.peaks[root], _peak(pid))
    return sample


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """Return the parent and the resident bytes of each process, by its number (proc_pid_stat(5)).

    It runs four times a second. With psutil's objects that takes a twentieth of a core.
    """
    parents, sizes = {}, {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()  # the name before it may hold any character
            parents[int(entry)], sizes[int(entry)] = int(fields[1]), int(fields[21]) * PAGE_SIZE
    return parents, sizes


def _peak(pid: int) -> int:
    """Return the peak resident bytes of a process (VmHWM in proc_pid_status(5)); 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
