"""The results of the stages, as their records hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voltforge.compile.cache_stats import CacheStats
from voltforge.system.process import Usage
from voltforge.system.records import CheckoutPath
from voltforge.wheel.findings import Finding


@dataclass(frozen=True)
class SourceFile:
    """The source of a package: an sdist, a tarball or a stock wheel, verified by its SHA-256."""

    path: CheckoutPath


@dataclass(frozen=True)
class Checked:
    """The findings of all checks on a wheel."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class CheckedBefore:
    """The findings on a wheel of the shared cache, which is checked before it is used."""

    inputs: str
    """The digest of the wheel's inputs and of what the recipe expects."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class BuiltWheel:
    """A finished wheel that is not checked yet."""

    path: CheckoutPath
    sha256: str
    commit: str | None = None
    """The commit of the source, if the recipe names it."""
    linked: Mapping[str, int] | None = None
    """The number of CUDA objects linked into each expected extension; ``None`` where nothing was compiled."""
    sandbox: str | None = None
    """``bubblewrap``, ``no network`` or ``none``; ``None`` where nothing was compiled."""
    hermetic: bool | None = None
    """True if the build saw only its declared inputs (bubblewrap); ``None`` where nothing was compiled."""
    jobs: int | None = None
    """The largest number of compilers at once."""
    usage: Usage | None = None
    objects: CacheStats | None = None
    """The use of the object cache; ``None`` without one."""
    hosts: Mapping[str, int] | None = None
    """The number of objects that each host of a farm compiled."""
    cache: str | None = None
    """The shared cache that the wheel comes from."""
    checked: CheckedBefore | None = None


@dataclass(frozen=True)
class Receipt:
    """A wheel in the wheelhouse: what it is, how it was built, what the checks found."""

    file: str
    name: str
    version: str
    sha256: str
    size: int
    """In bytes."""
    metadata: str
    """The SHA-256 of the wheel's METADATA."""
    requires_python: str
    findings: tuple[Finding, ...]
    build: Mapping[str, Any]
    """The fields of :class:`BuiltWheel` that the provenance states."""
    build_key: str
    """The key of the build stage."""
    materials: tuple[Mapping[str, Any], ...]
    statement: str
    """The SHA-256 of the provenance statement."""
    sbom: Mapping[str, str] | None = None
    """``file`` and ``sha256`` of the SBOM."""
    commit: str | None = None
    linked: Mapping[str, int] | None = None
    sandbox: str | None = None
    hermetic: bool | None = None
    jobs: int | None = None
    usage: Usage | None = None
    objects: CacheStats | None = None
    hosts: Mapping[str, int] | None = None
    cache: str | None = None
