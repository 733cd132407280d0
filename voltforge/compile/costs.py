"""Estimates of the time and memory that each object of a package takes to compile."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from voltforge.system import files

DEFAULT_SECONDS = 20.0
"""Estimate for an object that was never compiled here."""
MARGIN = 1.25
"""Factor on the measured memory: sources change, and sampling can miss a peak."""
MIN_MEMORY = 128 << 20
"""Smallest memory estimate of a compiler, in bytes."""
MIN_MEASURED_SECONDS = 0.5
"""Commands shorter than this were sampled too rarely, or failed: their memory is not recorded."""
MAX_VALUE = 1e15
"""Larger numbers in a history file, seconds or bytes, are invalid."""
CACHE_HIT_SHARE = 0.25
"""A command that takes less than this share of the recorded time is a cache hit, not a compile."""
PROBES = ("cmTC_", "CMakeTmp", "CMakeScratch")
"""Parts of the paths of CMake's own test programs (try_compile)."""


@dataclass(frozen=True)
class Estimate:
    """The time and memory that one object takes."""

    seconds: float
    memory: int
    """Peak of all processes of the command together, in bytes."""


@dataclass
class Estimates:
    """The estimates for the objects of one package, by the path that the compiler gets with ``-o``."""

    path: Path
    """The history file: JSON, ``{object: [seconds, bytes, seconds in the last build]}``. Invalid rows are ignored."""
    default_memory: int
    """Bytes for an object that was never compiled here: the recipe's ``memory_per_job``."""
    stated: Mapping[str, Estimate] = field(default_factory=dict)
    """The recipe's estimates, by glob patterns of object paths. A measurement replaces them."""

    def __post_init__(self) -> None:
        self._lock = Lock()
        rows = _read(self.path)
        self._measured = {name: Estimate(seconds, memory) for name, (seconds, memory, _) in rows.items()}
        self._last_seconds = {name: last for name, (_, _, last) in rows.items()}
        self._unsaved = False
        self._updated: set[str] = set()
        self.mean_seconds = sum(row.seconds for row in self._measured.values()) / max(1, len(self._measured))
        """Average seconds of an object in earlier builds; 0 before the first build."""

    def of(self, name: str) -> Estimate:
        """Return the estimate for an object: measured here, else stated by the recipe, else the default."""
        if measured := self._measured.get(name):
            return Estimate(measured.seconds, max(MIN_MEMORY, int(measured.memory * MARGIN)))
        stated = next((estimate for pattern, estimate in self.stated.items() if fnmatch(name, pattern)), None)
        return stated or Estimate(DEFAULT_SECONDS, self.default_memory)

    def measured(self) -> dict[str, Estimate]:
        """Return the last measurement of each object that was compiled here."""
        return dict(self._measured)

    def last_seconds(self) -> dict[str, float]:
        """Return the seconds of each object in the last build, cache hits included."""
        return dict(self._last_seconds)

    def record(self, name: str, measurement: Estimate) -> None:
        """Record the time and memory that an object took.

        A cache hit changes only the seconds of the last build. The memory falls by half at most, because a compile
        that failed early looks like a small one. CMake's test programs are ignored.
        """
        if any(probe in name for probe in PROBES):
            return
        sampled = measurement.seconds >= MIN_MEASURED_SECONDS and measurement.memory > 0
        with self._lock:
            self._last_seconds[name] = measurement.seconds
            self._updated.add(name)
            self._unsaved = True
            known = self._measured.get(name)
            if known is None or measurement.seconds >= known.seconds * CACHE_HIT_SHARE:
                least = (known.memory if known else self.default_memory) // 2
                memory = max(measurement.memory, least) if sampled else self.default_memory
                self._measured[name] = Estimate(measurement.seconds, memory)

    def save(self) -> None:
        """Write the new measurements to the history file. A failed write is ignored: it must not stop a build."""
        with self._lock:
            if not self._unsaved:
                return
            rows = {name: [*row] for name, row in _read(self.path).items()}  # another process may have added rows
            for name in self._updated:
                row = self._measured[name]
                rows[name] = [round(row.seconds, 3), row.memory, round(self._last_seconds[name], 3)]
            self._unsaved = False
        with contextlib.suppress(OSError):
            files.write_json(self.path, rows)


def _read(path: Path) -> dict[str, tuple[float, int, float]]:
    """Return the valid rows of a history file: seconds, bytes, and the seconds of the last build."""
    rows = files.read_json(path)
    valid = {}
    for name, row in rows.items() if isinstance(rows, dict) else ():
        if not isinstance(row, list) or len(row) != 3:
            continue
        if all(isinstance(cell, (int, float)) and 0 <= cell < MAX_VALUE for cell in row):
            valid[name] = float(row[0]), max(1, int(row[1])), float(row[2])
    return valid
