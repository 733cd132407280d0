"""Materials: what a wheel was made of or with, each by its hash, as its SBOM and its provenance name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

from voltforge.errors import VoltforgeError
from voltforge.system import files

if TYPE_CHECKING:
    from voltforge.sources.recipe import Source

KINDS = ("source", "patch", "recipe", "lock", "package", "compiler")
"""What a material may be: what is in the wheel comes from sources and patches, the others only helped to make it."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH = re.compile(r"(?:^|\s)--hash=(\S*)")
_URI = re.compile(r"(?:pkg:|https?://)\S+")
_DEB = re.compile(r"(?P<name>[^_]+)_(?P<version>[^_]+)_(?P<arch>[^_]+)\.deb")


class MaterialError(VoltforgeError):
    """A lock or a record of materials that does not say what it must."""


@dataclass(frozen=True, order=True)
class Material:
    """One thing that a wheel was made of or with."""

    name: str
    """A project, or the file's name."""
    kind: str
    """One of :data:`KINDS`."""
    version: str = ""
    uri: str = ""
    """A package URL (purl-spec), ``pkg:pypi/torch@2.9.0``, or the upstream address that a recipe has; no mirror's."""
    sha256: tuple[str, ...] = ()
    """Its hexadecimal hash; for a lock's entry, which has a file for each platform, all that the lock permits."""


def as_json(material: Material) -> dict[str, Any]:
    """A material as JSON holds it, without what is empty."""
    return {name: list(value) if name == "sha256" else value for name, value in asdict(material).items() if value}


def from_json(value: Any) -> Material:
    """A material from what :func:`as_json` gave.

    Raises:
        MaterialError: it is something else.
    """
    if not isinstance(value, Mapping) or value.keys() - {"name", "kind", "version", "uri", "sha256"}:
        raise MaterialError("a material is not a table of name, kind, version, uri and sha256")
    hashes, words = value.get("sha256", []), {name: text for name, text in value.items() if name != "sha256"}
    if not all(isinstance(text, str) for text in words.values()) or not words.get("name"):
        raise MaterialError("a material has no name, or not in text")
    if words.get("kind") not in KINDS:
        raise MaterialError(f"the material {words['name']!r} is none of {', '.join(KINDS)}")
    if words.get("uri") and not _URI.fullmatch(words["uri"]):
        raise MaterialError(f"the material {words['name']!r} is from no package URL and no address")
    if not isinstance(hashes, list) or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in hashes):
        raise MaterialError(f"the material {words['name']!r} has something else than a list of SHA-256")
    return Material(**words, sha256=tuple(hashes))


def of_file(path: Path, kind: str) -> Material:
    """A file of the checkout as it is now."""
    return Material(path.name, kind, sha256=(files.sha256(path),))


def of_source(source: Source) -> Material:
    """What a recipe's source is, from its index, its archive or its upstream address.

    Raises:
        MaterialError: an index has it under a name that is neither a wheel's nor an sdist's.
    """
    if source.url:
        return Material(source.file, "source", uri=source.url, sha256=(source.sha256,))
    name, version, uri = _published(source.file, source.index) if source.index else _distributed(source.file)
    return Material(name, "source", version, uri, (source.sha256,))


def of_lock(path: Path, kind: str = "package") -> tuple[Material, ...]:
    """The lock file at ``path`` and, as materials of ``kind``, its entries that hold for this Python and platform.

    Raises:
        MaterialError: it cannot be read, or has a line that is no pin with hashes, as uv writes them.
    """
    try:
        text, lock = path.read_text(encoding="utf-8"), of_file(path, "lock")
    except (OSError, ValueError) as error:
        raise MaterialError(f"{path.name} cannot be read as a lock", hint="./doit lock makes it anew") from error
    entries = []
    for number, line in _lines(text):
        try:
            entries += _entry(line, kind)
        except ValueError as error:
            raise MaterialError(
                f"{path.name} has no pinned requirement with hashes in line {number}: {error}",
                hint="./doit lock makes it anew",
            ) from error
    return lock, *entries


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The logical lines of a requirements file that are no comments, each with the number of its first."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start if pending else number
        bare = re.sub(r"(?:^|\s)#.*", "", line).strip()
        part = bare.removesuffix("\\")
        pending = f"{pending} {part}".strip()
        if pending and part == bare:
            yield start, pending
            pending = ""
    if pending:
        yield start, pending


def _entry(line: str, kind: str) -> list[Material]:
    """The pin of a lock's line, or nothing where its marker does not hold here."""
    try:
        pin = Requirement(_HASH.sub("", line))
    except InvalidRequirement as error:
        raise ValueError(f"{line[:60]!r} is no requirement") from error
    hashes = [one.partition(":") for one in _HASH.findall(line)]
    pinned = [one.version for one in pin.specifier if one.operator == "=="]
    if len(pin.specifier) != 1 or not pinned or "*" in pinned[0]:
        raise ValueError(f"{pin.name} is not pinned to one version")
    if not hashes or any(name != "sha256" or not _SHA256.fullmatch(value) for name, _, value in hashes):
        raise ValueError(f"{pin.name} has no SHA-256, or another hash")
    if pin.marker and not pin.marker.evaluate():
        return []
    name, version = canonicalize_name(pin.name), pinned[0]
    permitted = tuple(sorted({value for _, _, value in hashes}))
    return [Material(name, kind, version, _purl("pypi", name, version), permitted)]


def _published(file: str, project: str) -> tuple[str, str, str]:
    """Name, version and purl of a file on a package index."""
    try:
        found = parse_wheel_filename(file) if file.endswith(".whl") else parse_sdist_filename(file)
    except ValueError as error:
        raise MaterialError(f"{file} of {project} is named neither like a wheel nor like an sdist") from error
    return project, str(found[1]), _purl("pypi", project, str(found[1]), file_name=file)


def _distributed(file: str) -> tuple[str, str, str]:
    """Name, version and purl of a file in the pool of the distribution, Debian."""
    if match := _DEB.fullmatch(file):
        return match["name"], match["version"], _purl("deb/debian", match["name"], match["version"], arch=match["arch"])
    return file, "", _purl("generic", file, "")


def _purl(kind: str, name: str, version: str, **qualifiers: str) -> str:
    from packageurl import PackageURL  # takes as long to import as all of json and re, and few tasks name a material

    kind, _, namespace = kind.partition("/")
    return PackageURL(kind, namespace or None, name, version or None, qualifiers or None).to_string()
