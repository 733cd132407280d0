"""Progress rows at the foot of the terminal: one for each download, build and stage.

A narrow terminal drops whole cells in a fixed order. ``rich.progress`` shortens all columns alike: at 80 columns it
shows neither the count nor the bar of a build.
"""

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
"""Redraws in a second. A task that ends before the next redraw is not shown."""
GAP = 2
"""Columns between two cells."""
LEAST_TEXT = 10
"""The least columns in which a row's text is shown."""
PARTS = ("label", "bar", "count", "text", "elapsed", "left", "speed", "jobs", "memory", "hits")
"""The cells of a row from left to right."""
DROP_ORDER = ("hits", "speed", "memory", "jobs", "elapsed", "text", "bar", "left")
"""The order in which cells are dropped on a narrow terminal. Label and count are never dropped."""
STYLES = {"label": "bold", "count": "green", "left": "cyan"}
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\].*?(?:\x07|\x1b\\)|[@-_])")
"""Escape sequences (ECMA-48), which programs print for colours and which can move the cursor."""


@dataclass(frozen=True)
class ProgressState:
    """The state of a task; unknown values are ``None``."""

    text: str = ""
    """The current step, such as the object that is compiled."""
    done: int | None = None
    """Finished steps, or bytes."""
    total: int | None = None
    """All steps, or bytes."""
    jobs: int | None = None
    """Running jobs."""
    waiting: int | None = None
    """Jobs that wait for memory or for a free slot."""
    elsewhere: int | None = None
    """Jobs that run on other hosts."""
    memory: int | None = None
    """Bytes in use."""
    limit: int | None = None
    """The limit of memory in bytes."""
    hits: int | None = None
    """Objects from a cache."""
    misses: int | None = None
    """Objects that the cache did not have."""
    left: float | None = None
    """Seconds left."""

    @property
    def count(self) -> str:
        """``12/41``, or an empty string if the total is unknown."""
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
        """Return the state in one line, for output that is not a terminal; ``elapsed`` is in seconds."""
        head = " ".join(part for part in (f"[{self.count}]" if self.count else "", self.text) if part)
        return ", ".join(
            part for part in (head, clock(elapsed), self.load, self.room, self.found, self.remaining) if part
        )


@dataclass
class ProgressRow:
    """A row for a running task."""

    label: str
    usual: float | None = None
    """Seconds that the task usually takes."""
    bytes: bool = False
    """True if the count is in bytes."""
    enclosing: ProgressRow | None = None
    """The stage that contains the task. Its row is hidden meanwhile."""
    work: ProgressState = ProgressState()
    start: float = field(default_factory=lambda: time.monotonic())
    before: int = 0
    """Bytes that were present at the start."""
    inside: int = 0
    """The number of rows that are shown instead of this one."""
    widths: dict[str, int] = field(default_factory=dict)
    """The greatest width of each cell so far. Cells do not shrink, so that the row does not jump."""

    def tell(self, news: str | ProgressState) -> None:
        """Set the newest state, or its text alone."""
        self.work = news if isinstance(news, ProgressState) else ProgressState(news)

    def cells(self, now: float) -> dict[str, str]:
        """Return the text of each cell by part; the text of a bar is its share of 1."""
        work, elapsed = self.work, now - self.start
        speed = ((work.done or 0) - self.before) / elapsed if self.bytes and elapsed > 0 else 0.0
        left, share = work.left, (work.done or 0) / work.total if work.total else None
        if self.bytes and work.total and speed > 0:
            left = max(0, work.total - (work.done or 0)) / speed
        elif left is None and not work.total:
            left, share = self._by_history(now)
        cells = {
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
        return {part: plain for part in PARTS if (plain := printable(cells[part]))}

    def _by_history(self, now: float) -> tuple[float | None, float | None]:
        """Return seconds left and share done, judged by the usual time; ``None`` for both once that has passed."""
        timed = self if self.usual else self.enclosing
        if not timed or not timed.usual or now - timed.start >= timed.usual:
            return None, None
        return timed.usual - (now - timed.start), (now - timed.start) / timed.usual

    def drawn(self, width: int, now: float, label: int = 0) -> RenderableType:
        """Draw the row in at most ``width`` columns, its label in at least ``label`` if no cell is dropped for that."""
        cells = self.cells(now)
        bar = max(8, min(24, width // 6))
        for part, text in cells.items():
            needed = {"bar": bar, "text": LEAST_TEXT}.get(part, cell_len(text))
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
    """Return the widths of the cells to show in ``width`` columns; ``widths`` holds the wanted ones.

    The text gets the spare columns. If label and count alone do not fit, the label is shortened.
    """
    chosen = dict(widths)

    def needed() -> int:
        return sum(chosen.values()) + GAP * (len(chosen) - 1)

    for part in DROP_ORDER:
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
    """The rows of this process. Any thread may update them; other output is printed above them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held for each write to the terminal, so that lines of two threads do not mix."""
        self._rows: list[ProgressRow] = []
        self._live: Live | None = None
        self._stage: ContextVar[ProgressRow | None] = ContextVar("stage", default=None)
        atexit.register(self.close)

    @contextlib.contextmanager
    def row(
        self, screen: Console, label: str, *, done: int | None = None, total: int | None = None, bytes: bool = False
    ) -> Iterator[ProgressRow]:
        """Show a row on ``screen`` while the block runs."""
        work = ProgressState(done=done, total=total)
        row = ProgressRow(label, bytes=bytes, enclosing=self._stage.get(), work=work, before=done or 0)
        with self._shown(screen, row):
            yield row

    @contextlib.contextmanager
    def stage(self, screen: Console, name: str, usual: float | None) -> Iterator[None]:
        """Show a row while the block runs and no task inside it has a row of its own."""
        row = ProgressRow(name, usual)
        token = self._stage.set(row)
        try:
            with self._shown(screen, row):
                yield
        finally:
            self._stage.reset(token)

    def close(self) -> None:
        """Remove all rows and restore the cursor."""
        with self.lock:
            self._rows.clear()
            live, self._live = self._live, None
            if live:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    live.stop()

    @contextlib.contextmanager
    def _shown(self, screen: Console, row: ProgressRow) -> Iterator[None]:
        with self.lock:
            self._rows.append(row)
            if row.enclosing:
                row.enclosing.inside += 1
            if not self._live:
                self._live = Live(console=screen, get_renderable=self._drawn, auto_refresh=False, transient=True)
                self._live.start()
                threading.Thread(target=self._keep_drawing, args=(self._live,), daemon=True).start()
        try:
            yield
        finally:
            with self.lock:
                if row.enclosing:
                    row.enclosing.inside -= 1
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
    """Return the text in one line without escape sequences and control characters."""
    return "".join(character if character.isprintable() else " " for character in _ESCAPES.sub("", text))


def clock(seconds: float) -> str:
    """Format seconds as ``1:05`` or ``2:01:05``; ``?`` if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _of_bytes(done: int, total: int | None) -> str:
    """Format a count of bytes and its total in the total's unit: ``12.0/87.2 MB``."""
    if not total:
        return size(done)
    whole = size(total)
    number, unit = whole.split()
    share = done * float(number) / total
    return f"{share:.{len(number.partition('.')[2])}f}/{whole}" if unit != "B" else f"{done}/{whole}"
