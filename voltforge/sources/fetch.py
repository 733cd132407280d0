"""Download files by hash: from the cache, a mirror, the package index, upstream or the distribution's archive."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

import requests
import urllib3

from voltforge.errors import VoltforgeError, listed, remedy
from voltforge.sources import distro, index
from voltforge.sources.index import HASH, Indexes, Patience, answered, explained
from voltforge.sources.threads import Halt, each
from voltforge.system import console, files
from voltforge.system.urls import local_path, redacted

MOST = 64 * 10**9
"""Bytes; a file of unknown size is not downloaded beyond this."""
AT_ONCE = 4
"""The number of files that download at the same time, and so of connections: as many as browsers open to one host."""
WAIT = 0.2
"""Seconds between two checks whether another process still downloads a file."""
LEAST = 1000
"""Bytes that a server must send within index.TIMEOUT."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
"""A Content-Range header (RFC 9110, section 14.4)."""


@dataclass(frozen=True)
class Artifact:
    """A file known by its hash, and its locations. It can have several, or none but mirrors."""

    file: str
    """Its name: ``vllm-0.12.0.tar.gz``."""
    sha256: str
    """Its SHA-256, 64 lower-case hexadecimal digits."""
    size: int | None = None
    """Its size in bytes if known; a larger file is refused."""
    index: str | None = None
    """The project on the configured package index that has the file."""
    url: str | None = None
    """Its upstream address, http or https."""
    pool: str | None = None
    """Its path in the distribution's archive: ``pool/main/h/hello/hello_2.10-3_amd64.deb``."""


@dataclass(frozen=True)
class Attempt:
    """One attempt to get a file."""

    place: str
    """The location, without credentials."""
    outcome: str
    """The result, as the rest of a sentence about the location."""


@dataclass(frozen=True)
class Missing:
    """A file that could not be downloaded."""

    artifact: Artifact
    attempts: tuple[Attempt, ...]


class FetchError(VoltforgeError):
    """A file could not be downloaded or stored."""


class NotFetchedError(FetchError):
    """All locations of one or more files failed."""

    def __init__(self, missing: Sequence[Missing], folder: Path, *, offline: bool) -> None:
        problems = []
        for one in missing:
            known = f", {files.size(one.artifact.size)}" if one.artifact.size else ""
            tries = "".join(f"\n      {attempt.place}: {attempt.outcome}" for attempt in one.attempts)
            homes = "; it is " + " or ".join(_homes(one.artifact)) if offline and _homes(one.artifact) else ""
            problems.append(f"{one.artifact.file}, sha256 {one.artifact.sha256}{known}{homes}{tries}")
        count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        why = "missing, and VOLTFORGE_OFFLINE forbids downloads" if offline else "could not be downloaded"
        hint = f"put each file into {folder}, or into a folder or server that VOLTFORGE_MIRRORS names"
        super().__init__(f"{count} {why}:{listed(problems)}", hint=hint)
        self.missing = tuple(missing)
        self.folder = folder
        self.offline = offline


class NotKeptError(FetchError):
    """A file could not be written: the disk is full, the folder belongs to another user, …"""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be written: {error.strerror or error}",
            hint=remedy(error.strerror, "correct the folder's owner and mode"),
        )
        self.path = path
        self.errno = error.errno


class _RefusedError(Exception):
    """A location does not give the file; the message is the rest of a sentence about it."""


class _AbsentError(_RefusedError):
    """A location answered that it does not have the file."""


class _CutError(Exception):
    """A body ended too early: its bytes are good, the rest can be requested."""


@dataclass(frozen=True)
class _Place:
    shown: str
    addresses: tuple[str, ...]
    """The names under which the location may have the file, tried in order."""
    proxies: Mapping[str, str | None] | None = None


