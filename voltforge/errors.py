"""What went wrong, where, and what to try: the errors that a person sees as one red line."""

from __future__ import annotations

import re

REMEDIES = {
    "No space left on device|Disk quota exceeded": "make room on the disk (./doit gc says what nothing needs any more)",
    "Read-only file system": "look for a disk that is mounted read-only, or for a program that writes where it may not",
}
"""What to do where the machine refuses to write, by its words (strerror(3))."""


class VoltforgeError(Exception):
    """A problem that a person can act on.

    Modules subclass it and keep the data of the problem as attributes; the command line prints
    ``what`` in red, ``hint`` below it, and no traceback.
    """

    exit_status = 1
    """What the program exits with."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        """What happened and where, in one sentence."""
        self.hint = hint
        """What to try next; may be empty."""

    def __str__(self) -> str:
        return f"{self.what}\n  try: {self.hint}" if self.hint else self.what


def listed(problems: list[str]) -> str:
    """Several problems as an indented list, one a line, so that all of them are seen at once."""
    return "".join(f"\n  - {problem}" for problem in problems)


def remedy(said: str | None, otherwise: str = "") -> str:
    """What to try where the machine itself refused, by what it or a program said; ``otherwise`` if it did not."""
    return next((what for words, what in REMEDIES.items() if re.search(words, said or "", re.IGNORECASE)), otherwise)
