"""The shared cache of finished wheels: a folder or a web server that is searched before a build and filled after it.

It holds plain files, which any file server can serve and any attacker can write. A statement is believed if a trusted
key has signed it, and a wheel if its bytes have the SHA-256 of the statement.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests
import urllib3
from requests.adapters import BaseAdapter

from voltforge.errors import VoltforgeError, remedy
from voltforge.sources import index
from voltforge.sources.fetch import Artifact, NotFetchedError, Store
from voltforge.sources.index import Indexes, Patience, answered, explained
from voltforge.system import console, files
from voltforge.system.urls import local_path, redacted
from voltforge.wheel import provenance, signing
from voltforge.wheel.provenance import Provenance
from voltforge.wheel.signing import Trust

ANSWER = 30.0
"""The time limit of an answer in seconds: its head, or all of a small file.

The timeouts of requests restart with each byte, so a server that sends a byte now and then would never time out.
"""
WINDOW = 30.0
"""The period over which the speed of a download is measured, in seconds."""
SLOWEST = 50_000
"""The lowest accepted download speed in bytes per second. At this speed a wheel of 200 MB takes over an hour."""
REDIRECTS = 5
"""The most redirects of an answer. 30 slow ones, the limit of requests, would take minutes."""
LARGEST_STATEMENT = 4_000_000
"""The largest file of statements that is read, in bytes. A statement has some ten thousand."""
LARGEST_WHEEL = 10_000_000_000
"""The largest wheel that is downloaded, in bytes. The largest known wheel has under 5 GB."""
BUILDERS = 16
"""The most statements of one file that are read."""

Result = TypeVar("Result")


class CacheError(VoltforgeError):
    """The shared cache has no usable address, refused a wheel, or sent an unusable answer."""


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
        return cls(_normalised_address(address), offline=offline, ask_indexes=partial(index.configured, dict(environ)))

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
        except NotFetchedError as error:
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
    def _open(self, ask: Callable[[], Indexes]) -> Iterator[_CacheFolder | _CacheServer]:
        if self._local is not None:
            yield _CacheFolder(self._local)
            return
        indexes = ask()
        with indexes.session(self.patience) as session:
            session.max_redirects = REDIRECTS
            yield _CacheServer(self.address.rstrip("/"), session, indexes)

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
            downloads, mirrors=(), patience=self.patience, ask_indexes=lambda: _LimitedIndexes(**vars(ask()))
        )
        return CachedWheel(store.get(Artifact(statement.file, statement.sha256, url=address)), statement)


# --- statements ---


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


# --- addresses ---


def _normalised_address(address: str) -> str:
    """Return the normalised address or absolute folder for a value of VOLTFORGE_CACHE.

    Raises:
        CacheError: it is neither.
    """
    scheme, colon, rest = address.partition(":")
    try:
        if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            return str(Path(address).expanduser().absolute())
        parts = urlsplit(address)
        on_disk = parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/")
        on_web = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if (on_disk or on_web) and not parts.query and not parts.fragment:
            return f"{scheme.lower()}:{rest}"
    except (ValueError, RuntimeError):  # the port is not a number; the ~ of an unknown user
        pass
    shown = redacted(address) if "://" in address or not colon else f"{scheme}:…"
    raise CacheError(
        f"VOLTFORGE_CACHE is {shown}, which is neither a folder nor a complete http, https or file address",
        hint="VOLTFORGE_CACHE=/a/folder or VOLTFORGE_CACHE=https://host/path, with %40 for an @ in a password",
    )


# --- places ---

UNKNOWN = -1
"""The size of a file if the server does not report it."""


@dataclass(frozen=True)
class _CacheFolder:
    root: Path

    def shown(self, path: str) -> str:
        return str(self.root / path)

    def address(self, path: str) -> str:
        return (self._file(path) or self.root / path).absolute().as_uri()

    def _file(self, path: str) -> Path | None:
        """Return a file, or ``None`` if it does not exist.

        Raises:
            CacheError: it is not a regular file; opening a pipe could block forever.
        """
        file = self.root / path
        if file.exists() and not file.is_file():
            raise CacheError(f"{file} is not a file")
        return file if file.exists() else None

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, or ``None`` if it does not exist.

        Raises:
            CacheError: it cannot be read, or is too large.
        """
        try:
            if not (file := self._file(path)):
                return None
            with file.open("rb") as source:
                data = source.read(LARGEST_STATEMENT + 1)
        except OSError as error:
            raise self._unreadable(path, error) from error
        _raise_if_large(data, str(file))
        return data

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or ``None`` if it does not exist."""
        try:
            file = self._file(path)
            return file.stat().st_size if file else None
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: str, error: OSError) -> CacheError:
        return CacheError(f"{self.root / path} cannot be read: {error.strerror}")

    def write(self, path: str, source: Path | bytes) -> None:
        """Write a file and create its folders.

        Raises:
            CacheError: it cannot be written.
        """
        target = self.root / path
        try:
            with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as data:
                with files.replacing(target) as beside:
                    shutil.copyfileobj(data, beside, files.BLOCK)
        except OSError as error:
            raise CacheError(
                f"{target} cannot be written: {error.strerror}", hint=remedy(error.strerror, "check its owner")
            ) from error


@dataclass(frozen=True)
class _CacheServer:
    base: str
    session: requests.Session
    indexes: Indexes

    def shown(self, path: str) -> str:
        return redacted(self.address(path))

    def address(self, path: str) -> str:
        return f"{self.base}/{quote(path)}"

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, or ``None`` if it does not exist.

        Raises:
            CacheError: the request fails or times out, or the file is too large.
        """
        with self._errors_explained(path):
            return _with_timeout(ANSWER, lambda: self._read(path))

    def _read(self, path: str) -> bytes | None:
        end, data = time.monotonic() + ANSWER, b""
        with self._request("GET", path, stream=True) as response:
            if response.status_code in (404, 410):
                return None
            self._raise_for_status(path, response)
            # read1 returns as soon as bytes arrive; read would wait for a whole block and miss the deadline.
            while block := response.raw.read1(files.BLOCK, decode_content=True):
                data += block
                _raise_if_large(data, self.shown(path))
                if time.monotonic() > end:  # _with_timeout has already given up
                    raise requests.Timeout
        return data

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes, ``None`` if it cannot be downloaded, or ``UNKNOWN``."""
        with self._errors_explained(path):
            response = self._request("HEAD", path, allow_redirects=True)
        length = response.headers.get("Content-Length", "")
        return None if response.status_code != 200 else int(length) if length.isdecimal() else UNKNOWN

    def write(self, path: str, source: Path | bytes) -> None:
        """Upload a file and create its folders.

        Raises:
            CacheError: the server refuses it.
        """
        with self._errors_explained(path):
            refusals = self._make_folders(path)
            try:
                response = self._put(path, source)
            except requests.ConnectionError:
                # A server that refuses an upload may close the connection before its answer is read.
                if not refusals:
                    raise
                response = refusals[0]
            if response.status_code in (404, 409) and refusals:
                response = refusals[0]
            self._raise_for_status(path, response, writing=True)

    def _put(self, path: str, source: Path | bytes) -> requests.Response:
        if isinstance(source, bytes):
            return self._request("PUT", path, data=source, allow_redirects=False)
        with console.download(source.name, source.stat().st_size) as advance, _UploadFile(source, advance) as file:
            return self._request("PUT", path, data=file, allow_redirects=False)

    def _make_folders(self, path: str) -> list[requests.Response]:
        """Create the folders of a file (RFC 4918, section 9.3) and return the answers with status 401, 403 or 507.

        Create them before the upload: otherwise a server refuses the file only after receiving it, nginx with 500.
        Status 405 means either that the folder exists or that the server cannot create any; the upload shows which.
        """
        folders = ["", *(f"{folder}/" for folder in reversed(Path(path).parents[:-1]))]
        answers = [self._request("MKCOL", folder, allow_redirects=False) for folder in folders]
        return [answer for answer in answers if answer.status_code in (401, 403, 507)]

    def _request(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"Accept-Encoding": "identity"}
        return self.session.request(method, self.address(path), headers=headers, timeout=index.TIMEOUT, **more)

    @contextlib.contextmanager
    def _errors_explained(self, path: str) -> Iterator[None]:
        """Convert network errors to CacheError, without credentials in the message."""
        try:
            yield
        except requests.RequestException as error:
            hint = "check that its server runs, and the value of VOLTFORGE_CACHE"
            raise CacheError(f"{self.shown(path)}: {explained(error, self.indexes)}", hint=hint) from error
        except urllib3.exceptions.ReadTimeoutError as error:  # requests does not wrap the errors of the raw body
            raise CacheError(f"{self.shown(path)}: stopped sending") from error
        except urllib3.exceptions.HTTPError as error:
            raise CacheError(f"{self.shown(path)}: the answer is truncated or garbled") from error

    def _raise_for_status(self, path: str, response: requests.Response, *, writing: bool = False) -> None:
        """Raise unless the status is a success.

        Raises:
            CacheError: the meaning of the status, with a hint.
        """
        status = response.status_code
        if status in (200, 201, 204) if writing else status == 200:
            return
        if writing and response.is_redirect:
            target = redacted(response.headers["Location"])
            raise CacheError(
                f"{self.shown(path)} is redirected to {target}", hint="set VOLTFORGE_CACHE to that address"
            )
        known = _MEANINGS if writing or status == 401 else {}
        meaning, hint = known.get(status, ("", "look at the log of its server"))
        raise CacheError(f"{self.shown(path)} {answered(response)}{meaning}", hint=hint)


_MEANINGS: Mapping[int, tuple[str, str]] = {
    401: (
        ": it requires a user and a password, or different ones",
        "VOLTFORGE_CACHE=https://user:password@host/path, or a line for its host in ~/.netrc",
    ),
    403: (": this user may not write there", "ask for write permission, or use another user in VOLTFORGE_CACHE"),
    404: (
        ": the folder does not exist, and the server does not create it",
        "create the folder on the server, or correct VOLTFORGE_CACHE",
    ),
    405: (
        ": the server does not accept uploads",
        "allow uploads (nginx: dav_methods PUT MKCOL), or set VOLTFORGE_CACHE to the folder that it serves",
    ),
    409: (
        ": the folder does not exist, and the server does not create it",
        "create it on the server, or let uploads create folders (nginx: create_full_put_path on)",
    ),
    413: (": the wheel is larger than the server allows", "raise the server's limit (nginx: client_max_body_size)"),
    500: ("", "look at the log of its server; nginx answers 500 if a folder is missing: create_full_put_path on"),
    501: (": the server does not support uploads", "set VOLTFORGE_CACHE to a WebDAV server or a folder"),
    507: (": its disk is full", "remove old files of keys/ there, and then of wheels/"),
}
"""The meaning of a refused upload and a hint, by status (RFC 9110, section 15.5; RFC 4918, section 11)."""


def _raise_if_large(data: bytes, shown: str) -> None:
    if len(data) > LARGEST_STATEMENT:
        raise CacheError(f"{shown} is larger than {files.size(LARGEST_STATEMENT)}, the limit for statements")


class _UploadFile(io.FileIO):
    """A file that reports its read progress."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(-1 if size is None else size) or b""
        self._advance(len(block))
        return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = self.tell()
        after = super().seek(offset, whence)
        self._advance(after - before)  # negative when an upload is repeated
        return after


