"""Count the attempts of the tests, for the table in docs/trust.md."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from pathlib import Path

from voltforge.system import files

HEAD = "| tried by the tests | times |\n|---|---|\n"


class Tally:
    """The number of successful attempts for each row of the table."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()

    def __call__(self, row: str, count: int = 1) -> None:
        """Add ``count`` to a row of the table."""
        self.rows[row] += count

    def keep(self, folder: Path) -> None:
        """Write the rows of this run to ``trust.counts``, and the table to ``trust.md``.

        The workers of a run add their counts; rows of an earlier run are replaced.
        """
        if not self.rows:
            return
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
        folder.mkdir(exist_ok=True)
        with (folder / "trust.lock").open("w") as other_worker:
            fcntl.flock(other_worker, fcntl.LOCK_EX)
            rows = files.read_json(folder / "trust.counts") or {}
            for row, count in self.rows.items():
                earlier = rows.get(row, {})
                others = earlier["count"] if earlier.get("run") == run else 0
                rows[row] = {"run": run, "count": others + count}
            files.write_json(folder / "trust.counts", rows)
            table = "".join(f"| {row} | {rows[row]['count']} |\n" for row in sorted(rows))
            files.write(folder / "trust.md", HEAD + table)
