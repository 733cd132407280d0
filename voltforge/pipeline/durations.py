"""The duration of each stage on this machine, from which the next run estimates the remaining time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voltforge.system import files

SHORTEST = 1.0
"""Seconds; a shorter stage needs no estimate."""
LONGEST = 10**7
"""Seconds, four months; a larger number in the file is no duration."""


@dataclass(frozen=True)
class Durations:
    """Seconds by the name of the stage, in a JSON file. Other content of the file is ignored.

    They are shown to people and decide nothing.
    """

    path: Path

    def usual(self, name: str) -> float | None:
        """Return the seconds of the last finished run of a stage, if they are known."""
        return self._read().get(name)

    def store(self, name: str, seconds: float) -> None:
        """Store the seconds of a stage. A file that cannot be written is skipped."""
        if SHORTEST <= seconds < LONGEST:
            with contextlib.suppress(OSError):
                files.write_json(self.path, {**self._read(), name: round(seconds, 1)})

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Store the duration of the block, unless it fails."""
        start = time.monotonic()
        yield
        self.store(name, time.monotonic() - start)

    def _read(self) -> dict[str, float]:
        content = files.read_json(self.path)
        if not isinstance(content, dict):
            return {}
        numbers = {name: value for name, value in content.items() if type(value) in (int, float)}
        return {name: float(value) for name, value in numbers.items() if SHORTEST <= value < LONGEST}
