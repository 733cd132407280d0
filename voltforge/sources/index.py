"""Which Python package index this machine is configured for, and where on it a file is."""

from __future__ import annotations

import ast
import contextlib
import http.client
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
import urllib3
from packaging.utils import canonicalize_name
from requests.adapters import HTTPAdapter
from urllib3.exceptions import MaxRetryError, NameResolutionError, ProxyError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

from voltforge.errors import VoltforgeError, listed
from voltforge.system.files import BLOCK, size
from voltforge.system.process import ProgramFailed, run

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection, and then for each next byte."""

MOST_PAGE = 16_000_000
"""Bytes of a page beyond which it is not read; the longest pages of real indexes have 4 MB."""
PAGE_TIME = 300.0
"""Seconds that a page may take from its first byte to its last."""
HASH = re.compile("[0-9a-f]{64}")
"""A SHA-256 as it is written."""


class _PageError(Exception):
    """What an index answers is no page of one; the message is the rest of a sentence about the index."""


UNREADABLE = (requests.RequestException, _PageError)
"""What asking an index can raise: the request's own errors, and what is wrong with its page."""


class NotOnIndexError(VoltforgeError):
    """No configured index and no find-links place has a file."""

    def __init__(self, project: str, file: str, attempts: list[tuple[str, str]]) -> None:
        places = listed([f"{place}: {outcome}" for place, outcome in attempts])
        super().__init__(
            f"{file} of project {project} was found on no configured package index:{places}",
            hint="`pip config list` shows which index is configured; UV_DEFAULT_INDEX names another",
        )
        self.project = project
        self.file = file
        self.attempts = tuple(attempts)
        """Each place that was asked, without credentials, and what came of it."""


@dataclass(frozen=True)
class Link:
    """A file that an index lists."""

    url: str
    """Where the file is: http, https, or file for an index on disk. May hold credentials."""
    sha256: str | None
    """The hash that the index gives for it; many give none, and what is no hash counts as none."""
    place: str
    """The index or find-links place that lists it. May hold credentials."""


@dataclass(frozen=True)
class Patience:
    """How long to put up with a server that does not answer as it should."""

    attempts: int = 5
    """How often the same thing is asked before it is given up."""
    first: float = 1.0
    """Seconds before the second retry (the first one is made at once); each further pause is twice as long."""
    longest: float = 30.0
    """The longest pause in seconds, also where the server asks for a longer one in Retry-After."""

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return 0.0 if failures <= 1 else min(self.longest, self.first * 2.0 ** (failures - 2))

    def retry(self) -> Retry:
        """The same as urllib3's rule for whatever goes wrong before a body starts."""
        return _Retry(
            total=self.attempts - 1,
            other=0,  # a certificate does not become valid by asking again
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
        # A name that is unknown twice is mistyped or there is no network: minutes of patience would change neither.
        if _unresolved(error) and any(_unresolved(earlier.error) for earlier in self.history):
            assert error is not None
            raise MaxRetryError(_pool, url or "", error) from error
        if response is not None:
            response.close()  # or urllib3 would read its body to the end, which may never come
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _unresolved(error: BaseException | None) -> bool:
    if isinstance(error, ProxyError):
        error = error.original_error
    return isinstance(error, NameResolutionError)


class _Session(requests.Session):
    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        # requests lets REQUESTS_CA_BUNDLE win over the session's own `verify` unless each request repeats it.
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def send(self, *arguments: Any, **more: Any) -> requests.Response:
        try:
            return super().send(*arguments, **more)
        except requests.RequestException:
            raise
        except (urllib3.exceptions.HTTPError, ValueError, LookupError, OverflowError) as error:
            # What urllib3 and the standard library make of a Location or a Retry-After that is none.
            raise requests.exceptions.InvalidHeader from error


class _Adapter(HTTPAdapter):
    def send(self, *arguments: Any, **more: Any) -> requests.Response:
        response = super().send(*arguments, **more)
        if response.is_redirect:
            response.raw.close()  # or requests would read its body to the end, which may never come
        return response

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        try:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]
        except OSError as error:  # what requests raises, bare, where the file with the certificates is missing
            raise requests.exceptions.SSLError from error


