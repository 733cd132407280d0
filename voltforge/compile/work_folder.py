"""The work folder of a build: what a repeated build can reuse of it, and what it cannot."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from voltforge.system import console, files

PLACE = "place.json"
"""A note in the work folder: the path at which the build saw its tree."""
SCHEDULED = "asking.json"
"""A note in the work folder: true if a scheduler starts the compilers of its build."""
UNSYNCED = "unsynced.json"
"""A note in the work folder: the boot of the machine in which a build began to write files that are not synced yet."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""The kernel's id of this boot (random(4))."""
TOLERANCE = 2.0
"""Seconds that a file may be newer than now: clocks are coarse, some file systems' by as much."""


def empty_if_stale(work: Path, tree: Path, *, scheduled: bool) -> None:
    """Create the work folder, and empty it if ninja or CMake would trust stale files in it.

    ``tree`` is the path at which the build sees its sources; ``scheduled`` is true if a scheduler starts its compilers.
    """
    work.mkdir(parents=True, exist_ok=True)
    if reason := stale_because(work, tree, scheduled=scheduled):
        console.note(f"starting from scratch: {reason}")
        files.remove(work)


def stale_because(work: Path, tree: Path, *, scheduled: bool) -> str:
    """Return the reason why the files in a work folder cannot be reused; empty if they can."""
    last_tree = files.read_json(work / PLACE) or str(tree)
    if files.read_json(work / UNSYNCED) not in (None, boot_id()):
        return "the machine went down during the last build: the newest files can be incomplete"
    if late := newer_than_clock(work):
        return f"{late.relative_to(work)} is newer than the clock: the clock was set back"
    if last_tree != str(tree):
        return f"the last build ran in {last_tree}"
    if (work / PLACE).exists() and (files.read_json(work / SCHEDULED) or False) != scheduled:
        return "the launcher of the compilers changed"  # CMake keeps the launcher of its first configuration
    return ""


def record(work: Path, tree: Path, *, scheduled: bool) -> None:
    """Write the notes that :func:`stale_because` reads before the next build."""
    files.write_json(work / PLACE, str(tree))
    files.write_json(work / SCHEDULED, scheduled)


@contextlib.contextmanager
def synced(work: Path) -> Iterator[None]:
    """Sync the files of the block to disk when it ends, however it ends except by a crash."""
    files.write_json(work / UNSYNCED, boot_id())
    try:
        yield
    finally:
        os.sync()
        (work / UNSYNCED).unlink(missing_ok=True)


def boot_id() -> str:
    """Return the id of this boot; empty if the kernel does not provide one."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def newer_than_clock(folder: Path) -> Path | None:
    """Return a file that is newer than now, by the clock of its file system.

    ninja compares times: an object written before the clock was set back is newer than any change and hides it.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        now = os.fstat(probe.fileno()).st_mtime + TOLERANCE
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_mtime > now:
                    return Path(entry)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return None


def setuptools_leftovers(source: Path) -> list[Path]:
    """Return the files that setuptools gathered for the last wheel.

    They are removed before a build: a file that was removed from the sources would return otherwise.

    If CMake builds in ``build`` itself, as PyTorch's does, ``build/lib`` holds its libraries and stays.
    """
    libraries = "build/lib.*" if (source / "build" / "CMakeCache.txt").exists() else "build/lib*"
    return [path for pattern in (libraries, "build/bdist*", "*.egg-info") for path in source.glob(pattern)]
