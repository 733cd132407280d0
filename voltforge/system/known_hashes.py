"""The SHA-256 of large files that are looked at in every run, so that an unchanged file is not read again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltforge.system import files


@dataclass(frozen=True)
class KnownHashes:
    """A JSON file that maps each path to a SHA-256 and to the identity that the file had then.

    A hash is believed while device, inode, size, mtime and ctime of its file stay the same. A ctime follows the
    clock and cannot be set. A file that changed a moment ago is hashed but not stored.
    """

    path: Path | None = None
    """``None`` stores nothing. If this file cannot be read or written, hashes are computed and not stored."""

    def sha256(self, file: Path) -> str:
        """Return the hexadecimal SHA-256 of a file; it is read only if it is new or has changed.

        Raises:
            OSError: the file cannot be read.
        """
        known = self._read()
        before = files.identity(file)
        match known.get(str(file)):
            case {"identity": identity, "sha256": str(digest)} if identity == list(before):
                return digest
        digest = files.sha256(file)
        if self.path and files.is_settled(before) and files.identity(file) == before:
            kept = {name: entry for name, entry in known.items() if Path(name).is_file()}
            entry = {"identity": list(before), "sha256": digest}
            with contextlib.suppress(OSError):
                files.write_json(self.path, {**kept, str(file): entry})
        return digest

    def _read(self) -> dict[str, Any]:
        content = files.read_json(self.path) if self.path else None
        return content if isinstance(content, dict) else {}
