"""Compute a build's critical path, and its time with any number of parallel jobs."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from voltforge.compile.ninja_log import NinjaRun, dependencies


@dataclass(frozen=True)
class CommandGraph:
    """The durations and dependencies of commands, by number."""

    durations: tuple[int, ...]
    """Milliseconds of each command."""
    dependencies: tuple[frozenset[int], ...]
    """The commands that must end before each command starts."""

    @cached_property
    def dependents(self) -> tuple[tuple[int, ...], ...]:
        """The commands that depend on each command."""
        after: dict[int, list[int]] = defaultdict(list)
        for command, before in enumerate(self.dependencies):
            for dependency in before:
                after[dependency].append(command)
        return tuple(tuple(after[command]) for command in range(len(self.durations)))

    @cached_property
    def chains(self) -> tuple[int, ...]:
        """Milliseconds of the longest chain of dependents from the start of each command."""
        chains = [0] * len(self.durations)
        for command in reversed([*TopologicalSorter(dict(enumerate(self.dependencies))).static_order()]):
            after = max((chains[dependent] for dependent in self.dependents[command]), default=0)
            chains[command] = self.durations[command] + after
        return tuple(chains)

    @cached_property
    def critical_path(self) -> tuple[int, ...]:
        """The longest chain of commands, in order: no number of cores makes the build shorter than it."""
        path: list[int] = []
        candidates: Iterable[int] = range(len(self.durations))
        while candidates := tuple(candidates):
            path.append(max(candidates, key=lambda command: (self.chains[command], -command)))
            candidates = self.dependents[path[-1]]
        return tuple(path)

    @property
    def critical_time(self) -> int:
        """Milliseconds of the critical path."""
        return self.chains[self.critical_path[0]]

    def makespan(self, jobs: int) -> int:
        """Return the milliseconds of a list schedule: of the ready commands the longest chain starts first."""
        blocked = [len(before) for before in self.dependencies]
        ready = [(-self.chains[command], command) for command, count in enumerate(blocked) if not count]
        heapq.heapify(ready)
        running: list[tuple[int, int]] = []
        now = 0
        while ready or running:
            while ready and len(running) < jobs:
                _, command = heapq.heappop(ready)
                heapq.heappush(running, (now + self.durations[command], command))
            now, ended = heapq.heappop(running)
            for command in self.dependents[ended]:
                blocked[command] -= 1
                if not blocked[command]:
                    heapq.heappush(ready, (-self.chains[command], command))
        return now


def graph_of(build: NinjaRun, folder: Path) -> CommandGraph:
    """Return the graph of a run's commands, with the dependencies in the ninja files of its build folder."""
    durations = tuple(command.duration for command in build.commands)
    return CommandGraph(durations, tuple(dependencies(folder, build.commands)))
