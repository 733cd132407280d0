"""Download one file from one address over HTTP, and resume it whenever the connection breaks."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import requests
import urllib3

from voltforge.errors import VoltforgeError, remedy
from voltforge.sources import index
from voltforge.sources.index import Patience, answered
from voltforge.sources.threads import Halt
from voltforge.system import console, files

MOST = 64 * 10**9
"""Bytes; a file of unknown size is not downloaded beyond this."""
LEAST = 1000
"""Bytes that a server must send within index.TIMEOUT."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
"""A Content-Range header (RFC 9110, section 14.4)."""


class FetchError(VoltforgeError):
    """A file could not be downloaded or stored."""


class StoreWriteError(FetchError):
    """A file could not be written: the disk is full, the folder belongs to another user, …"""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be written: {error.strerror or error}",
            hint=remedy(error.strerror, "correct the folder's owner and mode"),
        )
        self.path = path
        self.errno = error.errno


class LocationError(FetchError):
    """A location does not give the file; the message completes a sentence that begins with the location."""


class AbsentError(LocationError):
    """A location answered that it does not have the file."""


class _CutError(Exception):
    """A body ended too early: its bytes are good, the rest can be requested."""


class PartialFile:
    """The downloaded part of a file, and its hash. It survives a killed run, and the next run resumes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> PartialFile:
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
        """The SHA-256 of the stored bytes in hexadecimal digits."""
        return self._digest.hexdigest()

    def add(self, block: bytes) -> None:
        """Append a block.

        Raises:
            NotKeptError: it cannot be written.
        """
        try:
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:  # a full disk must not look like a broken connection
            raise StoreWriteError(self.path, error) from error
        self._digest.update(block)
        self.count += len(block)

    def restart(self) -> None:
        """Discard all stored bytes."""
        self._file.truncate(0)
        self.count = 0
        self._digest = hashlib.sha256()

    def become(self, target: Path) -> None:
        """Replace ``target``, as ``files.replacing`` does, which cannot resume."""
        os.fsync(self._file.fileno())
        self.path.replace(target)
        files.sync_folder(target.parent)


@dataclass
class Transfer:
    """One download from one URL into a part, resumed whenever the connection breaks (RFC 9110, section 14: range
    requests).
    """

    file: str
    """The name of the file, for the progress display."""
    size: int | None
    """Its size in bytes, if known."""
    sha256: str
    """Its SHA-256 in hexadecimal digits."""
    address: str
    proxies: Mapping[str, str | None] | None
    session: requests.Session
    part: PartialFile
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
            RefusedError, requests.RequestException, NotKeptError
        """
        self.mixed = self.part.count > 0
        with console.download(self.file, self.size, self.part.count) as advance:
            self._receive_all(advance)
            if self.part.sha256 != self.sha256 and self.mixed:
                # An earlier location or version may have given the bad bytes: test this one alone.
                advance(-self.part.count)
                self.part.restart()
                self._receive_all(advance)
        return self.part.sha256

    def _receive_all(self, advance: Callable[[int], None]) -> None:
        failures, best = 0, self.part.count
        while self.size is None or self.part.count != self.size or not self.part.count:
            try:
                if self._receive(advance):
                    return
            except _CutError as cut:
                self.halt.check()
                if self.part.count - best >= files.BLOCK:
                    failures, best = 0, self.part.count
                failures += 1
                if failures >= self.patience.attempts:
                    raise LocationError(f"{cut}, in {failures} attempts") from cut
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
                    raise LocationError("sent another range than the requested one")
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
        return start == self.part.count <= end == int(total) - 1 and self.size in (None, int(total))

    def _refuse_size(self, response: requests.Response) -> None:
        length = response.headers.get("Content-Length", "")
        if self.size is not None and re.fullmatch(r"\d{1,18}", length, re.ASCII):
            offered = self.part.count + int(length)
            if offered != self.size:
                raise LocationError(f"offered {offered} bytes instead of {self.size}")

    def _receive_body(self, response: requests.Response, advance: Callable[[int], None]) -> None:
        most = MOST if self.size is None else self.size
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
                raise LocationError(f"sent more than the expected {most} bytes")
            self.part.add(block)
            advance(len(block))
            if time.monotonic() - moment > index.TIMEOUT[1]:
                if self.part.count - before < LEAST:
                    raise _CutError("sent almost nothing")
                moment, before = time.monotonic(), self.part.count
        if self.size is not None and self.part.count < self.size:
            raise _CutError(f"sent only {self.part.count} bytes")


def _refuse_status(response: requests.Response) -> None:
    """Accept only the statuses 200 and 206."""
    answer = answered(response)
    if response.status_code in (404, 410):
        raise AbsentError(answer)
    if response.status_code not in (200, 206):
        raise LocationError(answer)
