"""The shared cache of finished wheels: a folder or a web server that is searched before a build and filled after it.

It holds plain files, which any file server can serve and any attacker can write. A statement is believed if a trusted
key has signed it, and a wheel if its bytes have the SHA-256 of the statement.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.sources import index
from voltforge.sources.fetch import Artifact, DownloadError, Store
from voltforge.sources.index import Indexes, Patience
from voltforge.system import console, files
from voltforge.system.urls import local_path, redacted
from voltforge.wheel import provenance, signing
from voltforge.wheel.cache_limits import REDIRECTS, CacheError, LimitedIndexes
from voltforge.wheel.cache_storage import UNKNOWN, WheelFolder, WheelServer, normalised_address
from voltforge.wheel.provenance import Provenance
from voltforge.wheel.signing import Trust

BUILDERS = 16
"""The most statements of one file that are read."""


@dataclass(frozen=True)
class CachedWheel:
    """A wheel from the cache."""

    wheel: Path
    """The downloaded file; its SHA-256 is that of a statement signed by a trusted key."""
    provenance: Provenance
    """The provenance in that statement."""


@dataclass(frozen=True)
class CacheMiss:
    """No wheel from the cache."""

    why: str = ""
    """The fault of the cache, in a sentence; empty if it merely lacks the wheel."""


@dataclass(frozen=True)
class SharedCache:
    """A folder or an address with finished wheels, and for each build the statements about its wheel.

    ``keys/<first two digits of the build's key>/<key>.intoto.jsonl`` has a signed statement on each line, each by a
    different builder and all about the same wheel. ``wheels/<sha256>/<file>`` is the wheel.
    """

    address: str
    """An absolute folder, or a file:, http: or https: address, which may include credentials."""
    patience: Patience = field(default=Patience(attempts=2))
    offline: bool = False
    """True if no server may be contacted."""
    ask_indexes: Callable[[], Indexes] = field(default=index.configured, repr=False)
    """Returns the certificates and proxies for uploads."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> SharedCache | None:
        """Return the cache that ``VOLTFORGE_CACHE`` names, if any. ``VOLTFORGE_OFFLINE=1`` forbids the network.

        Raises:
            CacheError: the value is neither a folder nor such an address.
        """
        address = environ.get("VOLTFORGE_CACHE", "").strip()
        if not address:
            return None
        offline = Store.from_environment(Path(), environ).offline
        return cls(normalised_address(address), offline=offline, ask_indexes=partial(index.configured, dict(environ)))

    def __str__(self) -> str:
        return redacted(self.address)

    def find(self, key: str, trust: Trust, downloads: Store) -> CachedWheel | CacheMiss:
        """Download the wheel that was built under ``key`` and signed by a key of ``trust`` into ``downloads``.

        Any fault of the cache is a miss, within minutes. Raises nothing.
        """
        if not trust:
            why = "no key is trusted; put the builders' public keys into the file that VOLTFORGE_TRUSTED names"
            return CacheMiss(f"{self}: {why}")
        if self._local is None and (self.offline or downloads.offline):
            return CacheMiss(f"{self}: VOLTFORGE_OFFLINE forbids network access")
        try:
            return self._fetch(key, trust, downloads)
        except DownloadError as error:
            tries = [f"{attempt.place}: {attempt.outcome}" for missing in error.missing for attempt in missing.attempts]
            return CacheMiss("; ".join(tries))
        except VoltforgeError as error:
            return CacheMiss(error.what)
        except Exception as error:
            # requests, urllib3 and json raise more types than they document, and a broken cache must not break a build.
            return CacheMiss(f"{self}: unreadable answer ({type(error).__name__})")

    def put(self, key: str, wheel: Path, envelope: bytes) -> bool:
        """Upload a wheel and the signed statement that it was built under ``key``; return False if both exist there.

        The wheel is written first, so that no statement names a missing wheel. Statements of other builders stay.

        Raises:
            CacheError: the cache cannot be written, has another wheel under this key, or the statement is unsigned or
                about another wheel or build.
        """
        if self._local is None and self.offline:
            raise CacheError(
                f"nothing was uploaded to {self}: VOLTFORGE_OFFLINE forbids network access",
                hint="unset VOLTFORGE_OFFLINE",
            )
        statement = _checked_provenance(key, wheel, envelope)
        with self._open(self.ask_indexes) as place:
            existing = place.read(_statements_path(key)) or b""
            matching = _matching_statements(existing, key, statement, place.shown(_statements_path(key)))
            size, path = wheel.stat().st_size, _wheel_path(statement)
            missing = place.size(path) != size
            if missing:
                place.write(path, wheel)
                if place.size(path) not in (size, UNKNOWN):
                    raise CacheError(
                        f"{place.shown(path)} was uploaded, but is missing or incomplete there",
                        hint="look at the log of its server",
                    )
            remaining = [line for line in matching if line == envelope or _signers(line) != _signers(envelope)]
            lines = b"".join(remaining if envelope in remaining else [*remaining, envelope])
            if lines != existing:
                place.write(_statements_path(key), lines)
            return missing or lines != existing

    @property
    def _local(self) -> Path | None:
        return local_path(self.address)

    @contextlib.contextmanager
    def _open(self, ask: Callable[[], Indexes]) -> Iterator[WheelFolder | WheelServer]:
        if self._local is not None:
            yield WheelFolder(self._local)
            return
        indexes = ask()
        with indexes.session(self.patience) as session:
            session.max_redirects = REDIRECTS
            yield WheelServer(self.address.rstrip("/"), session, indexes)

    def _fetch(self, key: str, trust: Trust, downloads: Store) -> CachedWheel | CacheMiss:
        ask: Callable[[], Indexes] = Indexes if self._local else lambda: downloads.indexes
        with self._open(ask) as place:
            lines = place.read(_statements_path(key))
            if lines is None:
                return CacheMiss("" if self._local is None or self._local.is_dir() else f"{self} is not a folder")
            statement = _trusted_provenance(lines, key, trust, place.shown(_statements_path(key)))
            address = place.address(_wheel_path(statement))
        # The mirrors and indexes of the store have no finished wheels.
        store = replace(
            downloads, mirrors=(), patience=self.patience, ask_indexes=lambda: LimitedIndexes(**vars(ask()))
        )
        return CachedWheel(store.get(Artifact(statement.file, statement.sha256, url=address)), statement)


