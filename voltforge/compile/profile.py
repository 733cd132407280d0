"""Where a build's time went, from ninja's log: its longest objects, its critical path, what more cores would give."""

from __future__ import annotations

import bisect
import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from voltforge.compile.costs import Needs
from voltforge.errors import VoltforgeError
from voltforge.system import console, files, programs
from voltforge.system.process import ProgramFailed, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG = ".ninja_log"
VERSIONS = (5, 6, 7)
"""Of ninja's log, and all of one form: start, end, mtime, output, hash of the command (ninja, src/build_log.cc)."""
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of jobs that a schedule is computed for."""
SHOWN = 10
"""Objects in the table of the longest."""
CUDA, CPP, LINK, OTHER = ".cu", ".cpp", "link", "other"
COLOURS = {CUDA: "#a6cde8", CPP: "#ffd28a", LINK: "#b5d99c", OTHER: "#d9d9d9"}
"""Light enough for black words, and apart for eyes that tell red from green badly."""
CRITICAL = "#c2185b"
WIDTH, LEAST_LANE, ALL_LANES, MOST_LANE = 18.0, 0.16, 5.6, 2.7
"""Inches: of a chart; of a lane at least, of all lanes together, of a lane at most."""
WORDS = 7.5
"""Points of a bar's label."""
LETTER = 0.58
"""The width of a letter of DejaVu Sans, as a part of its height: of names of files, on average, and a little more."""
MOMENT = 50
"""Milliseconds by which two clocks that tell of one end may differ."""
MINUTES = 1200
"""Seconds from which on the time axis counts in minutes."""

_HEADER = re.compile(r"# ninja log v([0-9]{1,9})")
_LINE = re.compile(r"([0-9]{1,18})\t([0-9]{1,18})\t-?[0-9]+\t([^\t]+)\t([0-9a-f]{1,16})")
_NODE = re.compile(r'"([^"]+)" \[label="(.*)"(, shape=ellipse)?\]')
_ARROW = re.compile(r'"([^"]+)" -> "([^"]+)"(?: \[.*\])?')
_ADVICE = "remove the folder that this log is in and build the package again"


class LogError(VoltforgeError):
    """A log of ninja's that cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}", hint=_ADVICE)
        self.path = path


@dataclass(frozen=True)
class Job:
    """One command that ninja ran."""

    outputs: tuple[str, ...]
    start: int
    """Milliseconds since the run of ninja began, as are all times here."""
    end: int
    command: str
    """ninja's hash of it."""

    @property
    def took(self) -> int:
        """Milliseconds."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The source, or what is linked: ``csrc/sampler.cu``, ``_C.abi3.so``."""
        return re.sub(r"(^|.*/)CMakeFiles/[^/]+\.dir/|\.o(bj)?$", "", self.outputs[0])

    @property
    def label(self) -> str:
        """The shortest word for it."""
        name = Path(self.name).name
        return name if self.kind == LINK else name.split(".")[0] or name

    @property
    def kind(self) -> str:
        """What was done: :data:`CUDA` or :data:`CPP` compiled, :data:`LINK` or :data:`OTHER`."""
        path = Path(self.name)
        if path.name != Path(self.outputs[0]).name:  # it ends with .o
            return CUDA if path.suffix == ".cu" else CPP
        linked = re.search(r"\.(so|a)(\.[0-9.]+)?$", path.name) or (not path.suffix and "CMakeFiles" not in path.parts)
        return LINK if linked else OTHER