# --- time ---


def _with_timeout(seconds: float, work: Callable[[], Result]) -> Result:
    """Return the result of ``work``, run in a thread that is abandoned after ``seconds``.

    Raises:
        requests.Timeout: it takes longer.
    """
    done: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise requests.Timeout from error


@dataclass
class _DownloadSpeed:
    """The speed and size limits of one download."""

    total: int = 0
    count: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        """Count received bytes.

        Raises:
            CacheError: the download is too slow, or larger than any wheel.
        """
        self.total += count
        self.count += count
        passed = time.monotonic() - self.start
        if self.total > LARGEST_WHEEL:
            raise CacheError(f"the shared cache sends more than {files.size(LARGEST_WHEEL)} for one wheel")
        if passed >= WINDOW:
            if self.count < SLOWEST * passed:
                raise CacheError(f"the shared cache is too slow: {files.size(self.count / passed)} per second")
            self.count, self.start = 0, time.monotonic()


class _LimitedAdapter(BaseAdapter):
    """An adapter that limits the time of the requests sent by another adapter."""

    def __init__(self, adapter: BaseAdapter, pace: _DownloadSpeed) -> None:
        super().__init__()
        self.adapter = adapter
        self.pace = pace

    def send(self, request: requests.PreparedRequest, *args: Any, **more: Any) -> requests.Response:
        response = _with_timeout(ANSWER, lambda: self.adapter.send(request, *args, **more))
        raw: Any = response.raw
        raw.read1 = partial(self._measured_read, raw.read1)
        return response

    def _measured_read(self, read1: Callable[..., bytes], *args: Any, **more: Any) -> bytes:
        block = b""
        try:
            block = read1(*args, **more)
            return block
        finally:
            self.pace.add(len(block))

    def close(self) -> None:
        self.adapter.close()


@dataclass(frozen=True)
class _LimitedIndexes(Indexes):
    """The same certificates and proxies, with time limits for an untrusted server."""

    def session(self, patience: Patience | None = None) -> requests.Session:
        session = super().session(patience)
        session.max_redirects = REDIRECTS
        pace = _DownloadSpeed()
        for scheme, adapter in list(session.adapters.items()):
            session.mount(scheme, _LimitedAdapter(adapter, pace))
        return session