def _statements_path(key: str) -> str:
    return f"keys/{key[:2]}/{key}.intoto.jsonl"


def _wheel_path(statement: Provenance) -> str:
    return f"wheels/{statement.sha256}/{statement.file}"


def _trusted_provenance(lines: bytes, key: str, trust: Trust, shown: str) -> Provenance:
    """Return the provenance of the first statement that a trusted key has signed for this build.

    Raises:
        CacheError: there is none; the message gives the problem of the first statement.
    """
    problems = []
    for line in lines.splitlines(keepends=True)[:BUILDERS]:
        try:
            return _provenance_of_build(signing.verified_payload(line, trust), key)
        except VoltforgeError as problem:
            problems.append(f"{problem.what}; {problem.hint}" if problem.hint else problem.what)
    raise CacheError(f"{shown}: {problems[0] if problems else 'the file is empty'}")


def _provenance_of_build(payload: bytes, key: str) -> Provenance:
    """Return the provenance in a statement about the wheel that was built under ``key``.

    Raises:
        VoltforgeError: it is about another build, or is not a statement about a wheel.
    """
    statement = provenance.read(payload)
    if statement.build_key != key:
        raise CacheError(f"the statement is about another build, {statement.build_key}")
    return statement


def _checked_provenance(key: str, wheel: Path, envelope: bytes) -> Provenance:
    """Return the provenance to upload.

    Raises:
        CacheError: the statement is unsigned, or is not about this wheel and build.
    """
    try:
        statement = _provenance_of_build(signing.unverified_payload(envelope), key)
        if not _signers(envelope):
            raise CacheError("the statement is not signed")
        if (statement.file, statement.sha256) != (wheel.name, files.sha256(wheel)):
            raise CacheError(f"the statement is about {statement.file} with sha256 {statement.sha256}")
    except OSError as error:
        raise CacheError(f"{wheel} cannot be read: {error.strerror}") from error
    except VoltforgeError as problem:
        hint = "./doit key signs the wheels of the wheelhouse"
        raise CacheError(f"{wheel.name} cannot be shared: {problem.what}", hint=hint) from problem
    return statement


def _matching_statements(lines: bytes, key: str, statement: Provenance, shown: str) -> list[bytes]:
    """Return the existing statements about the same build and wheel; warn about unusable ones and leave them out.

    Raises:
        CacheError: a statement names a different wheel for this build.
    """
    same = []
    for line in lines.splitlines(keepends=True)[:BUILDERS]:
        try:
            other = _provenance_of_build(signing.unverified_payload(line), key)
        except VoltforgeError as problem:
            console.warn(f"{shown}: {problem.what}; it is replaced")
            continue
        if other.sha256 != statement.sha256:
            raise CacheError(
                f"{shown} names a different wheel: the build gave {other.sha256} there and {statement.sha256} here",
                hint="./doit reproduce compares two builds; nothing was overwritten",
            )
        same.append(line)
    return same


def _signers(envelope: bytes) -> set[str]:
    return {signature["keyid"] for signature in json.loads(envelope)["signatures"]}
