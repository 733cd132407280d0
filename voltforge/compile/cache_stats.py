"""Count the hits and misses of a build in the object cache, from ccache's log."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from voltforge.compile.costs import Estimates

_HITS = re.compile(r"(direct|preprocessed)_cache_hit")


@dataclass(frozen=True)
class CacheStats:
    """The use of the cache in one build."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    """Hits from the server that this disk did not have."""
    saved: float = 0.0
    """Seconds of compiling that the hits saved, by the last compilation of the same objects here."""

    def __str__(self) -> str:
        server = f", {self.shared} of them from the server" if self.shared else ""
        seconds = f", {self.saved:.0f} s of compiling saved" if self.saved else ""
        return f"objects from the cache: {self.hits} of {self.hits + self.misses}{server}{seconds}"


def read(log: Path, estimates: Estimates | None) -> CacheStats:
    """Parse ccache's log of one build: for each source a line ``# path``, then the result.

    Trial compilations of CMake are skipped: some use a folder with a random name.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return CacheStats()
    counts: Counter[str] = Counter()
    saved, source, measured = 0.0, "", estimates.measured() if estimates else {}
    seconds = {Path(name).name: estimate.seconds for name, estimate in measured.items()}
    for line in lines:
        if line.startswith("# "):
            source = "" if "CMake" in line else Path(line[2:]).name
        elif not source:
            continue
        elif _HITS.fullmatch(line):
            counts["hits"] += 1
            saved += seconds.get(f"{source}.o", 0.0)
        else:
            counts[line] += 1
    return CacheStats(counts["hits"], counts["cache_miss"], counts["remote_storage_hit"], round(saved, 1))