@dataclass(frozen=True)
class Plan:
    """Jobs, by number, and which of them wait for which."""

    took: tuple[int, ...]
    """Milliseconds of each."""
    needs: tuple[frozenset[int], ...]
    """The jobs that must have ended before each."""

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        """The jobs that wait for each."""
        after: dict[int, list[int]] = defaultdict(list)
        for job, before in enumerate(self.needs):
            for other in before:
                after[other].append(job)
        return tuple(tuple(after[job]) for job in range(len(self.took)))

    @cached_property
    def chains(self) -> tuple[int, ...]:
        """Milliseconds from each job's start to the end of all that waits for it, with as many cores as one likes."""
        longest = [0] * len(self.took)
        for job in reversed([*TopologicalSorter(dict(enumerate(self.needs))).static_order()]):
            longest[job] = self.took[job] + max((longest[other] for other in self.followers[job]), default=0)
        return tuple(longest)

    @cached_property
    def critical(self) -> tuple[int, ...]:
        """The critical path: the longest chain of jobs that wait for each other, in order."""
        path: list[int] = []
        choice: Iterable[int] = range(len(self.took))
        while choice := tuple(choice):
            path.append(max(choice, key=lambda job: (self.chains[job], -job)))
            choice = self.followers[path[-1]]
        return tuple(path)

    def makespan(self, count: int) -> int:
        """Milliseconds of a list schedule on ``count`` jobs: what is ready starts, the longest chain first."""
        waiting = [len(before) for before in self.needs]
        ready = [(-self.chains[job], job) for job, left in enumerate(waiting) if not left]
        heapq.heapify(ready)
        running: list[tuple[int, int]] = []
        now = 0
        while ready or running:
            while ready and len(running) < count:
                _, job = heapq.heappop(ready)
                heapq.heappush(running, (now + self.took[job], job))
            now, done = heapq.heappop(running)
            for job in self.followers[done]:
                waiting[job] -= 1
                if not waiting[job]:
                    heapq.heappush(ready, (-self.chains[job], job))
        return now


@dataclass(frozen=True)
class Build:
    """One run of ninja."""

    jobs: tuple[Job, ...]
    """By the time of their start."""
    missing: int
    """Outputs that the log knows of other runs only."""

    @property
    def wall(self) -> int:
        """Milliseconds from the first start to the last end."""
        return max(job.end for job in self.jobs) - min(job.start for job in self.jobs)

    @property
    def work(self) -> int:
        """The milliseconds of all jobs together."""
        return sum(job.took for job in self.jobs)

    @cached_property
    def lanes(self) -> tuple[int, ...]:
        """The row of each job in a chart: the first that is free at its start."""
        free: list[int] = []
        rows = []
        for job in self.jobs:
            row = next((row for row, end in enumerate(free) if end <= job.start), len(free))
            free[row : row + 1] = [job.end]
            rows.append(row)
        return tuple(rows)

    @property
    def width(self) -> int:
        """How many jobs ran at once at most."""
        return max(self.lanes) + 1

    def without_waiting(self, seconds: Mapping[str, float]) -> Build:
        """The same run without the time that commands stood at the gate, which ninja takes for theirs.

        ``seconds`` says what each output took once it was let through. That was when the gate heard of another's end,
        which ninja wrote down a moment later: those that follow each other do not overlap.
        """
        jobs, ends = [], sorted(job.end for job in self.jobs)
        for job in self.jobs:
            known = seconds.get(job.outputs[0])
            start = job.start if known is None else max(job.start, job.end - round(known * 1000))
            next_end = ends[bisect.bisect_left(ends, start)]
            follows = known is not None and next_end <= start + MOMENT and next_end < job.end
            jobs.append(replace(job, start=next_end if follows else start))
        return replace(self, jobs=tuple(sorted(jobs, key=lambda job: (job.start, job.end))))

    def plan(self, needs: Sequence[frozenset[int]]) -> Plan:
        """The same jobs, to be put in another order."""
        return Plan(tuple(job.took for job in self.jobs), tuple(needs))


def show(root: Path, scratch: Path, known: Mapping[str, Needs]) -> None:
    """Print a profile of the last build of each package in ``scratch``/work, and draw its chart in ``scratch``/profile.

    ``known`` is what was measured of each package's objects at the gate.

    Raises:
        VoltforgeError: there is no log, or it cannot be read.
    """
    logs = newest(scratch / "work")
    if not logs:
        raise VoltforgeError(f"no build has left a log under {scratch / 'work'}", hint="./doit wheels builds first")
    for package, path in logs.items():
        build = last_build(path).without_waiting(known[package].last() if package in known else {})
        console.step(f"profile {package}, from {path.relative_to(root)}")
        if build.missing:
            console.warn(f"no one run of ninja made all: {build.missing} outputs were made in others, and are not here")
        plan = build.plan(dependencies(path.parent, build.jobs))
        report(build, plan)
        for picture in (scratch / "profile" / f"{package}.svg", scratch / "profile" / f"{package}.png"):
            draw(package, build, plan, picture)
            console.note(f"kept {picture.relative_to(root)}")


