"""The shared cache of finished wheels: a folder or a web server, asked before a build and given what was built.

It holds plain files, so that whatever serves files can be one, and anyone may have written them. A statement is
believed where a trusted key has signed it, and a wheel where its bytes have the hash that the statement says.
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
"""Seconds after which an answer is given up, however often it was asked for: its head, or all of a small one.

The time limits of requests begin anew with each byte, and a server that sends one now and then would never end.
"""
WINDOW = 30.0
"""Seconds over which the speed of a wheel's download is looked at."""
SLOWEST = 50_000
"""Bytes in a second below which a download is given up. At this speed a wheel of 200 MB would take over an hour."""
REDIRECTS = 5
"""How often a server may send on. requests' own 30, each of them slow, would take minutes."""
LARGEST_STATEMENT = 4_000_000
"""Bytes beyond which a file of statements is not read; a statement has some ten thousand."""
LARGEST_WHEEL = 10_000_000_000
"""Bytes beyond which a download is given up; the largest known wheel has under 5 GB."""
BUILDERS = 16
"""How many statements of one file are looked at."""

Result = TypeVar("Result")


class CacheError(VoltforgeError):
    """The shared cache has no usable address, does not take a wheel, or gave something that cannot be used."""


@dataclass(frozen=True)
class CachedWheel:
    """A wheel from the cache."""

    wheel: Path
    """Where it lies now; its bytes have the hash that a trusted key has signed."""
    provenance: Provenance
    """What the signed statement says of it."""


@dataclass(frozen=True)
class CacheMiss:
    """No wheel from the cache."""

    why: str = ""
    """What it or its server did wrong, a sentence; empty if it simply does not have the wheel."""


