"""The output of a build: its progress while it runs, and its first error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from voltforge.compile import cache_stats
from voltforge.compile.cache_stats import CacheStats
from voltforge.compile.scheduler import Scheduler
from voltforge.system.process import Usage
from voltforge.system.progress import ProgressState

ERROR = re.compile(
    r"\b(?:fatal )?error\b ?:|\bError:|\bfatal *:|undefined reference|cannot find -l"
    r"|No space left on device|Disk quota exceeded|Read-only file system"
)
"""The beginnings of error lines of gcc, nvcc, cicc, ptxas, ld and CMake, and the machine's own errors."""
EXCERPT = 12
"""Lines of the log around the first error that are printed."""


class BuildProgress:
    """The state of a running build, from its output (ninja's ``[n/m]``) and its resource usage."""

    def __init__(self, name: str, scheduler: Scheduler | None = None, log: Path | None = None) -> None:
        self.name = name
        self.scheduler = scheduler
        self.log = log
        """The log of ccache, if it is used."""
        self.stats = CacheStats()
        self.work = ProgressState("configuring")

    def see(self, line: str, usage: Usage) -> ProgressState:
        """Read a line of output and return the current state as text."""
        if match := re.match(r"\[(\d+)/(\d+)\] (.*\S)", line):
            target = match[3].split()[-1].rsplit("/", 1)[-1]
            self.work = ProgressState(target, int(match[1]), int(match[2]))
        if not self.scheduler:
            return replace(self.work, memory=usage.now)
        status, memory = self.scheduler.status, self.scheduler.available_memory
        commands = (self.work.total or 0) - (self.work.done or 0)
        unqueued = max(0, commands - status.running - status.waiting - status.remote)
        left = self.scheduler.remaining_seconds(self.name, unqueued) if self.work.total else None
        # Show a waiting job only if there is a free slot: then it waits for memory.
        waiting = status.waiting if status.running < self.scheduler.jobs else 0
        limit = memory.limit if memory else None
        if self.log and not line:
            self.stats = cache_stats.read(self.log, None)
        state = replace(
            self.work,
            memory=usage.now,
            limit=limit,
            jobs=status.running,
            waiting=waiting,
            elsewhere=status.remote,
            left=left,
        )
        return replace(state, hits=self.stats.hits, misses=self.stats.misses) if self.stats.hits else state


def first_error(log: Path) -> str:
    """Return the first error of a log and the lines around it, or the last lines if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(there is no log)"
    failed = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    error = next((number for number in range(failed, len(lines)) if ERROR.search(lines[number])), None)
    if error is None:
        return "\n".join(lines[-EXCERPT:])
    head = [lines[failed]] if failed and failed < error else []
    return "\n".join(line[:300] for line in [*head, *lines[error : error + EXCERPT]])
