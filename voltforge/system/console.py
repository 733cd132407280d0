"""Print to the terminal and the log: steps, notes, progress, tables, and errors with their hints."""

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
"""Seconds between two progress lines for the same task if the output is not a terminal."""

PLAIN_WIDTH = 120
"""Columns of a table if the output is not a terminal."""

_terminal = sys.stdout.isatty()
screen = Console(
    highlight=False, soft_wrap=True, width=None if _terminal or "COLUMNS" in os.environ else PLAIN_WIDTH,
    force_interactive=None if _terminal else False,  # with FORCE_COLOR, rich would redraw a file
)  # fmt: skip
"""Standard output. rich honours NO_COLOR, FORCE_COLOR and TERM=dumb."""
_board = Board()
_log: Console | None = None


def log_to(path: Path, title: str) -> None:
    """Copy all later output to a file, with the time, and all progress texts, which a terminal overwrites.

    Only the first call in a process has an effect. A log that cannot be written is skipped.
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
            _write_log(Text(f"$ {title}"))


def step(text: str) -> None:
    """Print the start of a stage: ``* text``."""
    _print_and_log(("*", "bold green"), f" {text}")


def note(text: str) -> None:
    """Print a detail of the current stage."""
    _print_and_log("  ", (text, "dim"))


def warn(text: str) -> None:
    """Print a warning."""
    _print_and_log((f"! {text}", "yellow"))


def error(problem: VoltforgeError | str) -> None:
    """Print an error in red, and its hint below."""
    what, hint = (problem.what, problem.hint) if isinstance(problem, VoltforgeError) else (problem, "")
    _print_and_log((f"x {what}", "bold red"))
    if hint:
        _print_and_log(f"  try: {hint}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    sheet = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        sheet.add_column(Text(column), overflow="fold")
    for row in rows:
        sheet.add_row(*(Text(cell) for cell in row))
    with _board.lock:
        screen.print(sheet)
        _write_log(sheet)


@contextlib.contextmanager
def download(label: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a download; yield a function that adds a number of received bytes.

    A terminal shows a row with bar, size, speed and time left; other outputs get a line every few seconds.
    """
    if screen.is_interactive:
        with _board.row(screen, label, done=done, total=total, bytes=True) as row:
            yield lambda count: row.tell(replace(row.work, done=(row.work.done or 0) + count))
        return
    received, printed, start = done, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal received, printed
        received += count
        now = time.monotonic()
        if now - printed >= PLAIN_INTERVAL:
            printed = now
            of = f" of {size(total)}" if total else ""
            note(f"{label}: {size(received)}{of}, {size((received - done) / (now - start))}/s")

    yield advance


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[str | ProgressState], None]]:
    """Show the progress of a task; yield a function that takes its newest text or state.

    A terminal shows a row; other outputs get a line every few seconds.
    """
    with _board.row(screen, label) if screen.is_interactive else contextlib.nullcontext() as row:
        start = printed = time.monotonic()

        def tell(news: str | ProgressState) -> None:
            nonlocal printed
            now = time.monotonic()
            if isinstance(news, str):
                _write_log(Text(f"  {label}: {news}"))
            if row:
                row.tell(news)
            elif now - printed >= PLAIN_INTERVAL:
                printed = now
                text = news.line(now - start) if isinstance(news, ProgressState) else news
                _print(Text.assemble("  ", (f"{label}: {text}", "dim")))

        yield tell


@contextlib.contextmanager
def stage(name: str, usual: float | None = None) -> Iterator[None]:
    """Show a stage that takes about ``usual`` seconds as a row, while no task inside it has a row of its own."""
    if screen.is_interactive:
        with _board.stage(screen, name, usual):
            yield
    else:
        yield


def _print_and_log(*parts: str | tuple[str, str]) -> None:
    """Print a line of texts with styles. Markup is not interpreted: a path or compiler output may look like it."""
    line = Text.assemble(*parts)
    _write_log(line)
    _print(line)


def _print(line: Text) -> None:
    if not screen.is_interactive and os.environ.get("CI", "").lower() not in ("", "0", "no", "false"):
        line = _stamped(line)
    with _board.lock:
        screen.print(line)


def _write_log(output: Text | Table) -> None:
    """Append to the log, if it is open. A full disk is ignored."""
    if _log:
        with _board.lock, contextlib.suppress(OSError):
            _log.print(_stamped(output) if isinstance(output, Text) else output)


def _stamped(text: Text) -> Text:
    """Return the text with the time before each line."""
    stamp = time.strftime("%H:%M:%S ")
    return Text("\n").join(Text.assemble(stamp, line) for line in text.split("\n", allow_blank=True))
