"""What is under way, as rows at the foot of the terminal: one for each download, each build, each stage."""

from __future__ import annotations

import atexit
import contextlib
import math
import re
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from voltforge.system.files import size

RATE = 5.0
"""How often a second the rows are drawn. What takes less time than it takes to draw it is not shown."""
GAP = 2
"""Columns between two cells."""
LEAST_TEXT = 10
"""Columns that a row's text needs to be worth showing."""
PARTS = ("label", "bar", "count", "text", "elapsed", "left", "speed", "jobs", "memory", "hits")
"""The cells of a row from left to right."""
GOING = ("hits", "speed", "memory", "jobs", "elapsed", "text", "bar", "left")
"""In which order they make room where the terminal is narrow: what a row is about and its count stay."""
STYLES = {"label": "bold", "count": "green", "left": "cyan"}
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\].*?(?:\x07|\x1b\\)|[@-_])")
"""What a program writes to colour its words (ECMA-48): sequences that would move the cursor under our feet."""


@dataclass(frozen=True)
class ProgressState:
    """How far something has come; whatever is not known is left out."""

    text: str = ""
    """What is being done right now: the object that is compiled."""
    done: int | None = None
    """Steps that are done."""
    total: int | None = None
    """Steps in all."""
    jobs: int | None = None
    """Jobs at work."""
    waiting: int | None = None
    """Jobs that wait for memory, or for their turn."""
    elsewhere: int | None = None
    """Jobs that other hosts do."""
    memory: int | None = None
    """Bytes in use."""
    limit: int | None = None
    """Bytes that may be used."""
    hits: int | None = None
    """Objects that came from a cache."""
    misses: int | None = None
    """Objects that a cache was asked for and did not have."""
    left: float | None = None
    """Seconds that it will take from now on."""

    @property
    def count(self) -> str:
        """``12/41``, or nothing where there is nothing to count."""
        return f"{self.done or 0}/{self.total}" if self.total else ""

    @property
    def load(self) -> str:
        """``3 jobs, 2 waiting, 5 elsewhere``."""
        named = [] if self.jobs is None else [f"{self.jobs} job{'' if self.jobs == 1 else 's'}"]
        others = {"waiting": self.waiting, "elsewhere": self.elsewhere}
        return ", ".join([*named, *(f"{count} {where}" for where, count in others.items() if count)])

    @property
    def room(self) -> str:
        """``5.2 of 12 GB``."""
        if self.memory is None or not self.limit:
            return "" if self.memory is None else size(self.memory)
        return f"{self.memory / 1e9:.1f} of {self.limit / 1e9:.{0 if self.limit >= 10**10 else 1}f} GB"

    @property
    def found(self) -> str:
        """``hits 17``, or ``hits 17 of 19`` where misses are counted."""
        if self.hits is None:
            return ""
        return f"hits {self.hits}" + (f" of {self.hits + self.misses}" if self.misses else "")

    @property
    def remaining(self) -> str:
        """``2:10 left``."""
        return "" if self.left is None else f"{clock(self.left)} left"

    def line(self, elapsed: float) -> str:
        """All of it in one line, for where there is no terminal; ``elapsed`` are the seconds since it began."""
        head = " ".join(part for part in (f"[{self.count}]" if self.count else "", self.text) if part)
        return ", ".join(
            part for part in (head, clock(elapsed), self.load, self.room, self.found, self.remaining) if part
        )