@dataclass(frozen=True)
class Indexes:
    """The package indexes of this machine. Their addresses may hold credentials: show them through ``redacted``."""

    default: str | None = field(default_factory=lambda: _usual())
    """The index itself (a simple repository API, PEP 503 or 691); ``None`` where pip or uv may use none."""
    extra: tuple[str, ...] = ()
    """Further indexes, on the web or as file:// URLs."""
    find_links: tuple[str, ...] = ()
    """Folders, or URLs of pages, that hold or link files of any project."""
    certificate: str | None = None
    """A file with the certificate authorities to trust (PEM)."""
    certificate_from: str = ""
    """The setting that named ``certificate``."""

    @property
    def places(self) -> tuple[str, ...]:
        """Everything that may list a file, nearest first: find-links, the default index, the others."""
        return (*self.find_links, *self._indexes())

    def find(self, project: str, file: str, session: requests.Session | None = None) -> Link:
        """Where ``file`` of ``project`` is.

        Raises:
            NotOnIndexError: no place has it.
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
        """What one of ``places`` has of ``file``, or ``None``.

        Raises:
            Exception: one of ``UNREADABLE``, which ``explained`` puts in words.
        """
        for package in _packages(place, project, session, flat=place in self.find_links):
            if file in (package.filename, _last_name(package.url)):
                if local_path(place) is None and not re.match("https?://", package.url, re.IGNORECASE):
                    raise requests.exceptions.InvalidSchema  # a page from the network must not reach into this disk
                sha256 = package.digests.get("sha256", "").lower()
                return Link(_with_credentials_of(place, package.url), sha256 if HASH.fullmatch(sha256) else None, place)
        return None

    def session(self, patience: Patience | None = None) -> requests.Session:
        """A session that trusts ``certificate``, retries with ``patience``, and follows no redirect but to http(s)."""
        session = _Session()
        session.verify = self.certificate or True
        session.headers["User-Agent"] = "voltforge"
        adapter = _Adapter(max_retries=(patience or Patience()).retry())
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        return session

    def uv_arguments(self) -> list[str]:
        """uv's options for these indexes; credentials are left to ``uv_environment``, for command lines are logged."""
        # By default uv takes a project from the first index that knows its name, so that nobody can slip in a newer
        # version under the name of a private project. Here every install is locked by hash, which rules that out,
        # and an extra index often holds only some versions of a project.
        arguments = ["--index-strategy", "unsafe-best-match"]
        arguments += ["--default-index", _named(0, self.default)] if self.default else ["--no-index"]
        for number, url in enumerate(self.extra if self.default else (), 1):
            arguments += ["--index", _named(number, url)]
        if not any(_credentials(place) for place in self.find_links):
            for place in self.find_links:
                arguments += ["--find-links", place]
        return arguments

    def uv_environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The whole environment for uv beside ``uv_arguments``: ``environ``, the certificates, credentials if any."""
        told = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")
        variables = {name: value for name, value in environ.items() if name not in told}
        if self.certificate:
            variables["SSL_CERT_FILE"] = self.certificate
        for number, url in enumerate(self._indexes()):
            if pair := _credentials(url):
                variables[f"UV_INDEX_{NAME}{number}_USERNAME"] = pair[0]
                variables[f"UV_INDEX_{NAME}{number}_PASSWORD"] = pair[1]
        if any(_credentials(place) for place in self.find_links):
            variables["UV_FIND_LINKS"] = ",".join(self.find_links)
        return variables

    def _indexes(self) -> tuple[str, ...]:
        return (self.default, *self.extra) if self.default else ()


def configured(environ: Mapping[str, str] = os.environ, python: str | Path | None = None) -> Indexes:
    """The package indexes that this machine's uv and pip are configured for.

    uv's variables come before pip's, and pip's before its configuration files, which are read by asking pip:
    of ``python``, of the running interpreter, or of ``PATH``. Without any pip there is nothing to ask.
    Extra indexes and find-links places of both tools are put together.
    """
    pip = _pip_configuration(environ, python)

    def setting(variable: str, key: str) -> str:
        return environ.get(variable) or pip.get(key, "")

    default = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL") or setting("PIP_INDEX_URL", "index-url")
    extra = [environ.get("UV_INDEX", ""), environ.get("UV_EXTRA_INDEX_URL", "")]
    extra.append(setting("PIP_EXTRA_INDEX_URL", "extra-index-url"))
    links = [*environ.get("UV_FIND_LINKS", "").split(","), *setting("PIP_FIND_LINKS", "find-links").split()]
    without = any(_true(value) for value in (environ.get("UV_NO_INDEX", ""), setting("PIP_NO_INDEX", "no-index")))
    certificate, source = None, ""
    for variable in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if not certificate and environ.get(variable):
            certificate, source = environ[variable], variable
    if not certificate and pip.get("cert"):
        certificate, source = pip["cert"], "pip's setting `cert`"
    return Indexes(
        default=None if without else _index(default or _usual(), environ),
        extra=_unique(_index(value, environ) for value in " ".join(extra).split()),
        find_links=_unique(_absolute(value.strip()) for value in links if value.strip()),
        certificate=certificate,
        certificate_from=source,
    )


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MOST_SHOWN = 500
"""Characters of an address that a person is shown."""


def redacted(url: str) -> str:
    """``url`` as it may be shown: no user, no password, no query (which signed addresses keep their secret in).

    Nor control characters, which would move the terminal's cursor, nor more than a few lines.
    """
    url = _CONTROL.sub(lambda found: quote(found[0], errors="replace"), url)
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url[:_MOST_SHOWN]
    # Up to the last @, for passwords are often written with a raw slash, question mark or @ in them.
    _, at, place = rest.rpartition("@")
    path, question, _ = place.partition("?")
    shown = scheme + mark + ("***@" if at else "") + path.partition("#")[0] + ("?***" if question else "")
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def explained(error: Exception, indexes: Indexes) -> str:
    """What went wrong with a request, in words that hold no credentials."""
    if isinstance(error, _PageError):
        return str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return answered(error.response)
    if isinstance(error, requests.exceptions.SSLError):
        return _distrusted(indexes)
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    if _unresolved(reason):
        return "the name of its proxy cannot be resolved" if isinstance(reason, ProxyError) else "its name is unknown"
    for kind, words in _WORDS:
        if isinstance(error, kind):
            return words
    return f"its page cannot be read ({type(error).__name__})"


def answered(response: requests.Response) -> str:
    """A response's status as people know it, which is not always what the server calls it."""
    return f"answered {response.status_code} {http.client.responses.get(response.status_code, '')}".rstrip()


