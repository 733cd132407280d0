"""Everything a person sees: steps, notes, rows of what is under way, tables, and one red line for a problem."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from voltforge.errors import VoltforgeError
from voltforge.system.files import size
from voltforge.system.progress import Board, ProgressState

PLAIN_INTERVAL = 10.0
"""Seconds between two lines about the same work where there is no terminal to redraw."""

PLAIN_WIDTH = 120
"""Columns of a table where there is no terminal that says how wide it is."""

_terminal = sys.stdout.isatty()
screen = Console(
    highlight=False, soft_wrap=True, width=None if _terminal or "COLUMNS" in os.environ else PLAIN_WIDTH,
    force_interactive=None if _terminal else False,  # FORCE_COLOR makes no terminal of a file that can be redrawn
)  # fmt: skip
"""Where it is printed: standard output. rich honours NO_COLOR, FORCE_COLOR and TERM=dumb."""
_board = Board()
_log: Console | None = None


def log_to(path: Path, title: str) -> None:
    """Write all that is said from now on to a file too, with the time, and all that is told of work without a log.

    A line that is no longer on the terminal, or never was, is there. The first call in a process counts; where it
    cannot be written, nothing is.
    """
    global _log
    if _log is None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
            _log = Console(
                file=file, width=PLAIN_WIDTH, soft_wrap=True, highlight=False, force_terminal=False, color_system=None
            )
            _keep(Text(f"$ {title}"))


def step(text: str) -> None:
    """A stage begins: ``* text``."""
    _say(("*", "bold green"), f" {text}")


def note(text: str) -> None:
    """A detail of the stage at hand."""
    _say("  ", (text, "dim"))


def warn(text: str) -> None:
    """Something that the person should know, but that stops nothing."""
    _say((f"! {text}", "yellow"))


def error(problem: VoltforgeError | str) -> None:
    """What stopped the work, in red, and below it what to try."""
    what, hint = (problem.what, problem.hint) if isinstance(problem, VoltforgeError) else (problem, "")
    _say((f"x {what}", "bold red"))
    if hint:
        _say(f"  try: {hint}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under headings."""
    sheet = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        sheet.add_column(Text(column), overflow="fold")
    for row in rows:
        sheet.add_row(*(Text(cell) for cell in row))
    with _board.lock:
        screen.print(sheet)
        _keep(sheet)


@contextlib.contextmanager
def download(label: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """ProgressState of bytes: yields a function to be told how many more have come.

    A row with a bar, size, speed and time left on a terminal; a line every few seconds elsewhere.
    """
    if screen.is_interactive:
        with _board.row(screen, label, done=done, total=total, bytes=True) as row:
            yield lambda count: row.tell(replace(row.work, done=(row.work.done or 0) + count))
        return
    came, said, start = done, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal came, said
        came += count
        now = time.monotonic()
        if now - said >= PLAIN_INTERVAL:
            said = now
            of = f" of {size(total)}" if total else ""
            note(f"{label}: {size(came)}{of}, {size((came - done) / (now - start))}/s")

    yield advance


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[str | ProgressState], None]]:
    """Long work that changes as it goes on: yields a function to be told the newest text, or all that is known of it.

    A row on a terminal, a line every few seconds elsewhere.
    """
    with _board.row(screen, label) if screen.is_interactive else contextlib.nullcontext() as row:
        start = said = time.monotonic()

        def tell(news: str | ProgressState) -> None:
            nonlocal said
            now = time.monotonic()
            if isinstance(news, str):
                _keep(Text(f"  {label}: {news}"))
            if row:
                row.tell(news)
            elif now - said >= PLAIN_INTERVAL:
                said = now
                text = news.line(now - start) if isinstance(news, ProgressState) else news
                _print(Text.assemble("  ", (f"{label}: {text}", "dim")))

        yield tell


@contextlib.contextmanager
def stage(name: str, usual: float | None = None) -> Iterator[None]:
    """A stage that may take ``usual`` seconds: it has a row on a terminal while no part of it has one of its own."""
    if screen.is_interactive:
        with _board.stage(screen, name, usual):
            yield
    else:
        yield


def _say(*parts: str | tuple[str, str]) -> None:
    """One line of texts, or of texts and styles: as they are, for a path or a compiler's words may look like markup."""
    line = Text.assemble(*parts)
    _keep(line)
    _print(line)


def _print(line: Text) -> None:
    if not screen.is_interactive and os.environ.get("CI", "").lower() not in ("", "0", "no", "false"):
        line = _stamped(line)
    with _board.lock:
        screen.print(line)


def _keep(what: Text | Table) -> None:
    """Put it into the log, if there is one; a full disk does not stop what is said."""
    if _log:
        with _board.lock, contextlib.suppress(OSError):
            _log.print(_stamped(what) if isinstance(what, Text) else what)


def _stamped(text: Text) -> Text:
    """The text with the time before each of its lines."""
    stamp = time.strftime("%H:%M:%S ")
    return Text("\n").join(Text.assemble(stamp, line) for line in text.split("\n", allow_blank=True))
