"""The disk space that a file or folder takes, and when it was last changed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
"""Bytes of a block in st_blocks, on every file system (stat(2))."""


@dataclass(frozen=True)
class DiskUsage:
    """Sizes in bytes, and the time of the last change."""

    frees: int
    """Bytes that removal frees: folders, and files without other hard links."""
    shared: int
    """Bytes of files with other hard links, which removal does not free."""
    touched: float
    """The last change of any part, in seconds since 1970. It is st_ctime, which no program can set back."""


def disk_usage(path: Path) -> DiskUsage:
    """Return the disk usage of a file, or of a folder with all that is in it."""
    frees, touched = 0, 0.0
    shared: dict[tuple[int, int], int] = {}
    for found in _stats(path):
        if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1:
            frees += found.st_blocks * BLOCK
        else:
            shared[found.st_dev, found.st_ino] = found.st_blocks * BLOCK
        touched = max(touched, found.st_ctime)
    return DiskUsage(frees, sum(shared.values()), touched)


def _stats(path: Path) -> Iterator[os.stat_result]:
    inside = (f"{parent}/{name}" for parent, folders, names in os.walk(path) for name in (*folders, *names))
    for name in (str(path), *inside):
        with contextlib.suppress(OSError):  # it was removed meanwhile
            yield os.lstat(name)