def _distrusted(indexes: Indexes) -> str:
    if not indexes.certificate:
        return "its certificate is not trusted; SSL_CERT_FILE can name a file with the CA certificates of your network"
    named = f"{indexes.certificate}, which {indexes.certificate_from} names"
    if not Path(indexes.certificate).exists():
        return f"its certificate cannot be checked: there is no {named}"
    return f"its certificate is not trusted by {named}"


_WORDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (requests.exceptions.ProxyError, "its proxy cannot be reached or refuses"),
    (requests.exceptions.Timeout, "did not answer in time"),
    (requests.exceptions.ConnectionError, "cannot be connected to, or dropped the connection"),
    (requests.exceptions.TooManyRedirects, "redirects without end"),
    (requests.exceptions.InvalidSchema, "leads to an address that is neither http nor https"),
    ((requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError), "broke off its answer"),
    ((requests.exceptions.InvalidURL, requests.exceptions.MissingSchema), "is not an address"),
    (requests.exceptions.InvalidHeader, "sends a header, or redirects to an address, that is none"),
)


def local_path(place: str) -> Path | None:
    """The path that a plain path or a file: URL stands for; ``None`` for an address on the network."""
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return None if "://" in place else Path(place)


NAME = "VOLTFORGE"
"""What uv is told to call an index, before its number: uv reads an index's credentials from variables by name."""


def _named(number: int, url: str) -> str:
    return f"{NAME.lower()}{number}={_without_credentials(url)}" if _credentials(url) else url


def _credentials(url: str) -> tuple[str, str] | None:
    if local_path(url) is not None:
        return None
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    name, _, password = user.partition(":")
    return (unquote(name), unquote(password)) if at else None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_credentials_of(place: str, url: str) -> str:
    """``url`` with the credentials of the page that links it, if both are on the same server and it has none."""
    ours, theirs = urlsplit(place), urlsplit(url)
    user, at, server = ours.netloc.rpartition("@")
    if at and "@" not in theirs.netloc and (ours.scheme, server) == (theirs.scheme, theirs.netloc):
        return urlunsplit(theirs._replace(netloc=f"{user}@{server}"))
    return url