def newest(work: Path) -> dict[str, Path]:
    """The log of each package that was written last, below the work folders ``<package>-<hash>``."""
    logs = [path for tree in work.glob("*-*/tree") for path in tree.rglob(LOG)]
    logs.sort(key=lambda path: path.stat().st_mtime_ns)
    last = {path.relative_to(work).parts[0].rpartition("-")[0]: path for path in logs}
    return dict(sorted(last.items()))


def last_build(path: Path) -> Build:
    """The last run of ninja that made all that the log knows; if none did, the one that made most.

    Raises:
        LogError: the log cannot be read, or no job has ended.
    """
    runs = read(path)
    if not runs:
        raise LogError(path, "no job has ended yet")
    counts = [sum(len(job.outputs) for job in jobs) for jobs in runs]
    jobs = max(zip(counts, range(len(runs)), runs, strict=True))[2]
    known = {output for jobs in runs for job in jobs for output in job.outputs}
    made = {output for job in jobs for output in job.outputs}
    return Build(tuple(sorted(jobs, key=lambda job: (job.start, job.end))), len(known - made))


def read(path: Path) -> list[list[Job]]:
    """The jobs of each run of ninja that a log tells of, in the order of their ends.

    ninja appends a line when a job ends, and does not say where a run begins: a new one has begun where the clock goes
    back, or where something is made again. A last line without its end is what a kill leaves; ninja passes it over too.

    Raises:
        LogError: a line is not as ninja writes it.
    """
    header, *lines = path.read_bytes().decode(errors="replace").split("\n")
    version = _HEADER.fullmatch(header)
    if not version or int(version[1]) not in VERSIONS:
        known = ", ".join(f"v{number}" for number in VERSIONS)
        raise LogError(path, f"its first line is {header[:40]!r}, not that of a log of ninja's ({known})")
    runs: list[list[Job]] = []
    made: set[str] = set()
    for number, line in enumerate(lines[:-1], 2):
        match = _LINE.fullmatch(line)
        if not match or int(match[1]) > int(match[2]):
            raise LogError(path, f"line {number} is not as ninja writes it: {line[:60]!r}")
        job = Job((match[3],), int(match[1]), int(match[2]), match[4])
        last = runs[-1][-1] if runs else None
        if not last or job.end < last.end or match[3] in made:
            runs.append([job])
            made = set()
        elif (job.start, job.end, job.command) == (last.start, last.end, last.command):  # one command, two outputs
            runs[-1][-1] = Job((*last.outputs, match[3]), job.start, job.end, job.command)
        else:
            runs[-1].append(job)
        made.add(match[3])
    return runs


def dependencies(folder: Path, jobs: Sequence[Job]) -> list[frozenset[int]]:
    """For each job the numbers of those that it waits for, as ninja's files in a build folder say.

    Where ninja cannot say it, no job waits for another, and that is told.
    """
    try:
        dot = run(
            [programs.find("ninja", "install the ninja package beside voltforge"), "-C", folder, "-t", "graph"]
        ).output
    except ProgramFailed as error:
        console.warn(f"what waits for what is not known, for ninja cannot say it: {error.what}")
        return [frozenset()] * len(jobs)
    return parse_graph(dot, jobs)


