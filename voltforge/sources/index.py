"""The package indexes of this machine, and the files that they list."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
import urllib3
from packaging.utils import canonicalize_name
from requests.adapters import HTTPAdapter
from urllib3.exceptions import MaxRetryError, NameResolutionError, ProxyError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

from voltforge.errors import VoltforgeError, listed
from voltforge.sources import index_settings
from voltforge.sources.index_settings import IndexSettings
from voltforge.system.files import BLOCK, size
from voltforge.system.urls import local_path, redacted

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and then for each next byte."""

MOST_PAGE = 16_000_000
"""The largest page that is read, in bytes; the longest pages of real indexes have 4 MB."""
PAGE_TIME = 300.0
"""Seconds for a page from its first byte to its last."""
HASH = re.compile("[0-9a-f]{64}")
"""A SHA-256 in text."""


class _PageError(Exception):
    """The answer of an index is not a page; the message is the rest of a sentence about the index."""


UNREADABLE = (requests.RequestException, _PageError)
"""The errors of a request to an index: those of requests, and those of a page that cannot be parsed."""


class NotOnIndexError(VoltforgeError):
    """No configured index and no find-links location has a file."""

    def __init__(self, project: str, file: str, attempts: list[tuple[str, str]]) -> None:
        places = listed([f"{place}: {outcome}" for place, outcome in attempts])
        super().__init__(
            f"{file} of project {project} was not found on any configured package index:{places}",
            hint="`pip config list` prints the configured index; UV_DEFAULT_INDEX sets another one",
        )
        self.project = project
        self.file = file
        self.attempts = tuple(attempts)
        """Each location that was tried, without credentials, and its result."""


@dataclass(frozen=True)
class Link:
    """A file that an index lists."""

    url: str
    """The address of the file: http, https, or file for an index on disk. It can hold credentials."""
    sha256: str | None
    """The hash that the index states; ``None`` if it states none or an invalid one."""
    place: str
    """The index or find-links location that lists the file. It can hold credentials."""


