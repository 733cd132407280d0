"""Materials: the sources, patches, packages and compilers of a wheel, by hash, for its SBOM and provenance."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import parse_sdist_filename, parse_wheel_filename

from voltforge.errors import VoltforgeError
from voltforge.sources import locks
from voltforge.system import files

if TYPE_CHECKING:
    from voltforge.sources.recipe import Source

KINDS = ("source", "patch", "recipe", "lock", "package", "compiler")
"""Kinds of materials. The content of the wheel comes from sources and patches; the other kinds are build inputs."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_URI = re.compile(r"(?:pkg:|https?://)\S+")
_DEB = re.compile(r"(?P<name>[^_]+)_(?P<version>[^_]+)_(?P<arch>[^_]+)\.deb")


class MaterialError(VoltforgeError):
    """A material that cannot be named, or a malformed record of materials."""


@dataclass(frozen=True, order=True)
class Material:
    """An input of a wheel's build."""

    name: str
    """The project's name, or the file's."""
    kind: str
    """One of :data:`KINDS`."""
    version: str = ""
    uri: str = ""
    """A package URL (purl-spec), ``pkg:pypi/torch@2.9.0``, or the upstream URL in the recipe; never a mirror's URL."""
    sha256: tuple[str, ...] = ()
    """Its hexadecimal SHA-256. A package of a lock has a file for each platform, so all permitted hashes are listed."""


def as_json(material: Material) -> dict[str, Any]:
    """Return a material as a JSON object, without its empty fields."""
    return {name: list(value) if name == "sha256" else value for name, value in asdict(material).items() if value}


def from_json(value: Any) -> Material:
    """Return the material that :func:`as_json` wrote.

    Raises:
        MaterialError: ``value`` is not a material.
    """
    if not isinstance(value, Mapping) or value.keys() - {"name", "kind", "version", "uri", "sha256"}:
        raise MaterialError("a material is not an object with name, kind, version, uri and sha256")
    hashes, words = value.get("sha256", []), {name: text for name, text in value.items() if name != "sha256"}
    if not all(isinstance(text, str) for text in words.values()) or not words.get("name"):
        raise MaterialError("a material has no name, or a field that is not text")
    if words.get("kind") not in KINDS:
        raise MaterialError(f"the material {words['name']!r} has an unknown kind; the kinds are {', '.join(KINDS)}")
    if words.get("uri") and not _URI.fullmatch(words["uri"]):
        raise MaterialError(f"the material {words['name']!r} has a uri that is not a package URL or http(s) URL")
    if not isinstance(hashes, list) or not all(
        isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in hashes
    ):
        raise MaterialError(f"the material {words['name']!r} has a sha256 that is not a list of SHA-256 digests")
    return Material(**words, sha256=tuple(hashes))


def of_file(path: Path, kind: str) -> Material:
    """Return a file of the checkout with its current hash."""
    return Material(path.name, kind, sha256=(files.sha256(path),))


def of_source(source: Source) -> Material:
    """Return a recipe's source, named by its project on the index, its Debian package or its upstream URL.

    Raises:
        MaterialError: a file of the index has a name that is neither a wheel's nor an sdist's.
    """
    if source.url:
        return Material(source.file, "source", uri=source.url, sha256=(source.sha256,))
    name, version, uri = _published(source.file, source.index) if source.index else _distributed(source.file)
    return Material(name, "source", version, uri, (source.sha256,))


def of_lock(path: Path, kind: str = "package") -> tuple[Material, ...]:
    """Return the lock at ``path`` and, as materials of ``kind``, its pins that apply to this Python and platform.

    Raises:
        LockError: the file cannot be read as a lock.
    """
    pins = [pin for pin in locks.read(path) if pin.applies]
    packages = [Material(pin.name, kind, pin.version, _purl("pypi", pin.name, pin.version), pin.sha256) for pin in pins]
    return of_file(path, "lock"), *packages


def _published(file: str, project: str) -> tuple[str, str, str]:
    """Return name, version and purl of a file on a package index."""
    try:
        found = parse_wheel_filename(file) if file.endswith(".whl") else parse_sdist_filename(file)
    except ValueError as error:
        raise MaterialError(f"{file} of {project} has a name that is neither a wheel's nor an sdist's") from error
    return project, str(found[1]), _purl("pypi", project, str(found[1]), file_name=file)


def _distributed(file: str) -> tuple[str, str, str]:
    """Return name, version and purl of a file in the pool of a Debian archive."""
    if match := _DEB.fullmatch(file):
        return match["name"], match["version"], _purl("deb/debian", match["name"], match["version"], arch=match["arch"])
    return file, "", _purl("generic", file, "")


def _purl(kind: str, name: str, version: str, **qualifiers: str) -> str:
    from packageurl import PackageURL  # slow to import, and few tasks need it

    kind, _, namespace = kind.partition("/")
    return PackageURL(kind, namespace or None, name, version or None, qualifiers or None).to_string()
