"""Progress rows: complete, steady, and always below the printed lines."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tests.support.checkouts import ROOT
from tests.support.terminal import Terminal, seen
from voltforge.system.progress import GAP, PARTS, Board, ProgressRow, ProgressState, clock, fitting, printable

BUSY = ProgressState(
    "cache_kernels.cu.o", 12, 41, jobs=3, waiting=1, memory=5_200_000_000, limit=12_000_000_000, hits=17,
    misses=2, left=130,
)  # fmt: skip
WIDTHS = (200, 80, 40, 20)
ANY = st.text(st.characters(), max_size=60)
"""Half of a surrogate pair too, which is how Python reads a file name that is no text."""
PROGRAM = f"""
import threading, time
from voltforge.system import console
from voltforge.system.progress import ProgressState

def fetch():
    with console.download("torch.whl", 4_000_000) as advance:
        for number in range(20):
            advance(100_000)
            console.note(f"fetched {{number}}")
            time.sleep(0.05)
        time.sleep(1)

console.step("build vllm")
with console.progress("vllm") as tell:
    thread = threading.Thread(target=fetch)
    thread.start()
    for number in range(20):
        tell({BUSY!r})
        console.note(f"compiled {{number}}")
        time.sleep(0.05)
    thread.join()
console.step("kept it")
"""
NOTES = {f"  {word} {number}" for word in ("fetched", "compiled") for number in range(20)}


@pytest.fixture(scope="module", params=WIDTHS)
def watched(request):
    """All that a terminal of that width showed, moment after moment, and what was left on it."""
    moments, last = [], None
    for last in seen([sys.executable, "-c", PROGRAM], request.param, ROOT):
        moments.append(last.rows)
    assert last
    return request.param, moments, last


def shown(moments: list[list[str]], label: str) -> list[str]:
    """Every state of the row that begins so, without repeats."""
    return list(dict.fromkeys(row for rows in moments for row in rows if re.match(rf"{label}( |$)", row)))


def test_a_narrow_terminal_shows_every_label_and_count(watched):
    width, moments, _ = watched
    rows = shown(moments, "vllm")
    assert rows
    assert all("12/41" in row and len(row) <= width for row in rows)
    counts = [row for row in shown(moments, r"torch\.whl" if width >= 40 else r"torch\S*") if "/4.0 MB" in row]
    assert any("2.0/4.0 MB" in row for row in counts)


def test_downloads_and_builds_are_shown_together(watched):
    _, moments, _ = watched
    assert any(sum(row.startswith(("vllm ", "torch")) for row in rows) == 2 for rows in moments)


def test_wide_terminal_shows_every_cell(watched):
    width, moments, _ = watched
    if width != max(WIDTHS):
        return
    row = shown(moments, "vllm")[-1]
    said = ("12/41", "cache_kernels.cu.o", "2:10 left", "3 jobs, 1 waiting", "5.2 of 12 GB", "hits 17 of 19", "━━")
    assert [word for word in said if word not in row] == []


def test_output_between_rows_is_kept_and_no_row_remains(watched):
    _, _, last = watched
    assert sorted(last.transcript) == sorted({"* build vllm", "* kept it"} | NOTES)
    assert last.transcript[0] == "* build vllm"
    assert last.transcript[-1] == "* kept it"
    assert not last.screen.cursor.hidden


# --- calm ---


class Paper(io.StringIO):
    """A terminal in memory that remembers what it showed after each single write."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.terminal = Terminal(width)
        self.moments: list[list[str]] = []
        self.console = Console(file=self, force_terminal=True, width=width, height=16, soft_wrap=True, _environ={})

    def write(self, text: str) -> int:
        self.terminal.stream.feed(text.replace("\n", "\r\n").encode())
        self.moments.append(self.terminal.rows)
        return len(text)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 20
        while not any(text in row for row in self.terminal.rows):
            assert time.monotonic() < deadline, self.terminal.rows
            time.sleep(0.01)


def test_a_row_stays_visible_between_prints():
    paper, board = Paper(), Board()
    with board.row(paper.console, "vllm") as row:
        row.tell(BUSY)
        paper.wait_for("12/41")
        first = len(paper.moments)
        for number in range(30):
            with board.lock:
                paper.console.print(f"line {number}")
            time.sleep(0.02)
        during = paper.moments[first:]
    assert len(during) >= 30
    assert all(sum("12/41" in row for row in rows) == 1 for rows in during)
    assert [row for row in paper.terminal.transcript if row.startswith("line")] == [f"line {n}" for n in range(30)]
    assert "12/41" not in "".join(paper.terminal.transcript)


def test_a_cell_that_shrinks_does_not_make_the_row_jump():
    row = ProgressRow("vllm")
    places = set()
    for memory, said in ((990_000_000, "990.0 MB"), (9_900_000_000, "9.90 GB"), (1_000_000, "1.0 MB")):
        row.tell(ProgressState("a.o", 1, 2, memory=memory, hits=3))
        paper = Paper(100)
        paper.console.print(row.drawn(100, row.start))
        places.add(paper.terminal.rows[0].index(said))
    assert len(places) == 1


