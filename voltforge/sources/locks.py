"""Lock files: the exact version and the hashes of each package that an environment installs.

The format is pip's requirements file with ``--hash`` options, as ``uv pip compile --generate-hashes`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import NormalizedName, canonicalize_name

from voltforge.errors import VoltforgeError

_COMMENT = re.compile(r"(?:^|\s)#.*")
_HASH = re.compile(r"(?:^|\s)--hash=(\S*)")
_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")


class LockError(VoltforgeError):
    """A file that cannot be read as a lock; ``line`` is the number of the faulty line, or ``None``."""

    def __init__(self, path: Path, reason: str, line: int | None = None) -> None:
        where = f"{path.name}, line {line}" if line else path.name
        super().__init__(f"{where}: {reason}", hint="./doit lock writes the locks anew")
        self.path = path
        self.line = line


@dataclass(frozen=True)
class Pin:
    """A requirement that is pinned to one version and its files' hashes."""

    name: NormalizedName
    """The project's normalized name (PEP 503)."""
    version: str
    sha256: tuple[str, ...]
    """The permitted hexadecimal SHA-256 digests, sorted: one for each file of the release."""
    marker: Marker | None
    """The environments that need the package (PEP 508); ``None`` for all."""
    text: str
    """The lines of the lock that hold the pin."""

    @property
    def applies(self) -> bool:
        """True if the running Python on this platform needs the package."""
        return self.marker is None or self.marker.evaluate()


def read(path: Path) -> tuple[Pin, ...]:
    """Return the pins of the lock at ``path``, in the file's order, for all platforms and Pythons.

    Raises:
        LockError: the file cannot be read, or a line is not a requirement with one version and SHA-256 hashes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LockError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    pins = []
    for number, words, lines in _logical_lines(text):
        try:
            pins.append(_pin(words, lines))
        except ValueError as error:
            raise LockError(path, str(error), number) from error
    return tuple(pins)


def _logical_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield each requirement: the number of its first line, its words without comments, its lines as written."""
    first, words, lines = 1, "", ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        content = _COMMENT.sub("", line).strip()
        if not words:
            first, lines = number, ""
        part = content.removesuffix("\\")
        words, lines = f"{words} {part}".strip(), lines + line
        if words and part == content:
            yield first, words, lines
            words = ""
    if words:
        yield first, words, lines


def _pin(words: str, lines: str) -> Pin:
    try:
        requirement = Requirement(_HASH.sub("", words))
    except InvalidRequirement as error:
        raise ValueError(f"{words[:60]!r} is not a requirement (PEP 508)") from error
    versions = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
    if len(requirement.specifier) != 1 or not versions or "*" in versions[0]:
        raise ValueError(f"{requirement.name} is not pinned to one version")
    hashes = [_SHA256.fullmatch(value) for value in _HASH.findall(words)]
    digests = sorted({match[1] for match in hashes if match})
    if not hashes or not all(hashes):
        raise ValueError(f"{requirement.name} has no SHA-256 hash, or a hash of another kind")
    return Pin(canonicalize_name(requirement.name), versions[0], tuple(digests), requirement.marker, lines)
