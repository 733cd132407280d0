"""One run at a time in a checkout: a second one waits, and says for whom."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO

from voltforge.system import console


class Turn:
    """The right to change what is under ``build/`` and ``wheelhouse/``; it ends with the process.

    It is an flock(2) on a file that stays, so that a killed run holds nobody up.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command
        """What this run is called by those who wait for it."""
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Wait until it is ours; gives whether another run had it first, so that much may be done by now."""
        if self._file:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+")
        try:
            waited = self._wait(file)
            file.truncate(0)
            since = time.strftime("%H:%M:%S")
            file.write(json.dumps({"pid": os.getpid(), "command": self.command, "since": since}))
            file.flush()
        except BaseException:
            file.close()
            raise
        self._file = file
        return waited

    def _wait(self, file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(f"waits for {_told(file)}, which is at work in this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
            return True
        return False


def _told(file: IO[str]) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        file.seek(0)
        other = json.load(file)
        return f"{other['command']} (process {other['pid']}, since {other['since']})"
    return "another run"
