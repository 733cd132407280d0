"""Move the folders of a build to fixed paths under /build, where they cannot be mounted there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from voltforge.compile.toolchain import COMPILERS
from voltforge.system import console, files

ROOT = Path("/build")
"""The folder under which a build sees its folders. nvcc writes a hash of the path into device code, so it is fixed."""
MOVED = "moved.json"
"""A note in :data:`ROOT` that names the original place of each moved folder; empty for a copy."""


@contextlib.contextmanager
def moved(writable: Mapping[str, Path], readable: Mapping[str, Path]) -> Iterator[None]:
    """Keep the folders at :data:`ROOT`, under their names, for the length of the block.

    Writable folders are moved there and back. The others can be in use elsewhere and are copied by links.
    Concurrent builds take turns.

    Raises:
        OSError: a folder cannot be moved or copied; all are back at their original places.
    """
    with _reserved_root():
        origins = {name: str(real.absolute()) for name, real in writable.items()}
        files.write_json(ROOT / MOVED, origins | dict.fromkeys(readable, ""))
        try:
            for name, real in writable.items():
                real.rename(ROOT / name)
            for name, real in readable.items():
                _copy(real, ROOT / name)
            yield
        finally:
            _move_back()


def obstacle(work: Path, readable: Mapping[str, Path]) -> str:
    """Return the reason why :func:`moved` would fail for folders in ``work``, by a trial; empty if it would not.

    ``readable`` are the folders to copy by links.
    """
    try:
        with _reserved_root():
            files.write_json(ROOT / MOVED, {"probe": ""})
            try:
                _probe(work, readable, ROOT / "probe")
            finally:
                _move_back()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _probe(work: Path, readable: Mapping[str, Path], probe: Path) -> None:
    """Move an empty folder from ``work`` to ``probe``, and link a file of each readable folder into it."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as empty:
        Path(empty).rename(probe)
    for name, real in readable.items():
        regular = (path for path in real.rglob("*") if path.is_file() and not path.is_symlink())
        if file := next(regular, None):
            os.link(file, probe / name)


def recover(work: Path) -> None:
    """Move folders that a killed run left at :data:`ROOT` back to ``work``."""
    origins = (files.read_json(ROOT / MOVED) or {}).values()
    if any(origin and Path(origin).is_relative_to(work.absolute()) for origin in origins):
        with contextlib.suppress(OSError), _reserved_root():  # the caller reports foreign files itself
            pass


@contextlib.contextmanager
def _reserved_root() -> Iterator[None]:
    """Create :data:`ROOT`, empty, for this process alone. Folders that a killed run left there are moved back first.

    Raises:
        OSError: it cannot be created, belongs to another user, or holds foreign files.
    """
    if not os.access(ROOT if ROOT.exists() else ROOT.parent, os.W_OK):  # so no run of this user left folders there
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ROOT)
    with _locked(ROOT.parent):  # the parent is locked, so that ROOT can be removed
        ROOT.mkdir(exist_ok=True)
        try:
            if ROOT.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EACCES, "it belongs to another user", ROOT)
            if (ROOT / MOVED).exists():
                _wait_for_orphans()
                _move_back()
            if foreign := [name for name in os.listdir(ROOT) if not name.startswith(f".{MOVED}")]:
                raise FileExistsError(errno.EEXIST, f"{foreign[0]} exists there", ROOT)
            yield
        finally:
            with contextlib.suppress(OSError):
                ROOT.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Report it if another build holds the lock."""
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(f"waiting for another build at {ROOT}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _wait_for_orphans() -> None:
    """Wait for compilers that survived a killed run: they would write into the folders of the next build."""
    announced = False
    while pids := [
        process.pid for process in psutil.process_iter(["cwd"]) if Path(process.info["cwd"] or "/").is_relative_to(ROOT)
    ]:
        if not announced:
            console.note(f"waiting for processes of a killed build at {ROOT}: {', '.join(map(str, pids))}")
        announced = True
        time.sleep(0.2)


def _move_back() -> None:
    """Move each folder of the note back if its original place is free; remove it otherwise, and remove copies."""
    for name, origin in (files.read_json(ROOT / MOVED) or {}).items():
        if not (ROOT / name).exists():
            continue
        if origin and Path(origin).parent.is_dir() and not os.path.lexists(origin):
            (ROOT / name).rename(origin)
        else:
            files.remove(ROOT / name)
    (ROOT / MOVED).unlink(missing_ok=True)


def _copy(real: Path, place: Path) -> None:
    """Copy a folder by links: CMake resolves the real path of folders, and gcc that of headers.

    Links to compilers are symbolic, because the toolchain is recognized by their ctime, which a hard link changes.
    """

    def link(source: str, target: str) -> None:
        compiler = str(Path(source).relative_to(real)) in COMPILERS
        (os.symlink if compiler else os.link)(source, target)

    shutil.copytree(real, place, symlinks=True, copy_function=link)