def parse_graph(dot: str, jobs: Sequence[Job]) -> list[frozenset[int]]:
    """The same, from the words of ``ninja -t graph``; phony targets, and jobs of other runs, are seen through."""
    numbers = {output: number for number, job in enumerate(jobs) for output in job.outputs}
    before: dict[str, set[str]] = defaultdict(set)
    nodes: dict[str, int] = {}
    for line in dot.splitlines():
        if arrow := _ARROW.fullmatch(line):
            before[arrow[2]].add(arrow[1])
        elif (node := _NODE.fullmatch(line)) and not node[3] and node[2] in numbers:
            nodes[node[1]] = numbers[node[2]]
    needs: list[set[int]] = [set() for _ in jobs]
    seen: dict[str, frozenset[int]] = {}
    for node_id in TopologicalSorter(before).static_order():
        below = frozenset().union(*(seen[other] for other in before.get(node_id, ())))
        if node_id in nodes:
            needs[nodes[node_id]] |= below
            below = frozenset([nodes[node_id]])
        seen[node_id] = below
    return [frozenset(some - {number}) for number, some in enumerate(needs)]


def report(build: Build, plan: Plan) -> None:
    """Print the tables of one build."""
    longest = sorted(build.jobs, key=lambda job: -job.took)[:SHOWN]
    rows = [(job.name, _seconds(job.took), f"{_share(job.took, build.work):.1%}") for job in longest]
    console.table(f"the longest of {len(build.jobs)}", ("", "took", "share of all"), rows)
    facts = [("wall time", _seconds(build.wall)), ("all jobs together", _seconds(build.work))]
    kinds = {kind: [job for job in build.jobs if job.kind == kind] for kind in COLOURS}
    parts = {f"the {len(longest)} longest": longest} | {f"{kind} ({len(some)})": some for kind, some in kinds.items()}
    for name, some in parts.items():
        if took := sum(job.took for job in some):
            facts.append((name, f"{_seconds(took)}, {_share(took, build.work):.1%}"))
    facts.append(("jobs busy, on average", f"{_share(build.work, build.wall):.2f} of {build.width}"))
    console.table("the build", ("", ""), facts)
    steps = [(build.jobs[job].name, _seconds(build.jobs[job].took)) for job in plan.critical]
    bound = _seconds(plan.chains[plan.critical[0]])
    console.table("the critical path: each waits for the one above", ("", "took"), [*steps, ("all of it", bound)])
    more = []
    for count in COUNTS:
        span = plan.makespan(count)
        more.append(
            (str(count), _seconds(span), f"{_share(build.work, span):.2f}", f"{_share(build.work, span * count):.0%}")
        )
    title = "computed: these jobs, the longest chain first, if each took as long as it did here"
    console.table(title, ("jobs", "wall time", "times faster than one", "busy"), more)
    console.note(f"no number of jobs goes below {bound}, which is the critical path")