@dataclass
class Row:
    """One piece of work that is under way."""

    label: str
    usual: float | None = None
    """Seconds that it took the last time."""
    bytes: bool = False
    """Whether what it counts are bytes."""
    around: Row | None = None
    """The stage that it is a part of, which is not shown meanwhile."""
    work: ProgressState = ProgressState()
    start: float = field(default_factory=lambda: time.monotonic())
    before: int = 0
    """Bytes that were there at the start."""
    inside: int = 0
    """Rows that are shown instead of this one."""
    widths: dict[str, int] = field(default_factory=dict)
    """The widest that each cell has been: a cell that shrank and grew again would make the row jump."""

    def tell(self, news: str | ProgressState) -> None:
        """Take the newest state in: all of it, or a text."""
        self.work = news if isinstance(news, ProgressState) else ProgressState(news)

    def cells(self, now: float) -> dict[str, str]:
        """What the row says, by part; a bar stands as its share of 1."""
        work, elapsed = self.work, now - self.start
        speed = ((work.done or 0) - self.before) / elapsed if self.bytes and elapsed > 0 else 0.0
        left, share = work.left, (work.done or 0) / work.total if work.total else None
        if self.bytes and work.total and speed > 0:
            left = max(0, work.total - (work.done or 0)) / speed
        elif left is None and not work.total:
            left, share = self._by_history(now)
        said = {
            "label": self.label,
            "bar": "" if share is None else f"{min(1.0, share):.4f}",
            "count": _of_bytes(work.done or 0, work.total) if self.bytes else work.count,
            "text": work.text,
            "elapsed": clock(elapsed),
            "left": "" if left is None else f"{clock(left)} left",
            "speed": f"{size(speed)}/s" if speed > 0 else "",
            "jobs": work.load,
            "memory": work.room,
            "hits": work.found,
        }
        return {part: plain for part in PARTS if (plain := printable(said[part]))}

    def _by_history(self, now: float) -> tuple[float | None, float | None]:
        """Seconds left and share done, if it takes as long as the last time; nothing when it takes longer."""
        timed = self if self.usual else self.around
        if not timed or not timed.usual or now - timed.start >= timed.usual:
            return None, None
        return timed.usual - (now - timed.start), (now - timed.start) / timed.usual

    def drawn(self, width: int, now: float, label: int = 0) -> RenderableType:
        """The row in ``width`` columns, never more; the label takes at least ``label`` of them if nothing has to go."""
        cells = self.cells(now)
        bar = max(8, min(24, width // 6))
        for part, said in cells.items():
            needed = {"bar": bar, "text": LEAST_TEXT}.get(part, cell_len(said))
            self.widths[part] = max(self.widths.get(part, 0), needed)
        wanted = {part: self.widths[part] for part in cells}
        widths, aligned = fitting(wanted, width), fitting(wanted | {"label": max(label, wanted["label"])}, width)
        if widths.keys() == aligned.keys():
            widths = aligned
        grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for wide in widths.values():
            grid.add_column(width=wide, no_wrap=True, overflow="ellipsis")
        grid.add_row(*(
            ProgressBar(1.0, float(cells[part]), width=wide) if part == "bar"
            else Text(cells[part], style=STYLES.get(part, ""), no_wrap=True, overflow="ellipsis")
            for part, wide in widths.items()
        ))  # fmt: skip
        return grid


def fitting(widths: dict[str, int], width: int) -> dict[str, int]:
    """Which parts of a row to show in ``width`` columns, and how wide; ``widths`` says what each needs.

    The text gets what is left over. Where label and count alone do not fit, the label is cut short.
    """
    chosen = dict(widths)

    def needed() -> int:
        return sum(chosen.values()) + GAP * (len(chosen) - 1)

    for part in GOING:
        if needed() <= width:
            break
        chosen.pop(part, None)
    if needed() > width:
        rest = sum(wide + GAP for part, wide in chosen.items() if part != "label")
        chosen["label"] = max(1, width - rest)
    if "text" in chosen:
        chosen["text"] += width - needed()
    return chosen


class Board:
    """The rows of this process. They may be told from any thread; what is printed meanwhile stands above them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while anything is written to the terminal, for two who write at once would tear each other's lines."""
        self._rows: list[Row] = []
        self._live: Live | None = None
        self._stage: ContextVar[Row | None] = ContextVar("stage", default=None)
        atexit.register(self.close)

    @contextlib.contextmanager
    def row(
        self, screen: Console, label: str, *, done: int | None = None, total: int | None = None, bytes: bool = False
    ) -> Iterator[Row]:
        """A row on ``screen`` as long as the block lasts."""
        work = ProgressState(done=done, total=total)
        row = Row(label, bytes=bytes, around=self._stage.get(), work=work, before=done or 0)
        with self._shown(screen, row):
            yield row

    @contextlib.contextmanager
    def stage(self, screen: Console, name: str, usual: float | None) -> Iterator[None]:
        """A row for all that is done in the block, shown while no part of it has one of its own."""
        row = Row(name, usual)
        token = self._stage.set(row)
        try:
            with self._shown(screen, row):
                yield
        finally:
            self._stage.reset(token)

    def close(self) -> None:
        """Take all rows away and give the cursor back."""
        with self.lock:
            self._rows.clear()
            live, self._live = self._live, None
            if live:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    live.stop()

    @contextlib.contextmanager
    def _shown(self, screen: Console, row: Row) -> Iterator[None]:
        with self.lock:
            self._rows.append(row)
            if row.around:
                row.around.inside += 1
            if not self._live:
                self._live = Live(console=screen, get_renderable=self._drawn, auto_refresh=False, transient=True)
                self._live.start()
                threading.Thread(target=self._keep_drawing, args=(self._live,), daemon=True).start()
        try:
            yield
        finally:
            with self.lock:
                if row.around:
                    row.around.inside -= 1
                if row in self._rows:
                    self._rows.remove(row)
                    if not self._rows:
                        self.close()

    def _keep_drawing(self, live: Live) -> None:
        while True:
            time.sleep(1 / RATE)
            with self.lock:
                if live is not self._live:
                    return
                try:
                    live.refresh()
                except OSError:  # the terminal is gone
                    return

    def _drawn(self) -> RenderableType:
        shown = [row for row in self._rows if not row.inside]
        if not shown or not self._live:
            return ""
        width, now = self._live.console.width, time.monotonic()
        label = max(cell_len(printable(row.label)) for row in shown)
        return Group(*(row.drawn(width, now, label) for row in shown))


def printable(text: str) -> str:
    """The text in one line without what would move the cursor: a compiler's words may hold anything."""
    return "".join(one if one.isprintable() else " " for one in _ESCAPES.sub("", text))


def clock(seconds: float) -> str:
    """``1:05`` or ``2:01:05``; a time that is none is ``?``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _of_bytes(done: int, total: int | None) -> str:
    """``12.0/87.2 MB``: both in the unit of the whole."""
    if not total:
        return size(done)
    whole = size(total)
    number, unit = whole.split()
    share = done * float(number) / total
    return f"{share:.{len(number.partition('.')[2])}f}/{whole}" if unit != "B" else f"{done}/{whole}"