@dataclass(frozen=True)
class Store:
    """The folder of downloads, and the locations for files that it lacks.

    A file is stored as ``<folder>/<first 16 digits of its sha256>/<file>``; a copy of the folder is a good mirror. A
    file that a person puts at ``<folder>/<file>`` works as well. Files with a wrong hash are moved to ``rejected/``.
    """

    folder: Path
    mirrors: tuple[str, ...] = ()
    """Folders and URLs to try first, in order. Each has files by name, by sha256, or in the layout of a store."""
    offline: bool = False
    """True if only locations on this machine may be used."""
    ask_indexes: Callable[[], Indexes] = field(default=index.configured, repr=False)
    """Return ``indexes``; called at most once, and only for a missing file."""
    ask_archives: Callable[[], tuple[str, ...]] = field(default=distro.mirrors, repr=False)
    """Return ``archives``; called at most once, and only for a missing file."""
    patience: Patience = field(default=Patience())
    at_once: int = AT_ONCE
    """The number of files that download at the same time."""
    _asking: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False, compare=False)
    """cached_property has no lock of its own from Python 3.12 on."""

    @classmethod
    def from_environment(cls, folder: Path, environ: Mapping[str, str] = os.environ) -> Store:
        """Return a store configured by environment variables.

        ``VOLTFORGE_MIRRORS``: URLs or folders, separated by spaces or commas. ``VOLTFORGE_OFFLINE=1``: no network.
        """
        return cls(
            folder,
            mirrors=tuple(mirror for mirror in re.split(r"[\s,]+", environ.get("VOLTFORGE_MIRRORS", "")) if mirror),
            offline=environ.get("VOLTFORGE_OFFLINE", "").lower() not in ("", "0", "no", "false"),
            ask_indexes=partial(index.configured, dict(environ)),
            ask_archives=partial(distro.mirrors, dict(environ)),
        )

    def holds(self, artifact: Artifact) -> bool:
        """Return True if the file is stored, by its name and size; ``get`` checks its hash."""
        for path in self._paths(artifact):
            with contextlib.suppress(OSError):
                if path.is_file() and artifact.size in (None, path.stat().st_size):
                    return True
        return False

    def get(self, artifact: Artifact) -> Path:
        """Return the file with its hash checked; download it if it is missing.

        Raises:
            FetchError: no location has these bytes, or they cannot be stored.
        """
        return self.get_all([artifact])[0]

    def get_all(self, artifacts: Sequence[Artifact]) -> list[Path]:
        """Return all files in order, several downloading at the same time; see ``get``.

        Raises:
            NotFetchedError: names every file that could not be downloaded, after all others were.
            NotKeptError: a file cannot be written.
        """
        paths = dict(self.arriving(artifacts))
        return [paths[artifact] for artifact in artifacts]

    def arriving(self, artifacts: Sequence[Artifact]) -> Generator[tuple[Artifact, Path], None, None]:
        """Yield each file as soon as it is stored, while others are downloading; see ``get_all``.

        Close the generator if not all files are needed: running downloads stop, and the next run resumes them.

        Raises:
            NotFetchedError, NotKeptError: as ``get_all``.
        """
        for artifact in artifacts:
            _check(artifact)
        halt = Halt()
        missing: dict[Artifact, Missing] = {}
        # A file that is named twice is downloaded once: the second thread would only wait for the first one's lock.
        for artifact, got in each(partial(self._had, halt=halt), [*dict.fromkeys(artifacts)], self.at_once, halt):
            if isinstance(got, Missing):
                missing[artifact] = got
            else:
                yield artifact, got
        if missing:
            lost = [missing[artifact] for artifact in dict.fromkeys(artifacts) if artifact in missing]
            raise NotFetchedError(lost, self.folder, offline=self.offline)

    @property
    def indexes(self) -> Indexes:
        """The package indexes that this machine is configured for."""
        with self._asking:
            return self._indexes

    @property
    def archives(self) -> tuple[str, ...]:
        """The mirrors of the distribution's archive that this machine is configured for."""
        with self._asking:
            return self._archives

    @cached_property
    def _indexes(self) -> Indexes:
        return self.ask_indexes()

    @cached_property
    def _archives(self) -> tuple[str, ...]:
        return self.ask_archives()

    def _had(self, artifact: Artifact, halt: Halt) -> Path | Missing:
        attempts: list[Attempt] = []
        try:
            return self._good(artifact) or self._locked(artifact, attempts, halt)
        except _RefusedError:
            return Missing(artifact, tuple(attempts))
        except OSError as error:
            raise NotKeptError(Path(error.filename or self.folder), error) from error

    def _kept(self, artifact: Artifact) -> Path:
        return self.folder / artifact.sha256[:16] / artifact.file

    def _paths(self, artifact: Artifact) -> tuple[Path, Path]:
        return self._kept(artifact), self.folder / artifact.file

    def _good(self, artifact: Artifact) -> Path | None:
        for path in self._paths(artifact):
            if path.is_file() and files.sha256(path) == artifact.sha256:
                return path
        return None

    def _locked(self, artifact: Artifact, attempts: list[Attempt], halt: Halt) -> Path:
        """Return the file, downloaded if necessary, by one process at a time."""
        folder = self._kept(artifact).parent
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.note(f"{artifact.file}: waiting for another process that downloads it")
                _wait_for(lock, halt)
            if path := self._good(artifact):
                return path
            self._judge(artifact, attempts)
            with self.indexes.session(self.patience) as session:
                return self._download(artifact, session, attempts, halt)

    def _judge(self, artifact: Artifact, attempts: list[Attempt]) -> None:
        """Report stored files with a wrong hash; files of the store's own layout are moved aside."""
        kept, brought = self._paths(artifact)
        for path in (kept, brought):
            if path.is_file():
                actual = files.sha256(path)
                outcome = f"gave {_wrong(artifact, actual)}"
                if path == kept:
                    outcome = self._set_aside(path, artifact, actual)
                attempts.append(Attempt(str(path), outcome))
                console.warn(f"{path} {outcome}")

    def _download(self, artifact: Artifact, session: requests.Session, attempts: list[Attempt], halt: Halt) -> Path:
        for place in self._places(artifact, session, attempts):
            for address in place.addresses:
                try:
                    return self._take(artifact, address, place.proxies, session, halt)
                except _AbsentError as problem:
                    refusal = str(problem)
                except _RefusedError as problem:
                    refusal = str(problem)
                    break
                except requests.RequestException as error:
                    refusal = explained(error, self.indexes)
                    break
            halt.check()
            attempts.append(Attempt(place.shown, refusal))
            if not self.offline:
                console.note(f"{artifact.file}: {place.shown} {refusal}")
        raise _RefusedError

    def _places(self, artifact: Artifact, session: requests.Session, attempts: list[Attempt]) -> Iterator[_Place]:
        """Yield the locations of a file, nearest first; locations without it go to ``attempts``."""
        for mirror in self.mirrors:
            if self._allowed(mirror):
                names = (artifact.file, artifact.sha256, f"{artifact.sha256[:16]}/{artifact.file}")
                yield _Place(redacted(mirror), tuple(f"{mirror.rstrip('/')}/{_quoted(mirror, name)}" for name in names))
        if artifact.index:
            yield from self._links(artifact, artifact.index, session, attempts)
        if artifact.url and self._allowed(artifact.url):
            yield _Place(redacted(artifact.url), (artifact.url,))
        for base in self.archives if artifact.pool else ():
            if self._allowed(base):
                address = f"{base.rstrip('/')}/{artifact.pool}"
                yield _Place(redacted(address), (address,), distro.proxies(base))

    def _links(
        self, artifact: Artifact, project: str, session: requests.Session, attempts: list[Attempt]
    ) -> Iterator[_Place]:
        for place in self.indexes.places:
            if not self._allowed(place):
                continue
            try:
                link = self.indexes.look(place, project, artifact.file, session)
            except index.UNREADABLE as error:
                attempts.append(Attempt(redacted(place), explained(error, self.indexes)))
                continue
            if link is None:
                attempts.append(Attempt(redacted(place), "does not have it"))
            elif link.sha256 not in (None, artifact.sha256):
                attempts.append(Attempt(redacted(place), f"has a file of that name with sha256 {link.sha256}"))
            elif self._allowed(link.url):
                yield _Place(redacted(link.url), (link.url,))

    def _allowed(self, address: str) -> bool:
        return not self.offline or local_path(address) is not None

    def _take(
        self,
        artifact: Artifact,
        address: str,
        proxies: Mapping[str, str | None] | None,
        session: requests.Session,
        halt: Halt,
    ) -> Path:
        target = self._kept(artifact)
        if path := local_path(address):
            _copy(path, target, artifact)
            return target
        with _Part(target.parent / f"{artifact.sha256}.part") as part:
            actual = _Transfer(artifact, address, proxies, session, part, self.patience, halt).run()
            if actual != artifact.sha256:
                raise _RefusedError(self._set_aside(part.path, artifact, actual))
            part.become(target)
        return target

    def _set_aside(self, path: Path, artifact: Artifact, actual: str) -> str:
        """Move a file with a wrong hash to ``rejected/`` and describe it."""
        rejected = self.folder / "rejected" / f"{artifact.file}-{actual}"
        rejected.parent.mkdir(parents=True, exist_ok=True)
        path.replace(rejected)
        return f"gave {_wrong(artifact, actual)}; stored for inspection as {rejected}"