def draw(package: str, build: Build, plan: Plan, path: Path) -> None:
    """Draw a Gantt chart as SVG or PNG, as the end of ``path`` says: a bar a job, a lane a job slot."""
    import matplotlib as mpl  # a second to import, and only here
    from matplotlib.figure import Figure

    lane = min(MOST_LANE, max(LEAST_LANE, ALL_LANES / build.width))
    # Words that stay words can be searched for; the salt and the missing date make equal charts equal bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": package, "font.size": 9}):
        figure = Figure(figsize=(WIDTH, lane * build.width + 1.8), layout="constrained", dpi=120)
        axes = figure.subplots()
        unit = 60_000 if build.wall >= MINUTES * 1000 else 1000
        axes.set_xlim(0, max(build.wall, 1) / unit)
        axes.set_ylim(build.width - 0.5, -0.5)
        axes.set_xlabel("minutes" if unit == 60_000 else "seconds")
        axes.set_ylabel("jobs at once")
        axes.set_yticks(range(0, build.width, max(1, build.width // 16)))
        axes.set_yticklabels([str(int(tick) + 1) for tick in axes.get_yticks()])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(_title(package, build, plan), loc="left", fontsize=12, pad=24)
        bars = _bars(axes, build, plan, unit)
        _legend(figure, build)
        figure.canvas.draw()  # lays out, so that the size of a bar on paper is known
        _label(figure, axes, build, plan, bars)
        with files.replacing(path) as file:
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


@dataclass(frozen=True)
class _Bar:
    """Where a job stands in a chart, in the axes' units."""

    left: float
    width: float
    row: int
    critical: bool


def _bars(axes: Axes, build: Build, plan: Plan, unit: int) -> list[_Bar]:
    from matplotlib.patches import Rectangle

    begin, on_path = min(job.start for job in build.jobs), set(plan.critical)
    bars = [
        _Bar((job.start - begin) / unit, job.took / unit, row, number in on_path)
        for number, (job, row) in enumerate(zip(build.jobs, build.lanes, strict=True))
    ]
    for job, bar in zip(build.jobs, bars, strict=True):
        edge, line = (CRITICAL, 2.5) if bar.critical else ("white", 0.8 if build.width <= 16 else 0.3)
        place = (bar.left, bar.row - 0.46)
        axes.add_patch(
            Rectangle(place, bar.width, 0.92, facecolor=COLOURS[job.kind], edgecolor=edge, linewidth=line,
                      zorder=3 if bar.critical else 2, clip_on=not bar.critical, joinstyle="miter")
        )  # fmt: skip
    return bars


def _legend(figure: Figure, build: Build) -> None:
    from matplotlib.patches import Patch

    totals = {kind: sum(job.took for job in build.jobs if job.kind == kind) for kind in COLOURS}
    there = [kind for kind in COLOURS if any(job.kind == kind for job in build.jobs)]
    keys = [Patch(facecolor=COLOURS[kind], label=f"{kind}, {_seconds(totals[kind])}") for kind in there]
    keys.append(Patch(facecolor="none", edgecolor=CRITICAL, linewidth=2, label="critical path"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def _label(figure: Figure, axes: Axes, build: Build, plan: Plan, bars: Sequence[_Bar]) -> None:
    """Write on each bar what fits, along it or up it; those of the critical path that have no room get theirs above."""
    scale = figure.dpi / 72 * WORDS
    for job, bar in zip(build.jobs, bars, strict=True):
        box = axes.transData.transform([(bar.left, bar.row - 0.46), (bar.left + bar.width, bar.row + 0.46)])
        width, height = (float(abs(high - low)) for low, high in zip(*box, strict=True))
        words, upright = _fitted(job, width / scale, height / scale)
        if words:
            axes.text(bar.left + bar.width / 2, bar.row, words, fontsize=WORDS, ha="center", va="center",
                      rotation=90 if upright else 0, zorder=4)  # fmt: skip
        elif bar.critical and len(plan.critical) <= SHOWN:
            middle = bar.left + bar.width / 2
            late = middle > axes.get_xlim()[1] / 2
            axes.annotate(f"{job.label}  {_seconds(job.took)}", (middle, bar.row - 0.46), xytext=(middle, 1.012),
                          textcoords=axes.get_xaxis_transform(), fontsize=WORDS, color=CRITICAL, ha="right" if late
                          else "left", va="bottom", annotation_clip=False, zorder=5)  # fmt: skip


def _fitted(job: Job, width: float, height: float) -> tuple[str, bool]:
    """What to write on a bar, and whether upright; its sides are given in heights of a letter."""
    two, one = f"{job.label}\n{_seconds(job.took)}", f"{job.label}  {_seconds(job.took)}"
    for words, upright in ((two, False), (one, False), (one, True), (job.label, False), (job.label, True)):
        along, across = (height, width) if upright else (width, height)
        lines = words.split("\n")
        if across >= 1.3 * len(lines) and along >= LETTER * max(map(len, lines)) + 0.6:
            return words, upright
    room = int((max(width, height) - 0.6) / LETTER)
    fits = min(width, height) >= 1.3 and room >= 9  # fewer letters say nothing
    return (f"{job.label[: room - 1]}…", height > width) if fits else ("", False)


def _title(package: str, build: Build, plan: Plan) -> str:
    bound = _seconds(plan.chains[plan.critical[0]])
    return (
        f"{package}: {len(build.jobs)} jobs, {_seconds(build.wall)}, {_share(build.work, build.wall):.2f} busy of "
        f"{build.width}; critical path {bound}"
    )


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