def _usual() -> str:
    """The index that pip and uv ask unless they are told otherwise."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    return PYPI_SIMPLE_ENDPOINT


def _packages(place: str, project: str, session: requests.Session, flat: bool) -> list[DistributionPackage]:
    """The files that a place lists for ``project``; of any project where it is ``flat``."""
    from pypi_simple import DistributionPackage, ProjectPage, RepositoryPage  # a third of a second, only where it asks

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
        # pypi-simple lets out whatever its parsers of HTML and JSON met, a RecursionError among them.
        raise _PageError(f"its page cannot be read ({type(error).__name__})") from error


def _page(address: str, session: requests.Session) -> requests.Response:
    """The answer to a request, with its whole body, for which neither memory nor patience is endless.

    Raises:
        requests.RequestException: nothing came, or less than was said.
        _PageError: more came than a page can have.
    """
    from pypi_simple import ACCEPT_ANY

    content, deadline = bytearray(), time.monotonic() + PAGE_TIME
    with session.get(address, headers={"Accept": ACCEPT_ANY}, timeout=TIMEOUT, stream=True) as response:
        try:
            # read1 gives what has come, so that the clock is looked at however slowly it comes.
            while block := response.raw.read1(BLOCK, decode_content=True):
                content += block
                if len(content) > MOST_PAGE:
                    raise _PageError(f"sends a page of more than {size(MOST_PAGE)}")
                if time.monotonic() > deadline:
                    raise _PageError(f"has not sent its page in {PAGE_TIME:.0f} s")
        except urllib3.exceptions.ReadTimeoutError as error:
            raise requests.exceptions.ReadTimeout from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise requests.exceptions.ChunkedEncodingError from error
    response.raw = io.BytesIO(content)  # so that response.content is what was read here
    return response


def _last_name(url: str) -> str:
    try:
        return unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError:
        return ""


def _on_disk(file: Path) -> DistributionPackage:
    from pypi_simple import DistributionPackage

    return DistributionPackage(file.name, file.absolute().as_uri(), None, None, None, {}, None, None)


def _pip_configuration(environ: Mapping[str, str], python: str | Path | None) -> dict[str, str]:
    """What pip's configuration files say, by long option name, as pip itself prints it (`pip config list`)."""
    pythons = [str(python)] if python else [sys.executable, "python3", "python"]
    for argv in [*([name, "-m", "pip"] for name in pythons), ["pip"]]:
        try:
            printed = run([*argv, "config", "list"], env=environ, timeout=60).output
        except ProgramFailed:
            continue
        return _parsed(printed)
    return {}


def _parsed(printed: str) -> dict[str, str]:
    found: dict[str, dict[str, str]] = {}
    for line in printed.splitlines():
        # name='value' with the value as Python's repr gives it; `:env:` lines are variables, read elsewhere.
        if match := re.fullmatch(r"(global|install|download)\.([\w-]+)=(['\"].*['\"])", line.strip()):
            section, key, value = match.groups()
            try:
                found.setdefault(section, {})[key] = str(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                continue
    return {**found.get("global", {}), **found.get("download", {}), **found.get("install", {})}


def _index(value: str, environ: Mapping[str, str]) -> str:
    """An index's URL, from uv's ``name=URL`` with the credentials of that name's variables, or from a URL or path."""
    match = re.fullmatch(r"([\w.-]+)=(.+)", value)
    if not match:
        return value if "://" in value else Path(_absolute(value)).as_uri()
    name, url = re.sub(r"\W", "_", match[1]).upper().replace(".", "_"), match[2]
    user, password = (environ.get(f"UV_INDEX_{name}_{what}", "") for what in ("USERNAME", "PASSWORD"))
    if not (user or password) or "@" in urlsplit(url).netloc:
        return _index(url, {})
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{parts.netloc}"))


def _absolute(value: str) -> str:
    return value if "://" in value else str(Path(value).expanduser().absolute())


def _unique(values: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")
