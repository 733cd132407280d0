"""One run at a time per checkout: a second run waits and names the first."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO

from voltforge.system import console


class RunLock:
    """The right to change ``build/`` and ``wheelhouse/``, held until the process ends.

    It is an flock(2) on a file that is never removed, so a killed run releases it.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command
        """The command line of this run, shown to runs that wait for it."""
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Wait for the lock. Return True if another run held it, because that run may have done the work."""
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
            console.note(f"waiting for {_holder(file)}, which is running in this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
            return True
        return False


def _holder(file: IO[str]) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        file.seek(0)
        holder = json.load(file)
        return f"{holder['command']} (process {holder['pid']}, since {holder['since']})"
    return "another run"
