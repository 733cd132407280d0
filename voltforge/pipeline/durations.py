"""How long each stage took here when it last ran, so that the next time can say how long it will take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voltforge.system import files

LEAST = 1.0
"""Seconds below which nobody needs to be told how long something takes."""
MOST = 10**7
"""Seconds, four months: what claims more is no time that a stage took."""


@dataclass(frozen=True)
class History:
    """Seconds by the name of the stage, in a JSON file of which anything else is ignored.

    Nothing depends on it but what a person is shown.
    """

    path: Path

    def usual(self, name: str) -> float | None:
        """Seconds that the stage took when it last ran to its end, if that is known."""
        return self._kept().get(name)

    def keep(self, name: str, seconds: float) -> None:
        """Remember how long a stage took; where that cannot be written, it is not remembered."""
        if LEAST <= seconds < MOST:
            with contextlib.suppress(OSError):
                files.write_json(self.path, {**self._kept(), name: round(seconds, 1)})

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Remember how long the block takes, unless it fails."""
        start = time.monotonic()
        yield
        self.keep(name, time.monotonic() - start)

    def _kept(self) -> dict[str, float]:
        found = files.read_json(self.path)
        if not isinstance(found, dict):
            return {}
        numbers = {name: value for name, value in found.items() if type(value) in (int, float)}
        return {name: float(value) for name, value in numbers.items() if LEAST <= value < MOST}
