"""Read ninja's log and dependency graph: the commands of a build, their times, and what each depends on."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.system import console, programs
from voltforge.system.process import ProgramFailed, run

LOG_NAME = ".ninja_log"
VERSIONS = (5, 6, 7)
"""Versions of the log with one format: start, end, mtime, output, hash of the command (ninja, src/build_log.cc)."""
CUDA, CPP, LINK, OTHER = ".cu", ".cpp", "link", "other"
"""The kinds of commands."""
CLOCK_TOLERANCE = 50
"""Milliseconds by which the clocks of ninja and the scheduler may differ for one event."""

_HEADER = re.compile(r"# ninja log v([0-9]{1,9})")
_LINE = re.compile(r"([0-9]{1,18})\t([0-9]{1,18})\t-?[0-9]+\t([^\t]+)\t([0-9a-f]{1,16})")
_NODE = re.compile(r'"([^"]+)" \[label="(.*)"(, shape=ellipse)?\]')
_ARROW = re.compile(r'"([^"]+)" -> "([^"]+)"(?: \[.*\])?')
_OBJECT_FOLDER = re.compile(r"(^|.*/)CMakeFiles/[^/]+\.dir/|\.o(bj)?$")


class NinjaLogError(VoltforgeError):
    """A log of ninja that cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}", hint="remove the folder of this log and build the package again")
        self.path = path


@dataclass(frozen=True)
class Command:
    """A command that ninja ran."""

    outputs: tuple[str, ...]
    start: int
    """Milliseconds since ninja started; so is ``end``."""
    end: int
    hash: str
    """ninja's hash of the command line, hexadecimal."""

    @property
    def duration(self) -> int:
        """Milliseconds."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The source or the linked file: ``csrc/sampler.cu``, ``_C.abi3.so``."""
        return _OBJECT_FOLDER.sub("", self.outputs[0])

    @property
    def label(self) -> str:
        """A short name for a chart: ``sampler``, ``_C.abi3.so``."""
        name = Path(self.name).name
        return name if self.kind == LINK else name.split(".")[0] or name

    @property
    def kind(self) -> str:
        """The kind by the output's name: a compile (:data:`CUDA`, :data:`CPP`), :data:`LINK` or :data:`OTHER`."""
        path = Path(self.name)
        if path.name != Path(self.outputs[0]).name:  # its suffix .o was removed
            return CUDA if path.suffix == ".cu" else CPP
        library = re.search(r"\.(so|a)(\.[0-9.]+)?$", path.name)
        program = not path.suffix and "CMakeFiles" not in path.parts
        return LINK if library or program else OTHER


@dataclass(frozen=True)
class NinjaRun:
    """The commands of one run of ninja."""

    commands: tuple[Command, ...]
    """Sorted by start."""
    missing: int
    """Outputs in the log that only other runs made."""

    @property
    def wall(self) -> int:
        """Milliseconds from the first start to the last end."""
        return max(command.end for command in self.commands) - min(command.start for command in self.commands)

    @property
    def work(self) -> int:
        """Milliseconds of all commands together."""
        return sum(command.duration for command in self.commands)

    @cached_property
    def lanes(self) -> tuple[int, ...]:
        """The lane of each command in a chart: the first that is free at its start."""
        ends: list[int] = []
        lanes = []
        for command in self.commands:
            lane = next((lane for lane, end in enumerate(ends) if end <= command.start), len(ends))
            ends[lane : lane + 1] = [command.end]
            lanes.append(lane)
        return tuple(lanes)

    @property
    def width(self) -> int:
        """The largest number of commands that ran at once."""
        return max(self.lanes) + 1

    def without_queue_time(self, seconds: Mapping[str, float]) -> NinjaRun:
        """Return this run without the time that commands waited for the scheduler, which ninja's log includes.

        A command starts when the scheduler sees another end. ninja records that end a moment later: such a command is
        moved to ninja's time, so that the two do not overlap.

        Args:
            seconds: the time from grant to end, by output.
        """
        commands, ends = [], sorted(command.end for command in self.commands)
        for command in self.commands:
            measured = seconds.get(command.outputs[0])
            start = command.start
            if measured is not None:
                start = max(start, command.end - round(measured * 1000))
                next_end = ends[bisect.bisect_left(ends, start)]
                if next_end <= start + CLOCK_TOLERANCE and next_end < command.end:
                    start = next_end
            commands.append(replace(command, start=start))
        return replace(self, commands=_by_start(commands))


