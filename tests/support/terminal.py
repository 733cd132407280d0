"""A real pseudo-terminal with a program on it, and its screen as pyte draws it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyte

from tests.support.checkouts import ROOT

HEIGHT = 16
NOT_OURS = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI")
"""Variables that would change the terminal."""


class Terminal:
    """The number of columns; lines that scroll off the top are kept."""

    def __init__(self, width: int, height: int = HEIGHT) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=10_000, ratio=0.5)
        self.child: subprocess.Popen[bytes] | None = None
        """The program that writes to the terminal."""
        self.stream = pyte.ByteStream(self.screen)

    @property
    def rows(self) -> list[str]:
        """Return the visible lines, without trailing blanks."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def transcript(self) -> list[str]:
        """Return all lines that were ever left on the screen, the oldest first, without empty ones."""
        top = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return [line for line in (*map(str.rstrip, top), *self.rows) if line]


def seen(
    argv: Sequence[str | Path], width: int, folder: Path, env: Mapping[str, str] | None = None, status: int = 0
) -> Iterator[Terminal]:
    """Run a program in ``folder`` on a terminal, and yield the terminal each time that it wrote more."""
    terminal = Terminal(width)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", terminal.screen.lines, width, 0, 0))
    clean = {key: value for key, value in (env or os.environ).items() if key not in NOT_OURS}
    words, environ = list(map(str, argv)), clean | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=folder, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        terminal.child = child
        with contextlib.suppress(OSError):  # EIO: the program has closed the other end
            while data := os.read(ours, 1 << 16):
                terminal.stream.feed(data)
                yield terminal
        os.close(ours)
    assert child.returncode == status, terminal.transcript
