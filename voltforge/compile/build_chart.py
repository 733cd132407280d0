"""Draw a Gantt chart of a build: one bar for each command, one lane for each parallel job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from voltforge.compile.command_graph import CommandGraph
from voltforge.compile.ninja_log import CPP, CUDA, LINK, OTHER, Command, NinjaRun
from voltforge.system import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {CUDA: "#a6cde8", CPP: "#ffd28a", LINK: "#b5d99c", OTHER: "#d9d9d9"}
"""Light enough for black text, and distinct for readers with red-green colour blindness."""
CRITICAL = "#c2185b"
CHART_WIDTH, MIN_LANE, ALL_LANES, MAX_LANE = 18.0, 0.16, 5.6, 2.7
"""Inches: the width of a chart; the least height of a lane, the height of all lanes, the greatest height of a lane."""
FONT_SIZE = 7.5
"""Points of a bar's label."""
LETTER_WIDTH = 0.58
"""Average width of a letter in file names, as a share of the font size (DejaVu Sans), with a margin."""
MINUTES_FROM = 1200
"""Seconds from which the time axis shows minutes."""
MAX_CALLOUTS = 10
"""Longest critical path whose small bars get labels above the chart."""


@dataclass(frozen=True)
class _Bar:
    """The position of a command's bar, in the units of the axes."""

    left: float
    width: float
    lane: int
    critical: bool

    @property
    def top(self) -> float:
        return self.lane - 0.46

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def draw(package: str, build: NinjaRun, graph: CommandGraph, path: Path) -> None:
    """Draw the chart of a build to ``path``, as SVG or PNG by its suffix. Equal builds give equal SVG files."""
    import matplotlib as mpl  # the import takes a second
    from matplotlib.figure import Figure

    lane = min(MAX_LANE, max(MIN_LANE, ALL_LANES / build.width))
    # Text stays text, so that it can be searched. A fixed salt and no date make the file reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": package, "font.size": 9}):
        figure = Figure(figsize=(CHART_WIDTH, lane * build.width + 1.8), layout="constrained", dpi=120)
        axes = figure.subplots()
        unit = 60_000 if build.wall >= MINUTES_FROM * 1000 else 1000
        _set_up_axes(axes, build, unit)
        axes.set_title(_title(package, build, graph), loc="left", fontsize=12, pad=24)
        bars = _draw_bars(axes, build, graph, unit)
        _draw_legend(figure, build)
        figure.canvas.draw()  # computes the layout, which the labels need
        _draw_labels(figure, axes, build, bars)
        with files.replacing(path) as file:
            kind = path.suffix.removeprefix(".")
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _set_up_axes(axes: Axes, build: NinjaRun, unit: int) -> None:
    axes.set_xlim(0, max(build.wall, 1) / unit)
    axes.set_ylim(build.width - 0.5, -0.5)
    axes.set_xlabel("minutes" if unit == 60_000 else "seconds")
    axes.set_ylabel("parallel jobs")
    axes.set_yticks(range(0, build.width, max(1, build.width // 16)))
    axes.set_yticklabels([str(int(tick) + 1) for tick in axes.get_yticks()])
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Axes, build: NinjaRun, graph: CommandGraph, unit: int) -> list[_Bar]:
    from matplotlib.patches import Rectangle

    begin, critical = min(command.start for command in build.commands), set(graph.critical_path)
    bars = [
        _Bar((command.start - begin) / unit, command.duration / unit, lane, number in critical)
        for number, (command, lane) in enumerate(zip(build.commands, build.lanes, strict=True))
    ]
    for command, bar in zip(build.commands, bars, strict=True):
        edge, line = (CRITICAL, 2.5) if bar.critical else ("white", 0.8 if build.width <= 16 else 0.3)
        axes.add_patch(
            Rectangle((bar.left, bar.top), bar.width, 0.92, facecolor=COLOURS[command.kind], edgecolor=edge,
                      linewidth=line, zorder=3 if bar.critical else 2, clip_on=not bar.critical, joinstyle="miter")
        )  # fmt: skip
    return bars


def _draw_legend(figure: Figure, build: NinjaRun) -> None:
    from matplotlib.patches import Patch

    totals = {kind: sum(command.duration for command in build.commands if command.kind == kind) for kind in COLOURS}
    kinds = [kind for kind in COLOURS if any(command.kind == kind for command in build.commands)]
    patches = [Patch(facecolor=COLOURS[kind], label=f"{kind}, {seconds(totals[kind])}") for kind in kinds]
    patches.append(Patch(facecolor="none", edgecolor=CRITICAL, linewidth=2, label="critical path"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def _draw_labels(figure: Figure, axes: Axes, build: NinjaRun, bars: Sequence[_Bar]) -> None:
    """Label each bar that has room. Small bars of the critical path get their labels above the chart."""
    letter = figure.dpi / 72 * FONT_SIZE
    callouts = sum(bar.critical for bar in bars) <= MAX_CALLOUTS
    for command, bar in zip(build.commands, bars, strict=True):
        corners = axes.transData.transform([(bar.left, bar.top), (bar.left + bar.width, bar.top + 0.92)])
        width, height = (float(abs(high - low)) for low, high in zip(*corners, strict=True))
        text, upright = _fitting_label(command, width / letter, height / letter)
        if text:
            axes.text(bar.middle, bar.lane, text, fontsize=FONT_SIZE, ha="center", va="center",
                      rotation=90 if upright else 0, zorder=4)  # fmt: skip
        elif bar.critical and callouts:
            right_half = bar.middle > axes.get_xlim()[1] / 2
            axes.annotate(f"{command.label}  {seconds(command.duration)}", (bar.middle, bar.top),
                          xytext=(bar.middle, 1.012), textcoords=axes.get_xaxis_transform(), fontsize=FONT_SIZE,
                          color=CRITICAL, ha="right" if right_half else "left", va="bottom", annotation_clip=False,
                          zorder=5)  # fmt: skip


def _fitting_label(command: Command, width: float, height: float) -> tuple[str, bool]:
    """Return the longest label that fits on a bar, and true if it is upright.

    Args:
        command: the bar's command.
        width: of the bar, in font sizes.
        height: of the bar, in font sizes.
    """
    two_lines = f"{command.label}\n{seconds(command.duration)}"
    one_line = f"{command.label}  {seconds(command.duration)}"
    candidates = (two_lines, False), (one_line, False), (one_line, True), (command.label, False), (command.label, True)
    for text, upright in candidates:
        along, across = (height, width) if upright else (width, height)
        lines = text.split("\n")
        if across >= 1.3 * len(lines) and along >= LETTER_WIDTH * max(map(len, lines)) + 0.6:
            return text, upright
    letters = int((max(width, height) - 0.6) / LETTER_WIDTH)
    readable = min(width, height) >= 1.3 and letters >= 9  # a shorter name tells nothing
    return (f"{command.label[: letters - 1]}…", height > width) if readable else ("", False)


def _title(package: str, build: NinjaRun, graph: CommandGraph) -> str:
    parallel = f"{ratio(build.work, build.wall):.2f} of {build.width} jobs busy"
    return (
        f"{package}: {len(build.commands)} commands, {seconds(build.wall)}, {parallel}; "
        f"critical path {seconds(graph.critical_time)}"
    )


def seconds(milliseconds: int) -> str:
    """Format a time as seconds: ``12.3 s``."""
    return f"{milliseconds / 1000:.1f} s"


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``, or 0 if ``whole`` is 0."""
    return part / whole if whole else 0.0