def newest_logs(work: Path) -> dict[str, Path]:
    """Return the newest log of each package, from the work folders ``<package>-<hash>``."""
    logs = [path for tree in work.glob("*-*/tree") for path in tree.rglob(LOG_NAME)]
    logs.sort(key=lambda path: path.stat().st_mtime_ns)
    newest = {path.relative_to(work).parts[0].rpartition("-")[0]: path for path in logs}
    return dict(sorted(newest.items()))


def last_run(path: Path) -> NinjaRun:
    """Return the last run of ninja that made every output in the log, or else the run that made most.

    Raises:
        NinjaLogError: the log cannot be read, or no command has ended.
    """
    runs = read_log(path)
    if not runs:
        raise NinjaLogError(path, "no command has ended yet")
    counts = [sum(len(command.outputs) for command in commands) for commands in runs]
    commands = max(zip(counts, range(len(runs)), runs, strict=True))[2]
    every = {output for commands in runs for command in commands for output in command.outputs}
    made = {output for command in commands for output in command.outputs}
    return NinjaRun(_by_start(commands), len(every - made))


def read_log(path: Path) -> list[list[Command]]:
    """Return the commands of each run of ninja in a log, in the order of their ends.

    ninja appends a line when a command ends, without a mark between runs. A new run begins where the time goes back, or
    where an output is made again. An incomplete last line, left by a killed ninja, is ignored, as ninja does.

    Raises:
        NinjaLogError: a line has another format.
    """
    header, *lines = path.read_bytes().decode(errors="replace").split("\n")
    version = _HEADER.fullmatch(header)
    if not version or int(version[1]) not in VERSIONS:
        known = ", ".join(f"v{number}" for number in VERSIONS)
        raise NinjaLogError(path, f"the first line is {header[:40]!r}, not the header of a ninja log ({known})")
    runs: list[list[Command]] = []
    made: set[str] = set()
    for number, line in enumerate(lines[:-1], 2):
        match = _LINE.fullmatch(line)
        if not match or int(match[1]) > int(match[2]):
            raise NinjaLogError(path, f"line {number} is not a line of a ninja log: {line[:60]!r}")
        command = Command((match[3],), int(match[1]), int(match[2]), match[4])
        last = runs[-1][-1] if runs else None
        if not last or command.end < last.end or match[3] in made:
            runs.append([command])
            made = set()
        elif (command.start, command.end, command.hash) == (last.start, last.end, last.hash):
            runs[-1][-1] = replace(last, outputs=(*last.outputs, match[3]))  # a command with several outputs
        else:
            runs[-1].append(command)
        made.add(match[3])
    return runs


def dependencies(folder: Path, commands: Sequence[Command]) -> list[frozenset[int]]:
    """Return for each command the numbers of those that it depends on, from the ninja files in a build folder.

    If ninja fails, print a warning and return no dependencies.
    """
    try:
        ninja = programs.find("ninja", "install the ninja package beside voltforge")
        dot = run([ninja, "-C", folder, "-t", "graph"]).output
    except ProgramFailed as error:
        console.warn(f"no dependency graph: `ninja -t graph` failed: {error.what}")
        return [frozenset()] * len(commands)
    return parse_graph(dot, commands)


def parse_graph(dot: str, commands: Sequence[Command]) -> list[frozenset[int]]:
    """Parse the output of ``ninja -t graph`` to the result of :func:`dependencies`.

    A dependency on a phony target, or on a command that is not in ``commands``, counts as one on what that depends on.
    """
    numbers = {output: number for number, command in enumerate(commands) for output in command.outputs}
    inputs: dict[str, set[str]] = defaultdict(set)
    nodes: dict[str, int] = {}
    for line in dot.splitlines():
        if arrow := _ARROW.fullmatch(line):
            inputs[arrow[2]].add(arrow[1])
        elif (node := _NODE.fullmatch(line)) and not node[3] and node[2] in numbers:
            nodes[node[1]] = numbers[node[2]]
    found: list[set[int]] = [set() for _ in commands]
    reached: dict[str, frozenset[int]] = {}
    for node_id in TopologicalSorter(inputs).static_order():
        below = frozenset().union(*(reached[name] for name in inputs.get(node_id, ())))
        if node_id in nodes:
            found[nodes[node_id]] |= below
            below = frozenset([nodes[node_id]])
        reached[node_id] = below
    return [frozenset(below - {number}) for number, below in enumerate(found)]


def _by_start(commands: Sequence[Command]) -> tuple[Command, ...]:
    return tuple(sorted(commands, key=lambda command: (command.start, command.end)))