@dataclass(frozen=True)
class SharedCache:
    """A folder or an address with finished wheels, and for each build a statement that names its wheel.

    ``keys/<first two digits of the build's key>/<key>.intoto.jsonl`` has a signed statement a line, each by another
    builder, all of the same wheel; ``wheels/<sha256>/<file>`` is the wheel.
    """

    address: str
    """An absolute folder, or a file:, http: or https: address, which may hold credentials."""
    patience: Patience = field(default=Patience(attempts=2))
    offline: bool = False
    """Whether only a folder may be asked."""
    ask_indexes: Callable[[], Indexes] = field(default=index.configured, repr=False)
    """Gives the certificates that this machine trusts, where a wheel is given to a server."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> SharedCache | None:
        """The cache that ``VOLTFORGE_CACHE`` names, if it names one. ``VOLTFORGE_OFFLINE=1``: no network.

        Raises:
            CacheError: it is neither a folder nor such an address.
        """
        address = environ.get("VOLTFORGE_CACHE", "").strip()
        if not address:
            return None
        offline = Store.from_environment(Path(), environ).offline
        return cls(_normalised_address(address), offline=offline, ask_indexes=partial(index.configured, dict(environ)))

    def __str__(self) -> str:
        return redacted(self.address)

    def find(self, key: str, trust: Trust, downloads: Store) -> CachedWheel | CacheMiss:
        """The wheel that was built under a key, as a key of ``trust`` has signed it; fetched into ``downloads``.

        Whatever the cache does, or does not do, is a miss, within minutes; nothing is raised for it.
        """
        if not trust:
            why = "no key is trusted; the file that VOLTFORGE_TRUSTED names is to have its builders' public keys"
            return CacheMiss(f"{self}: {why}")
        if self._local is None and (self.offline or downloads.offline):
            return CacheMiss(f"{self}: VOLTFORGE_OFFLINE forbids to ask it")
        try:
            return self._fetch(key, trust, downloads)
        except NotFetchedError as error:
            tries = [f"{one.place}: {one.outcome}" for missing in error.missing for one in missing.attempts]
            return CacheMiss("; ".join(tries))
        except VoltforgeError as error:
            return CacheMiss(error.what)
        except Exception as error:
            # requests, urllib3 and json raise more types for what a server says than they document, and a cache
            # that is broken must not break a build.
            return CacheMiss(f"{self}: what it gave cannot be read ({type(error).__name__})")

    def put(self, key: str, wheel: Path, envelope: bytes) -> bool:
        """Give the cache a wheel and the signed statement that it was built under ``key``.

        The wheel goes first, so that no statement ever names what is not there. Statements of other builders of the
        same wheel stay. Gives whether anything had to be written.

        Raises:
            CacheError: the cache cannot be written, has another wheel under this key, or the statement is not signed
                or of something else.
        """
        if self._local is None and self.offline:
            raise CacheError(f"{self} was given nothing: VOLTFORGE_OFFLINE forbids to ask it", hint="unset it")
        made = _checked_provenance(key, wheel, envelope)
        with self._open(self.ask_indexes) as place:
            there = place.read(_statements_path(key)) or b""
            others = _matching_statements(there, key, made, place.shown(_statements_path(key)))
            size, path = wheel.stat().st_size, _wheel_path(made)
            missing = place.size(path) != size
            if missing:
                place.write(path, wheel)
                if place.size(path) not in (size, UNKNOWN):
                    raise CacheError(
                        f"{place.shown(path)} was taken, but is not there whole", hint="look at the log of its server"
                    )
            kept = [line for line in others if line == envelope or _signers(line) != _signers(envelope)]
            lines = b"".join(kept if envelope in kept else [*kept, envelope])
            if lines != there:
                place.write(_statements_path(key), lines)
            return missing or lines != there

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
            made = _trusted_provenance(lines, key, trust, place.shown(_statements_path(key)))
            address = place.address(_wheel_path(made))
        # Its own mirrors and indexes have no finished wheels: to ask them would cost time.
        store = replace(
            downloads, mirrors=(), patience=self.patience, ask_indexes=lambda: _LimitedIndexes(**vars(ask()))
        )
        return CachedWheel(store.get(Artifact(made.file, made.sha256, url=address)), made)


# --- statements ---


def _statements_path(key: str) -> str:
    return f"keys/{key[:2]}/{key}.intoto.jsonl"


def _wheel_path(made: Provenance) -> str:
    return f"wheels/{made.sha256}/{made.file}"


def _trusted_provenance(lines: bytes, key: str, trust: Trust, shown: str) -> Provenance:
    """What the first statement says that a trusted key has signed of this build.

    Raises:
        CacheError: there is none; what is wrong with the first of all.
    """
    problems = []
    for line in lines.splitlines(keepends=True)[:BUILDERS]:
        try:
            return _provenance_of_build(signing.verified(line, trust), key)
        except VoltforgeError as problem:
            problems.append(f"{problem.what}; {problem.hint}" if problem.hint else problem.what)
    raise CacheError(f"{shown}: {problems[0] if problems else 'it is empty'}")


def _provenance_of_build(payload: bytes, key: str) -> Provenance:
    """What a statement says of the wheel that was built under a key.

    Raises:
        VoltforgeError: it is of another build, or is no statement on a wheel.
    """
    made = provenance.read(payload)
    if made.build_key != key:
        raise CacheError(f"the statement is of another build, {made.build_key}")
    return made


def _checked_provenance(key: str, wheel: Path, envelope: bytes) -> Provenance:
    """What is to be given to the cache, if it belongs together.

    Raises:
        CacheError: the statement is not signed, or not of this wheel and build.
    """
    try:
        made = _provenance_of_build(signing.payload(envelope), key)
        if not _signers(envelope):
            raise CacheError("nobody has signed the statement, so nobody would believe it")
        if (made.file, made.sha256) != (wheel.name, files.sha256(wheel)):
            raise CacheError(f"the statement is of {made.file} with sha256 {made.sha256}")
    except OSError as error:
        raise CacheError(f"{wheel} cannot be read: {error.strerror}") from error
    except VoltforgeError as problem:
        hint = "./doit key signs what the wheelhouse has"
        raise CacheError(f"{wheel.name} cannot be shared: {problem.what}", hint=hint) from problem
    return made


def _matching_statements(lines: bytes, key: str, made: Provenance, shown: str) -> list[bytes]:
    """The statements that are there already and say the same of this build; what cannot be used is left out.

    Raises:
        CacheError: one says that the build has given another wheel.
    """
    same = []
    for line in lines.splitlines(keepends=True)[:BUILDERS]:
        try:
            other = _provenance_of_build(signing.payload(line), key)
        except VoltforgeError as problem:
            console.warn(f"{shown}: {problem.what}; it is replaced")
            continue
        if other.sha256 != made.sha256:
            raise CacheError(
                f"{shown} is of another wheel: the same build gave sha256 {other.sha256} there and {made.sha256} here",
                hint="./doit reproduce shows whether it gives the same bytes twice; nothing was overwritten",
            )
        same.append(line)
    return same


def _signers(envelope: bytes) -> set[str]:
    return {one["keyid"] for one in json.loads(envelope)["signatures"]}


# --- addresses ---


def _normalised_address(address: str) -> str:
    """An address or an absolute folder, from what a person wrote.

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
    except (ValueError, RuntimeError):  # a port that is no number; the ~ of an unknown user
        pass
    shown = redacted(address) if "://" in address or not colon else f"{scheme}:…"
    raise CacheError(
        f"VOLTFORGE_CACHE is {shown}, which is neither a folder nor a whole http, https or file address",
        hint="VOLTFORGE_CACHE=/a/folder or VOLTFORGE_CACHE=https://host/path, with %40 for an @ in a password",
    )


