"""The tests that a run may leave out: two thirds of some kill points, and long tests whose inputs have not changed.

A kill point is a moment at which a test ends a run. Each day has another third of them.

`./doit test:all` leaves out none. VOLTFORGE_TEST_ROTATION repeats the rotation of another run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.checkouts import ROOT
from voltforge.system import files

ALL = bool(os.environ.get("VOLTFORGE_TEST_ALL"))
"""True if no test is left out."""
ROTATIONS = 3
"""The number of rotations. Each item belongs to one of them, and each day runs one."""
ROTATION = int(os.environ.setdefault("VOLTFORGE_TEST_ROTATION", str(int(time.time()) // 86400))) % ROTATIONS
"""The rotation of this run. The variable is set so that both workers of a run have the same."""
RESULTS = ROOT / "tests" / "records" / "results.json"
"""The digests of the inputs with which long tests have passed."""
Item = TypeVar("Item")


def rotated(items: Sequence[Item]) -> list[Item]:
    """Return the items of this rotation; all of them for `./doit test:all`."""
    return [item for number, item in enumerate(items) if ALL or number % ROTATIONS == ROTATION]


def header() -> str:
    """Return the line that pytest prints about the rotation."""
    if ALL:
        return "kill points: all"
    repeat = f"VOLTFORGE_TEST_ROTATION={ROTATION} repeats it, ./doit test:all runs all"
    chosen = f"rotation {ROTATION} of 0 to {ROTATIONS - 1} ({repeat})"
    return f"kill points: every one of SIGKILL; of SIGINT and power cuts, {chosen}"


def digest(patterns: Iterable[str], *more: str) -> str:
    """Return a digest of the files of the checkout that match ``patterns``, and of further inputs."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    return files.digest({"files": {str(path.relative_to(ROOT)): files.sha256(path) for path in paths}, "more": more})


def has_passed(name: str, inputs: str) -> bool:
    """Return True if the tests of ``name`` have passed with these inputs, and this run may leave them out."""
    return not ALL and (files.read_json(RESULTS) or {}).get(name) == inputs


def record(name: str, inputs: str, path: Path = RESULTS) -> None:
    """Record that the tests of ``name`` passed. Only `./doit test:all` records; a commit keeps the record."""
    if ALL:
        files.write_json(path, {**(files.read_json(path) or {}), name: inputs})
