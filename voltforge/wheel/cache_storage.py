"""Read and write the files of the shared cache, in a folder or on a web server."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
import urllib3

from voltforge.errors import remedy
from voltforge.sources import index
from voltforge.sources.index import Indexes, answered, explained
from voltforge.system import console, files
from voltforge.system.urls import redacted
from voltforge.wheel import cache_limits
from voltforge.wheel.cache_limits import CacheError, with_timeout

LARGEST_STATEMENT = 4_000_000
"""The largest file of statements that is read, in bytes. A statement has some ten thousand."""


def normalised_address(address: str) -> str:
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


UNKNOWN = -1
"""The size of a file if the server does not report it."""


@dataclass(frozen=True)
class WheelFolder:
    """A shared cache in a folder."""

    root: Path

    def shown(self, path: str) -> str:
        """Return the address of a file for messages, without credentials."""
        return str(self.root / path)

    def address(self, path: str) -> str:
        """Return the URL of a file."""
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
class WheelServer:
    """A shared cache on a web server."""

    base: str
    session: requests.Session
    indexes: Indexes

    def shown(self, path: str) -> str:
        """Return the address of a file for messages, without credentials."""
        return redacted(self.address(path))

    def address(self, path: str) -> str:
        """Return the URL of a file."""
        return f"{self.base}/{quote(path)}"

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, or ``None`` if it does not exist.

        Raises:
            CacheError: the request fails or times out, or the file is too large.
        """
        with self._errors_explained(path):
            return with_timeout(cache_limits.ANSWER, lambda: self._read(path))

    def _read(self, path: str) -> bytes | None:
        end, data = time.monotonic() + cache_limits.ANSWER, b""
        with self._request("GET", path, stream=True) as response:
            if response.status_code in (404, 410):
                return None
            self._raise_for_status(path, response)
            # read1 returns as soon as bytes arrive; read would wait for a whole block and miss the deadline.
            while block := response.raw.read1(files.BLOCK, decode_content=True):
                data += block
                _raise_if_large(data, self.shown(path))
                if time.monotonic() > end:  # with_timeout has already given up
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