# --- places ---

UNKNOWN = -1
"""The size of a file whose server does not say it."""


@dataclass(frozen=True)
class _CacheFolder:
    root: Path

    def shown(self, path: str) -> str:
        return str(self.root / path)

    def address(self, path: str) -> str:
        return (self._file(path) or self.root / path).absolute().as_uri()

    def _file(self, path: str) -> Path | None:
        """A file, or ``None`` if there is none.

        Raises:
            CacheError: it is something else; to open a pipe could wait forever.
        """
        file = self.root / path
        if file.exists() and not file.is_file():
            raise CacheError(f"{file} is not a file")
        return file if file.exists() else None

    def read(self, path: str) -> bytes | None:
        """A small file, or ``None`` if there is none.

        Raises:
            CacheError: it cannot be read, or is not small.
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
        """The bytes of a file, ``None`` if there is none."""
        try:
            file = self._file(path)
            return file.stat().st_size if file else None
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: str, error: OSError) -> CacheError:
        return CacheError(f"{self.root / path} cannot be read: {error.strerror}")

    def write(self, path: str, source: Path | bytes) -> None:
        """Put a file there, and the folders that it needs.

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
        """A small file, or ``None`` if there is none.

        Raises:
            CacheError: there is no good answer in time, or the file is not small.
        """
        with self._errors_explained(path):
            return _with_timeout(ANSWER, lambda: self._read(path))

    def _read(self, path: str) -> bytes | None:
        end, data = time.monotonic() + ANSWER, b""
        with self._request("GET", path, stream=True) as response:
            if response.status_code in (404, 410):
                return None
            self._raise_for_status(path, response)
            # read1 gives what has come; time would pass unseen in waiting for a whole block.
            while block := response.raw.read1(files.BLOCK, decode_content=True):
                data += block
                _raise_if_large(data, self.shown(path))
                if time.monotonic() > end:  # nobody waits for it any more
                    raise requests.Timeout
        return data

    def size(self, path: str) -> int | None:
        """The bytes of a file, ``None`` if it cannot be had, or ``UNKNOWN``."""
        with self._errors_explained(path):
            response = self._request("HEAD", path, allow_redirects=True)
        length = response.headers.get("Content-Length", "")
        return None if response.status_code != 200 else int(length) if length.isdecimal() else UNKNOWN

    def write(self, path: str, source: Path | bytes) -> None:
        """Put a file there, and the folders that it needs.

        Raises:
            CacheError: the server does not take it.
        """
        with self._errors_explained(path):
            refusals = self._make_folders(path)
            try:
                response = self._put(path, source)
            except requests.ConnectionError:
                # A server that refuses may hang up before it has read everything, and then its answer is lost.
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
        """Make the folders of a file (RFC 4918, section 9.3), and give the answers that refuse more than that.

        Before the file, for what is uploaded to a missing folder is refused only after it was sent; nginx says 500.
        That a folder is there already is 405, as is that the server makes none: the upload tells.
        """
        folders = ["", *(f"{folder}/" for folder in reversed(Path(path).parents[:-1]))]
        answers = [self._request("MKCOL", folder, allow_redirects=False) for folder in folders]
        return [answer for answer in answers if answer.status_code in (401, 403, 507)]

    def _request(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"Accept-Encoding": "identity"}
        return self.session.request(method, self.address(path), headers=headers, timeout=index.TIMEOUT, **more)

    @contextlib.contextmanager
    def _errors_explained(self, path: str) -> Iterator[None]:
        """Put what goes wrong on the way in words that hold no credentials."""
        try:
            yield
        except requests.RequestException as error:
            hint = "see whether its server runs, and what VOLTFORGE_CACHE is"
            raise CacheError(f"{self.shown(path)}: {explained(error, self.indexes)}", hint=hint) from error
        except urllib3.exceptions.ReadTimeoutError as error:  # this and the next are what the bare body raises
            raise CacheError(f"{self.shown(path)}: stopped sending") from error
        except urllib3.exceptions.HTTPError as error:
            raise CacheError(f"{self.shown(path)}: broke off its answer, or garbled it") from error

    def _raise_for_status(self, path: str, response: requests.Response, *, writing: bool = False) -> None:
        """Let only success pass.

        Raises:
            CacheError: what the answer means, and what to try.
        """
        status = response.status_code
        if status in (200, 201, 204) if writing else status == 200:
            return
        if writing and response.is_redirect:
            target = redacted(response.headers["Location"])
            raise CacheError(f"{self.shown(path)} is sent on to {target}", hint="name the other in VOLTFORGE_CACHE")
        known = _MEANINGS if writing or status == 401 else {}
        meaning, hint = known.get(status, ("", "look at the log of its server"))
        raise CacheError(f"{self.shown(path)} {answered(response)}{meaning}", hint=hint)


