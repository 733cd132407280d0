"""What a person sees: the words as they are, one red line for a problem, and quiet progress where nobody watches."""

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

from voltforge import console
from voltforge.errors import VoltforgeError

SAID = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")))
"""Printable text, brackets, backslashes and colons included."""
TRICKY = [r"\[bold]", "[/]", "[3/43] a.cu.o", "a.cu:warning: x", ":key:", "ends in a backslash\\", "[red]no[/red]"]
RED = re.compile(r"\x1b\[1;31m(.*?)\x1b\[0m", re.DOTALL)


class Paper:
    """What was printed, to a terminal or to a file."""

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
def test_text_that_looks_like_markup_or_an_emoji_is_printed_as_it_is(paper, text):
    console.step(text)
    console.note(text)
    console.warn(text)
    console.error(VoltforgeError(text, hint=text))
    assert paper.text == f"* {text}\n  {text}\n! {text}\nx {text}\n  try: {text}\n"


@given(SAID)
def test_whatever_is_said_is_what_is_read(text):
    one = Paper(terminal=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "screen", one.console)
        console.note(text)
    assert one.text == f"  {text}\n"


def test_a_problem_is_one_red_line_and_the_hint_below_it(terminal):
    console.error(VoltforgeError("a [b] failed", hint="try c"))
    assert RED.findall(terminal.text) == ["x a [b] failed"]
    assert terminal.text.endswith("\n  try: try c\n")


def test_a_long_line_is_not_broken_for_it_may_be_a_path(paper):
    console.error("a path " + "/long" * 100)
    assert paper.text == "x a path " + "/long" * 100 + "\n"


@pytest.mark.parametrize(
    ("variable", "coloured"),
    [({"NO_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_colours_follow_the_environment(tmp_path, variable, coloured):
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    words = [sys.executable, "-c", "from voltforge import console; console.error('no')"]
    done = subprocess.run(words, env=clean | {"TERM": "xterm"} | variable, capture_output=True, text=True, check=True)
    assert ("\x1b[" in done.stdout) == coloured
    assert "x no" in done.stdout


def test_a_table_shows_every_cell_whole(paper):
    console.table("", ("name", "[what]"), [("a", "[3/4] \\"), ("b", "long/" * 60)])
    assert "[what]" in paper.text
    assert "[3/4] \\" in paper.text
    assert paper.text.count("long/") + paper.text.count("ong/") >= 50
    assert max(map(len, paper.text.splitlines())) <= 80


def test_a_download_on_a_terminal_is_a_bar_that_is_wiped_when_it_is_done(terminal):
    with console.download("file [x].whl", 1000) as advance:
        advance(500)
    assert "file [x].whl" in terminal.text
    assert "500/1,000 bytes" in terminal.text or "0.5/1.0 kB" in terminal.text
    assert terminal.text.endswith("\x1b[2K")


def test_a_download_elsewhere_is_a_line_now_and_then(paper, clock):
    with console.download("file.whl", 4_000_000, done=1_000_000) as advance:
        for _ in range(30):
            clock[0] += 1
            advance(100_000)
    assert paper.text.splitlines() == [
        "  file.whl: 2.0 MB of 4.0 MB, 100.0 kB/s",
        "  file.whl: 3.0 MB of 4.0 MB, 100.0 kB/s",
        "  file.whl: 4.0 MB of 4.0 MB, 100.0 kB/s",
    ]


def test_a_download_of_unknown_size_does_not_invent_one(paper, clock):
    with console.download("file.whl", None) as advance:
        clock[0] += 20
        advance(1_000_000)
    assert paper.text == "  file.whl: 1.0 MB, 50.0 kB/s\n"


def test_a_quick_download_says_nothing_where_nobody_watches(paper, clock):
    with console.download("file.whl", 10) as advance:
        advance(10)
    assert paper.text == ""


def test_long_work_elsewhere_is_a_line_now_and_then(paper, clock):
    with console.live("vllm") as tell:
        for number in range(1, 31):
            clock[0] += 1
            tell(f"[{number}/30] file.o")
    assert paper.text.splitlines() == [f"  vllm: [{number}/30] file.o" for number in (10, 20, 30)]


def test_long_work_on_a_terminal_shows_the_newest_text(terminal):
    with console.live("vllm") as tell:
        tell("[1/2] [bold]file.o:key:")
        time.sleep(0.3)  # the terminal is redrawn a few times a second
    assert "vllm: [1/2] [bold]file.o:key:" in terminal.text