@dataclass(frozen=True)
class Patience:
    """The retry policy for servers that fail."""

    attempts: int = 5
    """The largest number of attempts."""
    first: float = 1.0
    """Seconds before the second retry. The first retry is immediate; each further pause is twice as long."""
    longest: float = 30.0
    """The longest pause in seconds, also if the server requests a longer one in Retry-After."""

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after a number of failures in a row."""
        return 0.0 if failures <= 1 else min(self.longest, self.first * 2.0 ** (failures - 2))

    def retry(self) -> Retry:
        """Return the same policy as a rule of urllib3 for errors before a body starts."""
        return _Retry(
            total=self.attempts - 1,
            other=0,  # a certificate does not become valid by a retry
            status_forcelist=(429, 500, 502, 503, 504),
            raise_on_status=False,
            backoff_factor=self.first / 2,
            backoff_max=self.longest,
        )


class _Retry(Retry):
    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, self.backoff_max)

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> _Retry:
        # A name that fails twice is mistyped, or there is no network: a retry would not help.
        if _unresolved(error) and any(_unresolved(earlier.error) for earlier in self.history):
            assert error is not None
            raise MaxRetryError(_pool, url or "", error) from error
        if response is not None:
            response.close()  # urllib3 would read its body to the end otherwise, which may never come
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _unresolved(error: BaseException | None) -> bool:
    if isinstance(error, ProxyError):
        error = error.original_error
    return isinstance(error, NameResolutionError)


class _Session(requests.Session):
    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        # requests prefers REQUESTS_CA_BUNDLE to the session's own `verify` unless each request repeats it.
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def send(self, *arguments: Any, **more: Any) -> requests.Response:
        try:
            return super().send(*arguments, **more)
        except requests.RequestException:
            raise
        except (urllib3.exceptions.HTTPError, ValueError, LookupError, OverflowError) as error:
            # urllib3 and the standard library raise these for an invalid Location or Retry-After.
            raise requests.exceptions.InvalidHeader from error


class _Adapter(HTTPAdapter):
    def send(self, *arguments: Any, **more: Any) -> requests.Response:
        response = super().send(*arguments, **more)
        if response.is_redirect:
            response.raw.close()  # requests would read its body to the end otherwise, which may never come
        return response

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        try:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]
        except OSError as error:  # requests raises a bare OSError if the certificate file is missing
            raise requests.exceptions.SSLError from error


@dataclass(frozen=True)
class Indexes(IndexSettings):
    """The package indexes of this machine, which can be asked for files."""

    default: str | None = field(default_factory=lambda: _usual())
    """The default index; ``None`` if pip or uv is configured to use none."""

    @property
    def places(self) -> tuple[str, ...]:
        """All locations, nearest first: find-links, the default index, the others."""
        return (*self.find_links, *self.indexes)

    def find(self, project: str, file: str, session: requests.Session | None = None) -> Link:
        """Find ``file`` of ``project``.

        Raises:
            NotOnIndexError: no location has it.
        """
        attempts: list[tuple[str, str]] = []
        session = session or self.session()
        for place in self.places:
            try:
                if link := self.look(place, project, file, session):
                    return link
                attempts.append((redacted(place), "does not have it"))
            except UNREADABLE as error:
                attempts.append((redacted(place), explained(error, self)))
        raise NotOnIndexError(project, file, attempts)

    def look(self, place: str, project: str, file: str, session: requests.Session) -> Link | None:
        """Return the entry of one location for ``file``, or ``None``.

        Raises:
            Exception: one of ``UNREADABLE``, which ``explained`` turns into text.
        """
        for package in _packages(place, project, session, flat=place in self.find_links):
            if file in (package.filename, _last_name(package.url)):
                if local_path(place) is None and not re.match("https?://", package.url, re.IGNORECASE):
                    raise requests.exceptions.InvalidSchema  # of a link from the network to this disk
                sha256 = package.digests.get("sha256", "").lower()
                return Link(_with_credentials_of(place, package.url), sha256 if HASH.fullmatch(sha256) else None, place)
        return None

    def session(self, patience: Patience | None = None) -> requests.Session:
        """Return a session that trusts ``certificate``, retries with ``patience``, and follows redirects to http(s)
        only.
        """
        session = _Session()
        session.verify = self.certificate or True
        session.headers["User-Agent"] = "voltforge"
        adapter = _Adapter(max_retries=(patience or Patience()).retry())
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        return session


def configured(environ: Mapping[str, str] = os.environ, python: str | Path | None = None) -> Indexes:
    """Return the configured indexes as :func:`index_settings.configured` does, with the usual index as the default."""
    settings = index_settings.configured(environ, python)
    return Indexes(**{**vars(settings), "default": _usual() if settings.default == "" else settings.default})


def explained(error: Exception, indexes: Indexes) -> str:
    """Return the reason of a failed request, without credentials."""
    if isinstance(error, _PageError):
        return str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return answered(error.response)
    if isinstance(error, requests.exceptions.SSLError):
        return _distrusted(indexes)
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    if _unresolved(reason):
        return (
            "the name of its proxy cannot be resolved"
            if isinstance(reason, ProxyError)
            else "its name cannot be resolved"
        )
    for kind, words in _WORDS:
        if isinstance(error, kind):
            return words
    return f"its page cannot be read ({type(error).__name__})"


def answered(response: requests.Response) -> str:
    """Return a status with its standard name, which can differ from the server's text."""
    return f"answered {response.status_code} {http.client.responses.get(response.status_code, '')}".rstrip()


def _distrusted(indexes: Indexes) -> str:
    if not indexes.certificate:
        return "its certificate is not trusted; set SSL_CERT_FILE to a file with the CA certificates of your network"
    named = f"{indexes.certificate}, which {indexes.certificate_from} names"
    if not Path(indexes.certificate).exists():
        return f"its certificate cannot be checked: {named}, does not exist"
    return f"its certificate is not trusted by {named}"


_WORDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (requests.exceptions.ProxyError, "its proxy cannot be reached or refuses the request"),
    (requests.exceptions.Timeout, "did not answer in time"),
    (requests.exceptions.ConnectionError, "cannot be reached, or dropped the connection"),
    (requests.exceptions.TooManyRedirects, "redirects without end"),
    (requests.exceptions.InvalidSchema, "redirects to an address that is neither http nor https"),
    ((requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError), "broke off its answer"),
    ((requests.exceptions.InvalidURL, requests.exceptions.MissingSchema), "is not a valid address"),
    (requests.exceptions.InvalidHeader, "sends an invalid header, or redirects to an invalid address"),
)


def _with_credentials_of(place: str, url: str) -> str:
    """Return ``url`` with the credentials of the page that links it, if both are on one server and ``url`` has none."""
    ours, theirs = urlsplit(place), urlsplit(url)
    user, at, server = ours.netloc.rpartition("@")
    if at and "@" not in theirs.netloc and (ours.scheme, server) == (theirs.scheme, theirs.netloc):
        return urlunsplit(theirs._replace(netloc=f"{user}@{server}"))
    return url


def _usual() -> str:
    """Return the default index of pip and uv."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    return PYPI_SIMPLE_ENDPOINT


def _packages(place: str, project: str, session: requests.Session, flat: bool) -> list[DistributionPackage]:
    """Return the files that a location lists for ``project``; a ``flat`` location lists files of any project."""
    from pypi_simple import (  # imported here: it takes a third of a second
        DistributionPackage,
        ProjectPage,
        RepositoryPage,
    )

    path = local_path(place)
    if path is not None:
        if flat and path.is_dir():
            return [_on_disk(file) for file in sorted(path.iterdir()) if file.is_file()]
        page = path if flat else path / canonicalize_name(project) / "index.html"
        if not page.is_file():
            return []
        with _reading():
            return ProjectPage.from_html(project, page.read_bytes(), page.absolute().as_uri()).packages
    response = _page(place if flat else f"{place.rstrip('/')}/{canonicalize_name(project)}/", session)
    if response.status_code == 404 and not flat:
        return []
    response.raise_for_status()
    with _reading():
        if not flat:
            return ProjectPage.from_response(response, project).packages
        links = RepositoryPage.from_html(response.content, response.url).links
        return [DistributionPackage.from_link(link) for link in links]


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # pypi-simple passes on the errors of its parsers, a RecursionError among them.
        raise _PageError(f"its page cannot be read ({type(error).__name__})") from error


def _page(address: str, session: requests.Session) -> requests.Response:
    """Return the answer to a request with its whole body, bounded in size and time.

    Raises:
        requests.RequestException: nothing or less than announced came.
        _PageError: more came than a page can have.
    """
    from pypi_simple import ACCEPT_ANY

    content, deadline = bytearray(), time.monotonic() + PAGE_TIME
    with session.get(address, headers={"Accept": ACCEPT_ANY}, timeout=TIMEOUT, stream=True) as response:
        try:
            # read1 returns what has arrived, so that the clock is checked however slowly it comes.
            while block := response.raw.read1(BLOCK, decode_content=True):
                content += block
                if len(content) > MOST_PAGE:
                    raise _PageError(f"sends a page of more than {size(MOST_PAGE)}")
                if time.monotonic() > deadline:
                    raise _PageError(f"did not send its page in {PAGE_TIME:.0f} s")
        except urllib3.exceptions.ReadTimeoutError as error:
            raise requests.exceptions.ReadTimeout from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise requests.exceptions.ChunkedEncodingError from error
    response.raw = io.BytesIO(content)  # so that response.content is the body that was read here
    return response


def _last_name(url: str) -> str:
    try:
        return unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError:
        return ""


def _on_disk(file: Path) -> DistributionPackage:
    from pypi_simple import DistributionPackage

    return DistributionPackage(file.name, file.absolute().as_uri(), None, None, None, {}, None, None)