_MEANINGS: Mapping[int, tuple[str, str]] = {
    401: (
        ": it wants a user and a password, or others",
        "VOLTFORGE_CACHE=https://user:password@host/path, or a line for its host in ~/.netrc",
    ),
    403: (": this user may not write there", "ask for the right to write, or name another user in VOLTFORGE_CACHE"),
    404: (": it has no such folder and makes none", "make the folder on the server, or correct VOLTFORGE_CACHE"),
    405: (
        ": it gives files and takes none",
        "allow uploads (nginx: dav_methods PUT MKCOL), or name the folder that it serves in VOLTFORGE_CACHE",
    ),
    409: (
        ": it has no such folder and makes none",
        "make it on the server, or let uploads make folders (nginx: create_full_put_path on)",
    ),
    413: (": the wheel is too large for it", "raise the server's limit (nginx: client_max_body_size)"),
    500: ("", "look at the log of its server; nginx answers so where a folder is missing: create_full_put_path on"),
    501: (": it does not know uploads", "name a WebDAV server or a folder in VOLTFORGE_CACHE"),
    507: (": its disk is full", "remove old files of keys/ and then of wheels/ there"),
}
"""What a refused upload means, and what to try, by status (RFC 9110, section 15.5; RFC 4918, section 11)."""


def _raise_if_large(data: bytes, shown: str) -> None:
    if len(data) > LARGEST_STATEMENT:
        raise CacheError(f"{shown} is larger than {files.size(LARGEST_STATEMENT)}, and no statement is")


class _UploadFile(io.FileIO):
    """A file that says how far it has been read."""

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
        self._advance(after - before)  # an upload that begins anew
        return after


# --- time ---


def _with_timeout(seconds: float, work: Callable[[], Result]) -> Result:
    """What ``work`` gives, unless it takes longer; then it goes on unheeded until its connection or the process ends.

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
    """Whether a download is fast enough, and ends."""

    total: int = 0
    count: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        """So many bytes more.

        Raises:
            CacheError: they are too few for the time, or too many for a wheel.
        """
        self.total += count
        self.count += count
        passed = time.monotonic() - self.start
        if self.total > LARGEST_WHEEL:
            raise CacheError(f"the shared cache sends more than {files.size(LARGEST_WHEEL)} for one wheel")
        if passed >= WINDOW:
            if self.count < SLOWEST * passed:
                raise CacheError(f"the shared cache is too slow: {files.size(self.count / passed)} in a second")
            self.count, self.start = 0, time.monotonic()


class _LimitedAdapter(BaseAdapter):
    """Sends requests as another does, and bounds the time that they take."""

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
    """The same certificates and proxies, for a server that nobody has to wait for."""

    def session(self, patience: Patience | None = None) -> requests.Session:
        session = super().session(patience)
        session.max_redirects = REDIRECTS
        pace = _DownloadSpeed()
        for scheme, adapter in list(session.adapters.items()):
            session.mount(scheme, _LimitedAdapter(adapter, pace))
        return session
