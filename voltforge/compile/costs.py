"""What each object of a package takes to compile, in time and memory: measured here, or stated by its recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from voltforge.system import files

SECONDS = 20.0
"""How long an object is taken to compile of which nothing is known."""
MARGIN = 1.25
"""How much more memory than the last time an object may take this time: sources change, and samples miss a peak."""
LEAST = 128 << 20
"""Bytes that any compiler is expected to hold."""
BRIEF = 0.5
"""Seconds below which nothing is learnt of an object's memory: it was not seen often enough, or failed."""
ABSURD = 1e15
"""Seconds or bytes that nothing takes."""
AT_ONCE = 0.25
"""The part of its time that an object has to take to have been compiled, and not found in a cache."""
PROBES = ("cmTC_", "CMakeTmp", "CMakeScratch")
"""In the names of what CMake compiles to see what a compiler can do."""


@dataclass(frozen=True)
class Need:
    """What one object takes."""

    seconds: float
    memory: int
    """Bytes, of all its processes together at their peak."""


@dataclass
class Needs:
    """What is known of a package's objects, by the path that their compiler is given with ``-o``."""

    path: Path
    """Where it is kept; what is there and makes no sense is passed over."""
    otherwise: int
    """Bytes that an object of which nothing is known is expected to hold at once: the recipe's ``memory_per_job``."""
    stated: Mapping[str, Need] = field(default_factory=dict)
    """What the recipe says of some objects, by patterns of their paths, until they were measured here."""

    def __post_init__(self) -> None:
        self._lock = Lock()
        rows = _read(self.path)
        self._learnt = {name: Need(seconds, memory) for name, (seconds, memory, _) in rows.items()}
        self._last = {name: last for name, (_, _, last) in rows.items()}
        self._new = False
        self._fresh: set[str] = set()
        self.mean = sum(need.seconds for need in self._learnt.values()) / max(1, len(self._learnt))
        """Seconds that an object took on average in earlier builds; 0 where there were none."""

    def of(self, name: str) -> Need:
        """What an object is expected to take."""
        if learnt := self._learnt.get(name):
            return Need(learnt.seconds, max(LEAST, int(learnt.memory * MARGIN)))
        found = next((need for pattern, need in self.stated.items() if fnmatch(name, pattern)), None)
        return found or Need(SECONDS, self.otherwise)

    def measured(self) -> dict[str, Need]:
        """What was measured of each object when it was last compiled here."""
        return dict(self._learnt)

    def last(self) -> dict[str, float]:
        """The seconds that each took in the last build, compiled or found in a cache."""
        return dict(self._last)

    def learn(self, name: str, need: Need) -> None:
        """Remember what an object took; of what came from a cache, that it did.

        Memory falls by half at most, for a compile that failed looks like one that needs little. What CMake compiles
        to see whether it can is passed over.
        """
        if any(probe in name for probe in PROBES):
            return
        seen = need.seconds >= BRIEF and need.memory > 0
        with self._lock:
            self._last[name] = need.seconds
            self._fresh.add(name)
            self._new = True
            known = self._learnt.get(name)
            if known is None or need.seconds >= known.seconds * AT_ONCE:
                least = (known.memory if known else self.otherwise) // 2
                self._learnt[name] = Need(need.seconds, max(need.memory, least) if seen else self.otherwise)

    def keep(self) -> None:
        """Write down what was learnt. A disk that does not take it stops nothing."""
        with self._lock:
            if not self._new:
                return
            rows = {name: [*row] for name, row in _read(self.path).items()}  # another process may have learnt as well
            for name in self._fresh:
                need = self._learnt[name]
                rows[name] = [round(need.seconds, 3), need.memory, round(self._last[name], 3)]
            self._new = False
        with contextlib.suppress(OSError):
            files.write_json(self.path, rows)


def _read(path: Path) -> dict[str, tuple[float, int, float]]:
    """Seconds, bytes and the seconds of the last build by name; a row that makes no sense is none."""
    rows = files.read_json(path)
    found = {}
    for name, row in rows.items() if isinstance(rows, dict) else ():
        numbers = isinstance(row, list) and all(isinstance(one, (int, float)) and 0 <= one < ABSURD for one in row)
        if numbers and len(row) == 3:
            found[name] = float(row[0]), max(1, int(row[1])), float(row[2])
    return found
