"""A source tree: an archive unpacked and a patch series applied to it, complete or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.sources.archive import unpack
from voltforge.sources.patches import Patch, apply
from voltforge.system import files
from voltforge.system.records import CheckoutPath


@dataclass(frozen=True)
class Tree:
    """An unpacked and patched source tree."""

    path: CheckoutPath
    epoch: int
    """The newest time of the archive's members in seconds since 1970: the build's SOURCE_DATE_EPOCH."""


def create(sdist: Path, patches: Sequence[Patch], path: Path) -> Tree:
    """Unpack ``sdist`` and apply ``patches``; ``path`` appears when both are complete.

    Raises:
        ArchiveError: the archive is broken or unsafe.
        PatchError: a patch does not apply.
    """
    with files.replacing_folder(path) as beside:
        epoch = unpack(sdist, beside)
        for patch in patches:
            apply(patch, beside)
    return Tree(path, epoch)


def sync(tree: Path, folder: Path) -> None:
    """Make the sources in ``folder`` equal to those of ``tree``, writing only the files that differ.

    Unchanged files keep their times, so that a build in ``folder`` compiles only what a changed patch touches. Files of
    an earlier call that ``tree`` no longer has are removed; files that a build made stay.
    """
    manifest = folder.parent / f"{folder.name}.manifest.json"
    names = [str(path.relative_to(tree)) for path in sorted(tree.rglob("*")) if path.is_symlink() or not path.is_dir()]
    brought = files.read_json(manifest) or []
    files.write_json(manifest, sorted({*brought, *names}))
    for name in set(brought) - set(names):
        _drop(folder, name)
    for name in names:
        if not _same(tree / name, folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.remove(folder / name)  # even a folder in the place of a file
            shutil.copy(tree / name, folder / name, follow_symlinks=False)
    files.write_json(manifest, names)


def _drop(folder: Path, name: str) -> None:
    """Remove a file and the folders that become empty; a folder that took its place holds newer files."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        (folder / name).unlink()
    with contextlib.suppress(OSError):
        for parent in (folder / name).relative_to(folder).parents[:-1]:
            (folder / parent).rmdir()


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.stat().st_mode == other.stat().st_mode and one.read_bytes() == other.read_bytes()
