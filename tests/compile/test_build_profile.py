"""The profile of a build: its tables, its chart, and ``./doit bench:profile``."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tests.commands.test_tasks import problem
from tests.support.command_checkout import CommandCheckout
from tests.support.ninja_logs import HEADER, line, run_ninja, write_log
from voltforge.compile import build_chart, build_profile, ninja_log
from voltforge.compile.command_graph import graph_of
from voltforge.errors import VoltforgeError


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder that the real ninja built in."""
    folder = tmp_path_factory.mktemp("built")
    run_ninja(folder)
    return folder


@pytest.fixture(scope="module")
def charts(tmp_path_factory, built) -> Path:
    """A folder with the charts of that build."""
    folder = tmp_path_factory.mktemp("charts")
    build = ninja_log.last_run(built / ".ninja_log")
    for name in ("a.png", "a.svg", "again.svg"):
        build_chart.draw("thing", build, graph_of(build, built), folder / name)
    return folder


def test_png_shows_every_kind_and_the_critical_path(charts):
    pixels = (imread(charts / "a.png")[:, :, :3] * 255).round().astype(int)

    def share_of(colour: str) -> float:
        wanted = [round(part * 255) for part in to_rgb(colour)]
        return float((abs(pixels - wanted).max(axis=2) <= 1).mean())

    count = pixels.shape[0] * pixels.shape[1]
    for kind in (ninja_log.CUDA, ninja_log.CPP, ninja_log.LINK):
        assert share_of(build_chart.COLOURS[kind]) * count > 100, kind
    assert share_of(build_chart.CRITICAL) * count > 100
    assert share_of(build_chart.COLOURS[ninja_log.CUDA]) > 0.2  # the CUDA object takes most of the time


def test_svg_has_its_text_as_text_and_is_reproducible(charts):
    drawing = (charts / "a.svg").read_text()
    assert all(text in drawing for text in ("thing: 5 commands", "long", "libt.so", "critical path"))
    assert drawing.count(f"stroke: {build_chart.CRITICAL}") == 3 + 1  # one, long, libt.so, and the legend
    assert drawing == (charts / "again.svg").read_text()


def test_tables_show_the_longest_commands_and_the_gain_from_more_cores(tmp_path, capsys):
    lines = [line("b.cpp.o", 0, 4000), line("CMakeFiles/t.dir/a.cu.o", 0, 6000), line("t.so", 6000, 7000)]
    folder = tmp_path / "work" / "t-0f" / "tree"
    folder.mkdir(parents=True)
    write_log(folder, *lines)
    (folder / "build.ninja").write_text(
        "rule r\n  command = false\nbuild t.so: r CMakeFiles/t.dir/a.cu.o b.cpp.o\n"
        "build CMakeFiles/t.dir/a.cu.o: r\nbuild b.cpp.o: r\n"
    )
    build_profile.show(tmp_path, tmp_path, {})
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    for row in (
        ["a.cu", "6.0 s", "54.5%"], ["wall time", "7.0 s"], ["all commands together", "11.0 s"],
        ["average parallel commands", "1.57 of 2"], ["total", "7.0 s"],
        ["1", "11.0 s", "1.00", "100%"], ["2", "7.0 s", "1.57", "79%"], ["64", "7.0 s", "1.57", "2%"],
    ):  # fmt: skip
        assert row in cells
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"t.svg", "t.png"}


def test_profile_without_a_build_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(VoltforgeError, match="no build log under") as caught:
        build_profile.show(tmp_path, tmp_path, {})
    assert "./doit wheels" in caught.value.hint


def test_doit_draws_the_chart_and_reports_errors_without_a_traceback(tmp_path, repository, built):
    checkout = CommandCheckout(tmp_path / "a checkout", repository)
    checkout.settle()
    assert "no build log under" in problem(checkout.doit("bench:profile"))
    folder = checkout.root / "build" / "work" / "thing-0123456789ab" / "tree" / "build" / "temp"
    folder.mkdir(parents=True)
    for name in (".ninja_log", "build.ninja"):
        (folder / name).write_bytes((built / name).read_bytes())
    done = checkout.doit("bench:profile")
    assert (done.returncode, done.stderr) == (0, "")
    assert (checkout.root / "build" / "profile" / "thing.svg").read_text().startswith("<?xml")
    (folder / ".ninja_log").write_text(HEADER + "not a line of a log\n")
    assert "line 2 is not a line of a ninja log" in problem(checkout.doit("bench:profile"))