def test_rows_of_many_threads_are_updated_and_removed():
    paper, board = Paper(), Board()

    def work(number: int) -> None:
        for step in range(20):
            with board.row(paper.console, f"row {number}") as row, board.lock:
                row.tell(f"step {step}")
                paper.console.print(f"said {number} {step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = paper.terminal.transcript
    assert sorted(left) == sorted(f"said {number} {step}" for number in range(4) for step in range(20))


def test_failed_block_removes_its_row_and_restores_the_cursor():
    paper, board = Paper(), Board()

    def fails() -> None:
        with board.row(paper.console, "vllm"):
            paper.wait_for("vllm")
            assert paper.terminal.screen.cursor.hidden
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert paper.terminal.transcript == []
    assert not paper.terminal.screen.cursor.hidden


def test_more_rows_than_lines_do_not_damage_earlier_output():
    paper, board = Paper(), Board()
    paper.console.print("said before")
    with board.row(paper.console, "row 0"):
        rows = [board.row(paper.console, f"row {number}") for number in range(1, 30)]
        for row in rows:
            row.__enter__()
        paper.wait_for("...")
        paper.console.print("said meanwhile")
        for row in rows:
            row.__exit__(None, None, None)
    assert paper.terminal.transcript == ["said before", "said meanwhile"]


# --- what a row says ---


def test_stage_is_shown_while_no_task_in_it_has_a_row():
    paper, board = Paper(), Board()
    with board.stage(paper.console, "tree:vllm", None):
        paper.wait_for("tree:vllm")
        with board.row(paper.console, "patching"):
            paper.wait_for("patching")
            assert not any("tree:vllm" in row for row in paper.terminal.rows)
        paper.wait_for("tree:vllm")


def test_the_bar_of_a_stage_follows_its_last_duration():
    row = ProgressRow("check:vllm", usual=60.0, start=100.0)
    cells = row.cells(130.0)
    assert (cells["bar"], cells["elapsed"], cells["left"]) == ("0.5000", "0:30", "0:30 left")


def test_a_task_without_a_count_uses_the_duration_of_its_stage():
    row = ProgressRow("vllm-build", enclosing=ProgressRow("environment:vllm", usual=60.0, start=100.0), start=110.0)
    assert row.cells(130.0)["left"] == "0:30 left"
    row.tell(ProgressState("x.o", 1, 4))
    assert "left" not in row.cells(130.0)
    assert row.cells(130.0)["bar"] == "0.2500"


@pytest.mark.parametrize("usual", [None, 60.0])
def test_time_left_is_hidden_without_history_or_beyond_it(usual):
    cells = ProgressRow("check:vllm", usual=usual, start=100.0).cells(161.0)
    assert set(cells) == {"label", "elapsed"}


def test_a_download_shows_sizes_in_one_unit_speed_and_time_left():
    row = ProgressRow(
        "a.whl", bytes=True, work=ProgressState(done=30_000_000, total=87_200_000), before=10_000_000, start=0.0
    )
    cells = row.cells(10.0)
    assert (cells["count"], cells["speed"], cells["left"]) == ("30.0/87.2 MB", "2.0 MB/s", "0:28 left")
    assert ProgressRow("a.whl", bytes=True, work=ProgressState(done=999)).cells(1.0)["count"] == "999 B"


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (BUSY, "[12/41] cache_kernels.cu.o, 1:05, 3 jobs, 1 waiting, 5.2 of 12 GB, hits 17 of 19, 2:10 left"),
        (ProgressState("configuring", memory=2_110_000_000), "configuring, 1:05, 2.11 GB"),
        (ProgressState("x.o", jobs=1, hits=0, misses=0), "x.o, 1:05, 1 job, hits 0"),
        (ProgressState(), "1:05"),
    ],
)
def test_line_for_other_outputs_holds_the_same_state(work, line):
    assert work.line(65.0) == line


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (59.9, "0:59"), (3599, "59:59"), (7265, "2:01:05"), (-1, "0:00")]
)
def test_times_show_minutes_and_seconds_and_hours_if_needed(seconds, said):
    assert clock(seconds) == said


def test_escape_sequences_are_removed():
    assert printable("\x1b[1;31merror:\x1b[0m \x1b]0;title\x07a\tb\r\n\x07") == "error: a b   "


@given(ANY, ANY, st.integers(1, 120), st.booleans())
def test_row_takes_one_line_within_the_width(label, text, width, busy):
    row = ProgressRow(label or "x")
    row.tell(ProgressState(text, 12, 41, jobs=3, left=9) if busy else text)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={})
    console.print(row.drawn(width, row.start))
    [line, rest] = console.file.getvalue().split("\n")
    assert rest == ""
    assert cell_len(line) <= width


COUNTS = st.none() | st.integers(-(2**63), 2**63)


@given(st.builds(ProgressState, ANY, *[COUNTS] * 8, left=st.none() | st.floats()), st.booleans(), st.floats(0, 1e9))
def test_any_numbers_can_be_drawn(work, bytes, elapsed):
    row = ProgressRow("x", bytes=bytes, work=work, start=0.0, enclosing=ProgressRow("y", usual=elapsed / 2, start=0.0))
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None, _environ={})
    console.print(row.drawn(100, elapsed))
    assert "\n" not in console.file.getvalue().rstrip("\n")
    assert clock(elapsed) in work.line(elapsed)


@given(st.dictionaries(st.sampled_from(PARTS), st.integers(1, 60)), st.integers(1, 200))
def test_least_important_cells_are_dropped_first(widths, width):
    widths |= {"label": 10, "count": 5}
    widths = {part: widths[part] for part in PARTS if part in widths}
    chosen = fitting(widths, width)
    assert list(chosen)[:1] == ["label"]
    assert "count" in chosen
    taken = sum(chosen.values()) + GAP * (len(chosen) - 1)
    assert taken <= max(width, 1 + GAP + 5)
    if set(chosen) > {"label", "count"} or width >= 17:
        assert chosen["label"] == 10
    if sum(widths.values()) + GAP * (len(widths) - 1) <= width:
        assert set(chosen) == set(widths)
