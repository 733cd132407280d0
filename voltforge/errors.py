"""Errors for people: what failed, where, and what to try. The command line prints them without a traceback."""

from __future__ import annotations

import re

REMEDIES = {
    "No space left on device|Disk quota exceeded": "make room on the disk; ./doit gc lists unneeded files",
    "Read-only file system": "look for a disk that is mounted read-only, or a program that writes to a read-only path",
}
"""Hints for failed writes, by a pattern of the system's error message (strerror(3))."""


class VoltforgeError(Exception):
    """A problem that a person can solve.

    Subclasses keep the data of the problem as attributes. The command line prints ``what`` in red and ``hint`` below
    it, without a traceback.
    """

    exit_status = 1
    """The exit status of the program."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        """The problem and its place, in one sentence."""
        self.hint = hint
        """The next thing to try; may be empty."""

    def __str__(self) -> str:
        return f"{self.what}\n  try: {self.hint}" if self.hint else self.what


def listed(problems: list[str]) -> str:
    """Return problems as an indented list, one a line, to append to a message."""
    return "".join(f"\n  - {problem}" for problem in problems)


def remedy(message: str | None, otherwise: str = "") -> str:
    """Return the hint for a system error in the output of a program; ``otherwise`` if it has none."""
    matches = (hint for pattern, hint in REMEDIES.items() if re.search(pattern, message or "", re.IGNORECASE))
    return next(matches, otherwise)