class _Part:
    """The downloaded part of a file, and its hash. It survives a killed run, and the next run resumes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> _Part:
        self._file: IO[bytes] = self.path.open("a+b", buffering=0)
        self._file.seek(0)
        while block := self._file.read(files.BLOCK):
            self._digest.update(block)
            self.count += len(block)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, block: bytes) -> None:
        try:
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:  # a full disk must not look like a broken connection
            raise NotKeptError(self.path, error) from error
        self._digest.update(block)
        self.count += len(block)

    def restart(self) -> None:
        self._file.truncate(0)
        self.count = 0
        self._digest = hashlib.sha256()

    def become(self, target: Path) -> None:
        """Replace ``target``, as ``files.replacing`` does, which cannot resume."""
        os.fsync(self._file.fileno())
        self.path.replace(target)
        files.sync_folder(target.parent)


@dataclass
class _Transfer:
    """One download from one URL into a part, resumed whenever the connection breaks (RFC 9110, section 14: range
    requests).
    """

    artifact: Artifact
    address: str
    proxies: Mapping[str, str | None] | None
    session: requests.Session
    part: _Part
    patience: Patience
    halt: Halt
    validator: str = ""
    """The ETag or date of the version that was begun, so that another version is never appended to it."""
    whole: bool = False
    """True to request no ranges: the server or the stored part was wrong."""
    mixed: bool = False
    """The part holds bytes of several answers."""

    def run(self) -> str:
        """Download the rest of the part and return its hash.

        Raises:
            _RefusedError, requests.RequestException, NotKeptError
        """
        size = self.artifact.size
        self.mixed = self.part.count > 0
        with console.download(self.artifact.file, size, self.part.count) as advance:
            self._receive_all(advance)
            if self.part.sha256 != self.artifact.sha256 and self.mixed:
                # An earlier location or version may have given the bad bytes: test this one alone.
                advance(-self.part.count)
                self.part.restart()
                self._receive_all(advance)
        return self.part.sha256

    def _receive_all(self, advance: Callable[[int], None]) -> None:
        failures, best = 0, self.part.count
        while self.artifact.size is None or self.part.count != self.artifact.size or not self.part.count:
            try:
                if self._receive(advance):
                    return
            except _CutError as cut:
                self.halt.check()
                if self.part.count - best >= files.BLOCK:
                    failures, best = 0, self.part.count
                failures += 1
                if failures >= self.patience.attempts:
                    raise _RefusedError(f"{cut}, {failures} times") from cut
                self.halt.pause(self.patience.pause(failures))

    def _receive(self, advance: Callable[[int], None]) -> bool:
        """Send one request and store its body; return True if the file is complete."""
        with self._ask() as response:
            if response.status_code == 416 and self.part.count and not self.whole:
                if response.headers.get("Content-Range", "") == f"bytes */{self.part.count}":
                    return True
                self.whole = True
                return False
            if response.status_code == 206 and not self._continues(response):
                if self.whole or not self.part.count:
                    raise _RefusedError("sent another range than the requested one")
                self.whole = True
                return False
            _refuse_status(response)
            if response.status_code == 206:
                self.mixed = True
            else:
                advance(-self.part.count)
                self.part.restart()
            etag = response.headers.get("ETag", "")
            self.validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            self._refuse_size(response)
            with self.halt.waking(response.raw.shutdown):
                self._receive_body(response, advance)
        return True

    def _ask(self) -> requests.Response:
        # Raw bytes: with a content encoding, ranges and sizes would count encoded bytes.
        headers = {"Accept-Encoding": "identity"}
        if self.part.count and not self.whole:
            headers["Range"] = f"bytes={self.part.count}-"
            if self.validator:
                headers["If-Range"] = self.validator
        proxies = dict(self.proxies) if self.proxies else None
        return self.session.get(
            self.address, headers=headers, stream=True, timeout=index.TIMEOUT, proxies=proxies,  # type: ignore[arg-type]
        )  # fmt: skip

    def _continues(self, response: requests.Response) -> bool:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if not match:
            return False
        start, end, total = int(match[1]), int(match[2]), match[3]
        if total == "*":
            return start == self.part.count <= end
        return start == self.part.count <= end == int(total) - 1 and self.artifact.size in (None, int(total))

    def _refuse_size(self, response: requests.Response) -> None:
        length = response.headers.get("Content-Length", "")
        if self.artifact.size is not None and re.fullmatch(r"\d{1,18}", length, re.ASCII):
            offered = self.part.count + int(length)
            if offered != self.artifact.size:
                raise _RefusedError(f"offers {offered} bytes instead of {self.artifact.size}")

    def _receive_body(self, response: requests.Response, advance: Callable[[int], None]) -> None:
        size = self.artifact.size
        most = MOST if size is None else size
        moment, before = time.monotonic(), self.part.count
        while True:
            try:
                # read1 returns what has arrived; read and stream would lose up to a block when the connection breaks.
                block = response.raw.read1(files.BLOCK, decode_content=False)
            except urllib3.exceptions.ReadTimeoutError as error:
                raise _CutError("stopped sending") from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise _CutError("broke off in the middle of the file") from error
            self.halt.check()
            if not block:
                break
            if self.part.count + len(block) > most:
                self.part.restart()
                raise _RefusedError(f"sends more than the expected {most} bytes")
            self.part.add(block)
            advance(len(block))
            if time.monotonic() - moment > index.TIMEOUT[1]:
                if self.part.count - before < LEAST:
                    raise _CutError("sends almost nothing")
                moment, before = time.monotonic(), self.part.count
        if size is not None and self.part.count < size:
            raise _CutError(f"sends only {self.part.count} bytes")


def _wait_for(lock: IO[bytes], halt: Halt) -> None:
    """Wait until no other process holds the lock, or until the download is stopped."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            halt.pause(WAIT)
        else:
            return


