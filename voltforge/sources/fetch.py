"""Download files by hash: from the cache, a mirror, the package index, upstream or the distribution's archive."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

import requests

from voltforge.errors import listed
from voltforge.sources import distro, index
from voltforge.sources.index import HASH, Indexes, Patience, explained
from voltforge.sources.threads import Halt, run_in_threads
from voltforge.sources.transfer import AbsentError, FetchError, LocationError, PartialFile, StoreWriteError, Transfer
from voltforge.system import console, files
from voltforge.system.urls import local_path, redacted

AT_ONCE = 4
"""The number of files that download at the same time, and so of connections: as many as browsers open to one host."""
WAIT = 0.2
"""Seconds between two checks whether another process still downloads a file."""


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


class DownloadError(FetchError):
    """All locations of one or more files failed."""

    def __init__(self, missing: Sequence[Missing], folder: Path, *, offline: bool) -> None:
        problems = []
        for file in missing:
            known = f", {files.size(file.artifact.size)}" if file.artifact.size else ""
            tries = "".join(f"\n      {attempt.place}: {attempt.outcome}" for attempt in file.attempts)
            homes = "; it is " + " or ".join(_homes(file.artifact)) if offline and _homes(file.artifact) else ""
            problems.append(f"{file.artifact.file}, sha256 {file.artifact.sha256}{known}{homes}{tries}")
        count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        why = "missing, and VOLTFORGE_OFFLINE forbids downloads" if offline else "could not be downloaded"
        hint = f"put each file into {folder}, or into a folder or server that VOLTFORGE_MIRRORS names"
        super().__init__(f"{count} {why}:{listed(problems)}", hint=hint)
        self.missing = tuple(missing)
        self.folder = folder
        self.offline = offline


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
        for artifact, got in run_in_threads(
            partial(self._had, halt=halt), [*dict.fromkeys(artifacts)], self.at_once, halt
        ):
            if isinstance(got, Missing):
                missing[artifact] = got
            else:
                yield artifact, got
        if missing:
            lost = [missing[artifact] for artifact in dict.fromkeys(artifacts) if artifact in missing]
            raise DownloadError(lost, self.folder, offline=self.offline)

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
        except LocationError:
            return Missing(artifact, tuple(attempts))
        except OSError as error:
            raise StoreWriteError(Path(error.filename or self.folder), error) from error

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
                except AbsentError as problem:
                    refusal = str(problem)
                except LocationError as problem:
                    refusal = str(problem)
                    break
                except requests.RequestException as error:
                    refusal = explained(error, self.indexes)
                    break
            halt.check()
            attempts.append(Attempt(place.shown, refusal))
            if not self.offline:
                console.note(f"{artifact.file}: {place.shown} {refusal}")
        raise LocationError("is given by no location")

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
        with PartialFile(target.parent / f"{artifact.sha256}.part") as part:
            actual = Transfer(
                artifact.file, artifact.size, artifact.sha256, address, proxies, session, part, self.patience, halt
            ).run()
            if actual != artifact.sha256:
                raise LocationError(self._set_aside(part.path, artifact, actual))
            part.become(target)
        return target

    def _set_aside(self, path: Path, artifact: Artifact, actual: str) -> str:
        """Move a file with a wrong hash to ``rejected/`` and describe it."""
        rejected = self.folder / "rejected" / f"{artifact.file}-{actual}"
        rejected.parent.mkdir(parents=True, exist_ok=True)
        path.replace(rejected)
        return f"gave {_wrong(artifact, actual)}; stored for inspection as {rejected}"


def _wait_for(lock: IO[bytes], halt: Halt) -> None:
    """Wait until no other process holds the lock, or until the download is stopped."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            halt.pause(WAIT)
        else:
            return


def _copy(path: Path, target: Path, artifact: Artifact) -> None:
    """Copy a file from a folder of someone else, which is not changed."""
    digest = hashlib.sha256()
    try:
        source = path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AbsentError("does not have it") from error
    except OSError as error:
        raise LocationError(f"cannot be read: {error.strerror}") from error
    with source, files.replacing(target) as sink:
        while block := source.read(files.BLOCK):
            digest.update(block)
            sink.write(block)
        if digest.hexdigest() != artifact.sha256:
            raise LocationError(f"gave {_wrong(artifact, digest.hexdigest())}")


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
