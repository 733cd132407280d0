"""Everything a person sees: steps, notes, live lines and progress bars, tables, and one red line for a problem."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from voltforge.errors import VoltforgeError
from voltforge.files import size

PLAIN_INTERVAL = 10.0
"""Seconds between two lines about the same work where there is no terminal to redraw."""

PLAIN_WIDTH = 120
"""Columns of a table where there is no terminal that says how wide it is."""

_known = sys.stdout.isatty() or "COLUMNS" in os.environ
screen = Console(highlight=False, soft_wrap=True, width=None if _known else PLAIN_WIDTH)
"""Where it is printed: standard output. rich honours NO_COLOR, FORCE_COLOR and TERM=dumb."""


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
    screen.print(sheet)


@contextlib.contextmanager
def download(label: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Progress of bytes: yields a function to be told how many more have come.

    A bar with size, speed and time left on a terminal; a line every few seconds elsewhere.
    """
    if screen.is_terminal:
        columns = (
            TextColumn("  {task.description}", markup=False), BarColumn(), DownloadColumn(),
            TransferSpeedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=screen, transient=True) as bars:
            bar = bars.add_task(label, total=total, completed=done)
            yield lambda count: bars.advance(bar, count)
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
def live(label: str) -> Iterator[Callable[[str], None]]:
    """One line about long work that changes as it goes on: yields a function to be told the newest text."""
    if screen.is_terminal:
        with screen.status(Text(label)) as status:
            yield lambda text: status.update(Text(f"{label}: {text}"))
        return
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_INTERVAL:
            said = time.monotonic()
            note(f"{label}: {text}")

    yield tell


def _say(*parts: str | tuple[str, str]) -> None:
    """One line of texts, or of texts and styles: as they are, for a path or a compiler's words may look like markup."""
    screen.print(Text.assemble(*parts))
