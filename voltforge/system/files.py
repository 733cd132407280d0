"""Write files and folders completely or not at all, and hash them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 20
SETTLED = 2_000_000_000
"""Minimum age of a file's last change, in nanoseconds, before its hash is cached."""
_HASHED: dict[tuple[int, ...], str] = {}


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` if the block succeeds: written beside it, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(mode)
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write(path: Path, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, completely or not at all."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON. Keys are sorted, so that equal values give equal bytes."""
    write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value at ``path``; ``None`` if the file is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder that replaces ``path`` if the block succeeds.

    The old content is renamed first and removed last: a killed process leaves no partly removed folder at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    beside.chmod(0o755)
    aside = beside.with_name(f"{beside.name}.old")
    try:
        yield beside
        if os.path.lexists(path):
            path.replace(aside)
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(path):
            aside.replace(path)
        remove(beside)
        raise
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, read-only folders included. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(stat.S_IRWXU)
        for parent, folders, _ in os.walk(path):
            for folder in (Path(parent, name) for name in folders):
                if not folder.is_symlink():
                    folder.chmod(stat.S_IRWXU)  # before os.walk lists it
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable (fsync(2) on the directory)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file. An unchanged file is read once in a process."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        before = _identity(os.fstat(file.fileno()))
        if before in _HASHED:
            return _HASHED[before]
        while block := file.read(BLOCK):
            digest.update(block)
        if _identity(os.fstat(file.fileno())) == before and is_settled(before):
            _HASHED[before] = digest.hexdigest()
    return digest.hexdigest()


def identity(path: Path) -> tuple[int, ...]:
    """Return the metadata that changes with a file's content; no program can set the ctime, its last item."""
    return _identity(path.stat())


def is_settled(identity: tuple[int, ...]) -> bool:
    """Return True if the next change of a file will change its identity.

    A second change within one tick of the clock keeps all times (git calls such files racy).
    """
    return time.time_ns() - identity[-1] > SETTLED


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a digest over the path, mode, size and mtime of each file below a folder, and the target of each link.

    It reads no file, so that 50,000 files take half a second. Folders do not count.
    """
    entries = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in (*names, *links)):
            status = path.lstat()
            target = str(path.readlink()) if stat.S_ISLNK(status.st_mode) else status.st_mtime_ns
            entries.append([str(path.relative_to(folder)), status.st_mode, status.st_size, target])
    return digest(sorted(entries))


def digest(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON value in canonical form: equal values have equal digests."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def size(count: float) -> str:
    """Format a count of bytes: ``17.6 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
