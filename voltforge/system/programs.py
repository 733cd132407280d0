"""Find the programs that the pipeline runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from voltforge.errors import VoltforgeError


class ProgramMissing(VoltforgeError):  # noqa: N818 - it says what happened
    """A program that is not installed."""


def find(name: str, hint: str = "") -> str:
    """Return the path of a program: next to the Python interpreter, where wheels install scripts, or on PATH.

    Raises:
        ProgramMissing: the program is in neither place; ``hint`` is the error's hint.
    """
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        raise ProgramMissing(f"{name} is neither next to the Python interpreter nor on PATH", hint=hint)
    return path