def _refuse_status(response: requests.Response) -> None:
    """Accept only the statuses 200 and 206."""
    answer = answered(response)
    if response.status_code in (404, 410):
        raise _AbsentError(answer)
    if response.status_code not in (200, 206):
        raise _RefusedError(answer)


def _copy(path: Path, target: Path, artifact: Artifact) -> None:
    """Copy a file from a folder of someone else, which is not changed."""
    digest = hashlib.sha256()
    try:
        source = path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _AbsentError("does not have it") from error
    except OSError as error:
        raise _RefusedError(f"cannot be read: {error.strerror}") from error
    with source, files.replacing(target) as sink:
        while block := source.read(files.BLOCK):
            digest.update(block)
            sink.write(block)
        if digest.hexdigest() != artifact.sha256:
            raise _RefusedError(f"gave {_wrong(artifact, digest.hexdigest())}")


def _wrong(artifact: Artifact, actual: str) -> str:
    return f"bytes with sha256 {actual}, not {artifact.sha256}"


def _homes(artifact: Artifact) -> list[str]:
    """Return the locations of a file, for people."""
    homes = [f"in project {artifact.index} on the package index"] if artifact.index else []
    homes += [f"at {redacted(artifact.url)}"] if artifact.url else []
    return homes + ([f"at {artifact.pool} in a distribution's archive"] if artifact.pool else [])


def _quoted(mirror: str, name: str) -> str:
    return name if "://" not in mirror else quote(name)


def _check(artifact: Artifact) -> None:
    """Reject names that lead out of the store's folder, and invalid hashes."""
    if artifact.file in ("", ".", "..", "rejected") or Path(artifact.file).name != artifact.file:
        raise FetchError(f"{artifact.file!r} is not a file name", hint="correct it in the recipe")
    if not HASH.fullmatch(artifact.sha256):
        raise FetchError(f"the sha256 of {artifact.file} is not 64 hexadecimal digits", hint="correct it in the recipe")
