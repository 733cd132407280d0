"""Show where the time of a build went: its longest objects, its critical path, and the gain from more cores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from voltforge.compile.build_chart import draw, ratio, seconds
from voltforge.compile.command_graph import CommandGraph, graph_of
from voltforge.compile.costs import Estimates
from voltforge.compile.ninja_log import CPP, CUDA, LINK, OTHER, NinjaRun, last_run, newest_logs
from voltforge.errors import VoltforgeError
from voltforge.system import console

JOB_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of parallel jobs to compute a schedule for."""
LONGEST = 10
"""Rows in the table of the longest commands."""


def show(root: Path, scratch: Path, estimates: Mapping[str, Estimates]) -> None:
    """Print a profile of each package's last build, and draw its chart in ``scratch``/profile.

    Args:
        root: the checkout.
        scratch: its folder ``build``; the logs are in ``work`` in it.
        estimates: the scheduler's measurements, by package.

    Raises:
        VoltforgeError: there is no log, or it cannot be read.
    """
    logs = newest_logs(scratch / "work")
    if not logs:
        raise VoltforgeError(f"no build log under {scratch / 'work'}", hint="./doit wheels")
    for package, path in logs.items():
        measured = estimates[package].last_seconds() if package in estimates else {}
        build = last_run(path).without_queue_time(measured)
        console.step(f"profile {package}, from {path.relative_to(root)}")
        if build.missing:
            console.warn(f"the log spans several runs of ninja: {build.missing} outputs of other runs are left out")
        graph = graph_of(build, path.parent)
        print_report(build, graph)
        for chart in (scratch / "profile" / f"{package}.svg", scratch / "profile" / f"{package}.png"):
            draw(package, build, graph, chart)
            console.note(f"wrote {chart.relative_to(root)}")


def print_report(build: NinjaRun, graph: CommandGraph) -> None:
    """Print the tables of one build."""
    longest = sorted(build.commands, key=lambda command: -command.duration)[:LONGEST]
    rows = [
        (command.name, seconds(command.duration), f"{ratio(command.duration, build.work):.1%}") for command in longest
    ]
    console.table(f"the longest of {len(build.commands)} commands", ("", "time", "share of all"), rows)
    totals = [("wall time", seconds(build.wall)), ("all commands together", seconds(build.work))]
    groups = {f"the {len(longest)} longest": longest}
    for kind in (CUDA, CPP, LINK, OTHER):
        commands = [command for command in build.commands if command.kind == kind]
        groups[f"{kind} ({len(commands)})"] = commands
    for name, commands in groups.items():
        if total := sum(command.duration for command in commands):
            totals.append((name, f"{seconds(total)}, {ratio(total, build.work):.1%}"))
    totals.append(("average parallel commands", f"{ratio(build.work, build.wall):.2f} of {build.width}"))
    console.table("the build", ("", ""), totals)
    critical_time = seconds(graph.critical_time)
    path = [(build.commands[number].name, seconds(graph.durations[number])) for number in graph.critical_path]
    console.table("critical path: each depends on the one above", ("", "time"), [*path, ("total", critical_time)])
    schedules = []
    for jobs in JOB_COUNTS:
        span = graph.makespan(jobs)
        speedup, busy = ratio(build.work, span), ratio(build.work, span * jobs)
        schedules.append((str(jobs), seconds(span), f"{speedup:.2f}", f"{busy:.0%}"))
    title = "computed for more cores, if every command takes as long as here"
    console.table(title, ("jobs", "wall time", "speedup", "busy"), schedules)
    console.note(f"the critical path, {critical_time}, is the lower bound for any number of jobs")
