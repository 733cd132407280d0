"""Printed lines: literal text, one red line for a problem, and sparse progress without a terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from voltforge.errors import VoltforgeError
from voltforge.system import console
from voltforge.system.progress import ProgressState

SAID = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")))
"""Printable text, brackets, backslashes and colons included."""
TRICKY = [r"\[bold]", "[/]", "[3/43] a.cu.o", "a.cu:warning: x", ":key:", "ends in a backslash\\", "[red]no[/red]"]
RED = re.compile(r"\x1b\[1;31m(.*?)\x1b\[0m", re.DOTALL)


class Paper:
    """The output, to a terminal or to a file."""

    def __init__(self, *, terminal: bool, width: int = 80) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, highlight=False, soft_wrap=True, force_terminal=terminal, width=width,
            color_system="standard" if terminal else None, _environ={},
        )  # fmt: skip

    @property
    def text(self) -> str:
        return self.file.getvalue()


@pytest.fixture
def paper(monkeypatch):
    one = Paper(terminal=False)
    monkeypatch.setattr(console, "screen", one.console)
    return one


@pytest.fixture
def terminal(monkeypatch):
    one = Paper(terminal=True)
    monkeypatch.setattr(console, "screen", one.console)
    return one


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("text", TRICKY)
def test_text_that_looks_like_markup_or_an_emoji_is_printed_unchanged(paper, text):
    console.step(text)
    console.note(text)
    console.warn(text)
    console.error(VoltforgeError(text, hint=text))
    assert paper.text == f"* {text}\n  {text}\n! {text}\nx {text}\n  try: {text}\n"


@given(SAID)
def test_printed_text_is_shown_unchanged(text):
    one = Paper(terminal=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "screen", one.console)
        console.note(text)
    assert one.text == f"  {text}\n"


def test_error_is_a_red_line_with_its_hint_below(terminal):
    console.error(VoltforgeError("a [b] failed", hint="try c"))
    assert RED.findall(terminal.text) == ["x a [b] failed"]
    assert terminal.text.endswith("\n  try: try c\n")


def test_long_line_is_not_wrapped(paper):
    console.error("a path " + "/long" * 100)
    assert paper.text == "x a path " + "/long" * 100 + "\n"


@pytest.mark.parametrize(
    ("variable", "coloured"),
    [({"NO_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_colours_follow_the_environment(tmp_path, variable, coloured):
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    words = [sys.executable, "-c", "from voltforge.system import console; console.error('no')"]
    done = subprocess.run(words, env=clean | {"TERM": "xterm"} | variable, capture_output=True, text=True, check=True)
    assert ("\x1b[" in done.stdout) == coloured
    assert "x no" in done.stdout


def test_a_table_truncates_no_cell(paper):
    console.table("", ("name", "[what]"), [("a", "[3/4] \\"), ("b", "long/" * 60)])
    assert "[what]" in paper.text
    assert "[3/4] \\" in paper.text
    assert paper.text.count("long/") + paper.text.count("ong/") >= 50
    assert max(map(len, paper.text.splitlines())) <= 80


def until(paper: Paper, text: str) -> None:
    """Wait until that is drawn, which is a few times a second."""
    deadline = time.monotonic() + 20
    while text not in paper.text:
        assert time.monotonic() < deadline, paper.text
        time.sleep(0.01)


def test_a_download_on_a_terminal_is_a_bar_that_is_removed_at_the_end(terminal):
    with console.download("file [x].whl", 1000) as advance:
        advance(500)
        until(terminal, "0.5/1.0 kB")
    assert "file [x].whl" in terminal.text
    assert terminal.text.endswith("\x1b[2K")


def test_download_without_terminal_prints_a_line_every_few_seconds(paper, clock):
    with console.download("file.whl", 4_000_000, done=1_000_000) as advance:
        for _ in range(30):
            clock[0] += 1
            advance(100_000)
    assert paper.text.splitlines() == [
        "  file.whl: 2.0 MB of 4.0 MB, 100.0 kB/s",
        "  file.whl: 3.0 MB of 4.0 MB, 100.0 kB/s",
        "  file.whl: 4.0 MB of 4.0 MB, 100.0 kB/s",
    ]


def test_a_download_of_unknown_size_shows_no_total(paper, clock):
    with console.download("file.whl", None) as advance:
        clock[0] += 20
        advance(1_000_000)
    assert paper.text == "  file.whl: 1.0 MB, 50.0 kB/s\n"


def test_quick_download_without_terminal_prints_nothing(paper, clock):
    with console.download("file.whl", 10) as advance:
        advance(10)
    assert paper.text == ""


def test_progress_without_terminal_prints_a_line_every_few_seconds(paper, clock):
    with console.progress("vllm") as tell:
        for number in range(1, 31):
            clock[0] += 1
            tell(f"[{number}/30] file.o")
    assert paper.text.splitlines() == [f"  vllm: [{number}/30] file.o" for number in (10, 20, 30)]


def test_progress_line_without_terminal_holds_the_whole_state(paper, clock):
    with console.progress("vllm") as tell:
        clock[0] += 65
        tell(ProgressState("a.cu.o", 12, 41, jobs=3, memory=5_200_000_000, limit=12_000_000_000, hits=17, left=130))
    assert paper.text == "  vllm: [12/41] a.cu.o, 1:05, 3 jobs, 5.2 of 12 GB, hits 17, 2:10 left\n"


def test_progress_on_a_terminal_shows_the_newest_text(terminal):
    with console.progress("vllm") as tell:
        tell("[1/2] [bold]file.o:key:")
        until(terminal, "[1/2] [bold]file.o:key:")
        tell(ProgressState("b.o", 2, 2))
        until(terminal, "2/2")


def test_a_stage_on_a_terminal_is_a_bar_with_time_left_from_the_last_time(terminal):
    with console.stage("check:vllm", usual=1000.0):
        until(terminal, "16:3")
    assert "check:vllm" in terminal.text


def test_stage_without_terminal_prints_nothing(paper):
    with console.stage("check:vllm", usual=1000.0):
        pass
    assert paper.text == ""


# --- the log ---


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_log", None)
    path = tmp_path / "logs" / "run.log"
    console.log_to(path, "doit [x]")
    return path


@pytest.mark.parametrize("kind", ["paper", "terminal"])
def test_the_log_holds_every_line_once_with_its_time_and_without_colours(request, kind, log, monkeypatch):
    request.getfixturevalue(kind)
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    console.step("build [x]")
    console.error(VoltforgeError("a\nb", hint="c"))
    with console.progress("uv") as tell:
        for text in ("Resolved", "Prepared", "Installed"):
            tell(text)
        tell(ProgressState("a.o", 1, 2))
    console.table("", ("name",), [("cell",)])
    lines = log.read_text().splitlines()
    assert [STAMPED.sub("", line) for line in lines if STAMPED.match(line)] == [
        "$ doit [x]", "* build [x]", "x a", "b", "  try: c", "  uv: Resolved", "  uv: Prepared", "  uv: Installed",
    ]  # fmt: skip
    assert any("cell" in line for line in lines)
    assert "\x1b" not in log.read_text()


def test_unwritable_log_is_skipped(paper, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_log", None)
    (tmp_path / "file").write_text("")
    console.log_to(tmp_path / "file" / "run.log", "doit")
    console.step("goes on")
    assert paper.text == "* goes on\n"


# --- in CI ---

STAMPED = re.compile(r"\d\d:\d\d:\d\d ")


def test_in_ci_every_line_starts_with_the_time(paper, clock, monkeypatch):
    monkeypatch.setenv("CI", "true")
    console.step("build vllm")
    console.note("one\n  - two")
    console.warn("three")
    console.error(VoltforgeError("four\n  | five", hint="six"))
    with console.progress("vllm") as tell:
        clock[0] += 20
        tell("[1/2] a.o")
    lines = paper.text.splitlines()
    assert all(STAMPED.match(line) for line in lines)
    said = [STAMPED.sub("", line, count=1) for line in lines]
    assert said == [
        "* build vllm", "  one", "  - two", "! three", "x four", "  | five", "  try: six", "  vllm: [1/2] a.o",
    ]  # fmt: skip


def test_times_are_local(paper, monkeypatch):
    monkeypatch.setenv("CI", "1")
    for zone in ("UTC", "Etc/GMT-7"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        console.step("x")
    monkeypatch.undo()
    time.tzset()
    first, second = (int(line[:2]) for line in paper.text.splitlines())
    assert (second - first) % 24 in (7, 8)


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_outside_ci_no_line_starts_with_the_time(paper, monkeypatch, value):
    monkeypatch.setenv("CI", value)
    console.step("build vllm")
    assert paper.text == "* build vllm\n"


def test_a_table_has_no_times(paper, monkeypatch):
    monkeypatch.setenv("CI", "true")
    console.table("", ("name",), [("a",)])
    assert not re.search(r"\d\d:\d\d", paper.text)


def test_a_step_on_a_terminal_has_no_time_in_ci(terminal, monkeypatch):
    monkeypatch.setenv("CI", "true")
    console.step("build vllm")
    assert "build vllm" in terminal.text
    assert not STAMPED.search(terminal.text)


def test_forced_colours_do_not_redraw_a_file(tmp_path):
    script = (
        "import time\nfrom voltforge.system import console\n"
        "with console.progress('x'): time.sleep(0.5)\nconsole.step('y')"
    )
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", done.stdout) == "* y\n"
    assert "\x1b[" in done.stdout
