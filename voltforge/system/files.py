"""Writing files so that a half-written one is never taken for a whole one, and hashing them."""

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
"""Nanoseconds that a file must have stood still for its hash to be remembered."""
_HASHED: dict[tuple[int, ...], str] = {}


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` only when the block ends well: written beside, synced, renamed."""
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
    """Put ``data`` (text as UTF-8) at ``path``, whole or not at all."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` at ``path`` as JSON with sorted keys, so that equal values are equal bytes."""
    write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value at ``path``, or ``None`` where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes ``path``, instead of what is there, only when the block ends well.

    What is there is moved aside whole and removed last, so that no kill leaves a part of it under its name.
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
    """Remove a file, a link or a whole folder, read-only parts included; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(stat.S_IRWXU)
        for parent, folders, _ in os.walk(path):
            for folder in (Path(parent, name) for name in folders):
                if not folder.is_symlink():
                    folder.chmod(stat.S_IRWXU)  # before os.walk looks into it
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
    """The hexadecimal SHA-256 of a file's content; one that stood still since is read once in a process."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        stood = _stood(file)
        if stood in _HASHED:
            return _HASHED[stood]
        while block := file.read(BLOCK):
            digest.update(block)
        # A change so soon after the last one that the clock did not move on would not show (git's racy files).
        if _stood(file) == stood and time.time_ns() - stood[-1] > SETTLED:
            _HASHED[stood] = digest.hexdigest()
    return digest.hexdigest()


def _stood(file: IO[bytes]) -> tuple[int, ...]:
    """What of a file changes with its content; its ctime no program can set."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_bytes(data: bytes) -> str:
    """The hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder: Path) -> str:
    """A digest of all that is in a folder, by name, mode, size and time: another when a file was changed or cut off.

    It reads no content and so takes half a second for 50,000 files. The times of folders do not count.
    """
    entries = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in (*names, *links)):
            found = path.lstat()
            target = str(path.readlink()) if stat.S_ISLNK(found.st_mode) else found.st_mtime_ns
            entries.append([str(path.relative_to(folder)), found.st_mode, found.st_size, target])
    return digest(sorted(entries))


def digest(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value's canonical form: equal values have equal digests."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def size(count: float) -> str:
    """A count of bytes for people: ``17.6 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
