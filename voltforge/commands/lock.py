"""`./doit lock`: pin every requirement to today's versions, with hashes."""

from __future__ import annotations

from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.system import console


def write_locks(pipeline: Pipeline) -> None:
    """Write a new lock beside each ``.in`` file of the pipeline, the recipes and the tests.

    Raises:
        InstallError: the requirements of a file have no solution.
    """
    root = pipeline.root
    # By stem: requirements-dev.in is constrained by requirements.txt, which is written first.
    folders = root, root / "recipes" / "locks", root / "tests" / "packages"
    wanted = [path for folder in folders for path in sorted(folder.glob("*.in"), key=lambda path: path.stem)]
    for requirements in wanted:
        console.step(f"lock {requirements.relative_to(root)}")
        environment.lock(root, requirements, requirements.with_suffix(".txt"), pipeline.store.indexes)
