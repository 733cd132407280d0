"""Count the attempts of the tests, for the table in docs/trust.md."""

from __future__ import annotations

import fcntl
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
        """Replace the rows in ``trust.json`` with those of this session, and write the table to ``trust.md``."""
        if not self.rows:
            return
        folder.mkdir(exist_ok=True)
        with (folder / "trust.lock").open("w") as other_worker:
            fcntl.flock(other_worker, fcntl.LOCK_EX)
            rows = {**(files.read_json(folder / "trust.json") or {}), **self.rows}
            files.write_json(folder / "trust.json", rows)
            files.write(folder / "trust.md", HEAD + "".join(f"| {row} | {rows[row]} |\n" for row in sorted(rows)))
