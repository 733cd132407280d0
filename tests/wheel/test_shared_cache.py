"""The shared cache: real folders, nginx and WebDAV servers take wheels and give them; others lie, stall or break."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import re
import shutil
import socketserver
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from cheroot import wsgi
from rich.console import Console
from wsgidav.fs_dav_provider import FilesystemProvider
from wsgidav.wsgidav_app import WsgiDAVApp

from tests.docker.test_nginx import takes_connections, within
from tests.support import samples
from tests.support.backends import free_port
from tests.support.rights import ordinary_user
from tests.support.servers import Fault, serving
from voltforge.sources import index
from voltforge.sources.fetch import Store
from voltforge.sources.index import Indexes, Patience
from voltforge.system import console, files
from voltforge.wheel import cache_limits, provenance, signing
from voltforge.wheel.cache_limits import CacheError
from voltforge.wheel.shared_cache import CachedWheel, CacheMiss, SharedCache
from voltforge.wheel.signing import Signer, Trust

KEY = "ab" + "0" * 62
FAULTS = "shared cache: faults that neither broke nor tainted a build"
QUICK = Patience(attempts=2, first=0)


@dataclass(frozen=True)
class Built:
    """A built wheel with its statement, as a build uploads it."""

    key: str
    wheel: Path
    envelope: bytes

    @property
    def sha256(self) -> str:
        return files.sha256(self.wheel)

    @property
    def statement_path(self) -> str:
        return f"keys/{self.key[:2]}/{self.key}.intoto.jsonl"

    @property
    def wheel_path(self) -> str:
        return f"wheels/{self.sha256}/{self.wheel.name}"

    def laid_out(self) -> dict[str, bytes]:
        """The files of a cache that has it, as a web server has them."""
        return {f"/{self.statement_path}": self.envelope, f"/{self.wheel_path}": self.wheel.read_bytes()}


@dataclass(frozen=True)
class Place:
    """A cache that can be written, and the folder that its files lie in."""

    address: str
    folder: Path

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*.*"))
            if path.is_file()
        }


@pytest.fixture(scope="module")
def built(tmp_path_factory, signer) -> Built:
    return build(tmp_path_factory.mktemp("built"), signer)


def build(folder: Path, signer: Signer | None, *, seed: int = 1, key: str = KEY, size: int = 300_000) -> Built:
    wheel = samples.wheel(folder, {"sample.bin": random.Random(seed).randbytes(size)}, version="1.0+sm70")
    return Built(key, wheel, signing.make_envelope(statement(wheel, key), signer))


def statement(wheel: Path, key: str = KEY) -> bytes:
    results = {
        "file": wheel.name, "name": "sample", "version": "1.0+sm70", "sha256": files.sha256(wheel), "build_key": key,
        "materials": [{"name": "sample-1.0.tar.gz", "kind": "source", "sha256": ["1" * 64]}],
        "sbom": {"file": "sample.cdx.json", "sha256": "2" * 64}, "hermetic": True, "build": {"seconds": 1},
    }  # fmt: skip
    return provenance.statement({"stage": "wheels:sample", "key": "c" * 64, "inputs": {}, "results": results})


def plain(address: str, **more) -> SharedCache:
    return SharedCache(address, ask_indexes=lambda: Indexes(None), **{"patience": QUICK, **more})


def store(folder: Path, **more) -> Store:
    return Store(folder, ask_indexes=lambda: Indexes(None), ask_archives=tuple, **more)


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Return the printed output."""
    paper = io.StringIO()
    monkeypatch.setattr(console, "screen", Console(file=paper, highlight=False, soft_wrap=True))
    return paper


# --- real places ---

NGINX = """
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    gzip on;
    gzip_types *;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/root;
        location /full/ {{ dav_methods PUT; create_full_put_path on; }}
        location /folders/ {{ dav_methods PUT MKCOL; }}
        location /put/ {{ dav_methods PUT; }}
        location /small/ {{ dav_methods PUT; create_full_put_path on; client_max_body_size 100k; }}
        location ~ ^/moved/(.*) {{ return 301 /full/$1; }}
        location /static/ {{ }}
    }}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory) -> Iterator[Place]:
    """A real nginx; its locations differ in what they allow."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    program = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    assert program, "apt-get install nginx"
    for name in ("full", "folders", "put", "small", "static"):
        (folder / "root" / name).mkdir(parents=True)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    # Its workers are the user nobody otherwise, who may not write into pytest's folders.
    more = "daemon off; user root;" if os.geteuid() == 0 else "daemon off;"
    command = [program, "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log"), "-g", more]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        within(10, lambda: process.poll() is not None or takes_connections(port))
        assert process.poll() is None, (folder / "error.log").read_text()
        yield Place(f"http://127.0.0.1:{port}", folder / "root")
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def webdav(tmp_path_factory) -> Iterator[Place]:
    """A real WebDAV server; its shares differ in who may do what."""
    folder = tmp_path_factory.mktemp("webdav")
    for share in ("open", "closed", "fixed"):
        (folder / share).mkdir()
    mine = {"me": {"password": "sec/ret"}}
    application = WsgiDAVApp({
        "provider_mapping": {
            "/open": FilesystemProvider(str(folder / "open")),
            "/closed": FilesystemProvider(str(folder / "closed")),
            "/fixed": FilesystemProvider(str(folder / "fixed"), readonly=True),
        },
        "simple_dc": {"user_mapping": {"/open": True, "/fixed": True, "/closed": mine}},
        "verbose": 0,
    })  # fmt: skip
    server = wsgi.Server(("127.0.0.1", 0), application, numthreads=4, shutdown_timeout=0.2)
    server.prepare()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield Place(f"http://127.0.0.1:{server.bind_addr[1]}", folder)
    finally:
        server.stop()
        thread.join()


@pytest.fixture(params=["folder", "file", "nginx", "nginx with MKCOL", "webdav", "webdav with a password"])
def place(request, tmp_path) -> Place:
    """Each kind of cache, and nothing in it yet."""
    kind, mine = request.param, f"of-{tmp_path.name}"
    if kind in ("folder", "file"):
        folder = tmp_path / "cache"
        folder.mkdir()
        return Place(str(folder) if kind == "folder" else folder.as_uri(), folder)
    server = request.getfixturevalue(kind.split()[0])
    part = {"nginx": "full", "nginx with MKCOL": "folders", "webdav": "open"}.get(kind, "closed")
    address = server.address.replace("//", "//me:sec%2Fret@") if part == "closed" else server.address
    return Place(f"{address}/{part}/{mine}", server.folder / part / mine)


# --- giving and finding ---


def test_uploaded_wheel_is_found_with_its_bytes_and_provenance(place, built, signer, tmp_path):
    one = plain(place.address)
    assert one.put(built.key, built.wheel, built.envelope)
    assert place.files() == {built.statement_path: built.envelope, built.wheel_path: built.wheel.read_bytes()}
    hit = one.find(built.key, Trust.of(signer), store(tmp_path / "store"))
    assert isinstance(hit, CachedWheel), hit
    assert hit.wheel.read_bytes() == built.wheel.read_bytes()
    assert hit.wheel.name == built.wheel.name
    assert (hit.provenance.build_key, hit.provenance.sha256) == (built.key, built.sha256)


def test_same_wheel_is_not_uploaded_twice(place, built):
    one = plain(place.address)
    assert one.put(built.key, built.wheel, built.envelope)
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    assert not one.put(built.key, built.wheel, built.envelope)
    assert {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")} == before


def test_missing_wheel_is_a_miss_without_a_message(place, built, signer, tmp_path):
    one = plain(place.address)
    one.put(built.key, built.wheel, built.envelope)
    assert one.find("f" * 64, Trust.of(signer), store(tmp_path / "store")) == CacheMiss("")


def test_different_wheel_under_the_same_key_is_refused_and_not_overwritten(place, built, signer, tmp_path):
    one, other = plain(place.address), build(tmp_path / "other", signer, seed=2)
    one.put(built.key, built.wheel, built.envelope)
    before = place.files()
    with pytest.raises(CacheError) as caught:
        one.put(other.key, other.wheel, other.envelope)
    assert built.sha256 in caught.value.what
    assert other.sha256 in caught.value.what
    assert "./doit reproduce" in caught.value.hint
    assert place.files() == before


def test_statements_of_two_builders_of_a_wheel_are_both_kept(place, built, signer, stranger, tmp_path):
    one, theirs = plain(place.address), signing.make_envelope(statement(built.wheel), stranger)
    assert one.put(built.key, built.wheel, built.envelope)
    assert one.put(built.key, built.wheel, theirs)
    assert not one.put(built.key, built.wheel, built.envelope)
    assert place.files()[built.statement_path] == built.envelope + theirs
    for number, who in enumerate((signer, stranger)):
        assert isinstance(one.find(built.key, Trust.of(who), store(tmp_path / f"{number}")), CachedWheel)


def test_newer_statement_of_a_builder_replaces_the_older(tmp_path, built, signer, stranger):
    one, older = plain(str(tmp_path)), statement(built.wheel).replace(b'"seconds":1', b'"seconds":2')
    theirs = signing.make_envelope(statement(built.wheel), stranger)
    for envelope in (signing.make_envelope(older, signer), theirs, built.envelope):
        assert one.put(built.key, built.wheel, envelope)
    assert (tmp_path / built.statement_path).read_bytes() == theirs + built.envelope


def test_broken_file_in_the_cache_is_replaced_with_a_warning(place, built, signer, said, tmp_path):
    one = plain(place.address)
    one.put(built.key, built.wheel, built.envelope)
    (place.folder / built.statement_path).write_bytes(built.envelope[:-9])
    (place.folder / built.wheel_path).write_bytes(b"half")
    assert isinstance(one.find(built.key, Trust.of(signer), store(tmp_path / "s")), CacheMiss)
    assert one.put(built.key, built.wheel, built.envelope)
    assert "not a DSSE envelope" in said.getvalue()
    assert isinstance(one.find(built.key, Trust.of(signer), store(tmp_path / "s")), CachedWheel)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda built, _: replace(built, key="e" * 64), f"about another build, {KEY}"),
        (lambda built, other: replace(built, wheel=other.wheel), "is about sample-1.0.* with sha256"),
        (
            lambda built, _: replace(built, envelope=signing.make_envelope(statement(built.wheel), None)),
            "the statement is not signed",
        ),
        (lambda built, _: replace(built, envelope=b"{}\n"), "not a DSSE envelope"),
        (lambda built, _: replace(built, wheel=built.wheel.with_name("gone.whl")), "cannot be read: No such file"),
    ],
    ids=["key", "wheel", "unsigned", "garbage", "gone"],
)  # fmt: skip
def test_wheel_and_statement_that_do_not_match_are_not_uploaded(tmp_path, built, signer, spoil, words):
    wrong = spoil(built, build(tmp_path / "other", signer, seed=2))
    (tmp_path / "cache").mkdir()
    with pytest.raises(CacheError, match=words):
        plain(str(tmp_path / "cache")).put(wrong.key, wrong.wheel, wrong.envelope)
    assert list((tmp_path / "cache").iterdir()) == []


def test_downloaded_wheel_is_not_fetched_again(tmp_path, built, signer):
    with serving() as server:
        server.files = built.laid_out()
        one, downloads = plain(server.url), store(tmp_path)
        first = one.find(built.key, Trust.of(signer), downloads)
        assert "1.0%2Bsm70" in server.sent[-1][0]  # some stores take a bare + for a space
        assert one.find(built.key, Trust.of(signer), downloads) == first
    assert server.paths().count(f"/{built.wheel_path}") == 1


def test_mirrors_and_indexes_are_not_searched_for_a_cached_wheel(tmp_path, built, signer):
    with serving() as server, serving() as other:
        server.files = built.laid_out()
        del server.files[f"/{built.wheel_path}"]
        other.files = {f"/{built.wheel.name}": built.wheel.read_bytes()}
        downloads = store(tmp_path, mirrors=(other.url,))
        assert isinstance(plain(server.url).find(built.key, Trust.of(signer), downloads), CacheMiss)
        assert other.asked == []


def test_cache_may_redirect_to_its_files(tmp_path, built, signer):
    with serving() as server, serving() as other:
        other.files = built.laid_out()
        server.faults = {path: [Fault(302, {"Location": other.url + path.replace("+", "%2B")})] for path in other.files}
        assert isinstance(plain(server.url).find(built.key, Trust.of(signer), store(tmp_path)), CachedWheel)


# --- whom to believe, whom to ask ---


def test_no_request_without_a_trusted_key_and_the_message_says_how_to_add_it(tmp_path, built):
    with serving() as server:
        server.files = built.laid_out()
        miss = plain(server.url).find(built.key, Trust(), store(tmp_path))
    assert isinstance(miss, CacheMiss)
    assert "no key is trusted" in miss.why
    assert "VOLTFORGE_TRUSTED" in miss.why
    assert server.asked == []


def test_offline_a_folder_is_used_but_no_server(tmp_path, built, signer):
    offline, trust = store(tmp_path / "s", offline=True), Trust.of(signer)
    with serving() as server:
        server.files = built.laid_out()
        for one in (plain(server.url), plain(server.url, offline=True)):
            downloads = replace(offline, offline=not one.offline)
            assert one.find(built.key, trust, downloads) == CacheMiss(
                f"{server.url}: VOLTFORGE_OFFLINE forbids network access"
            )
        with pytest.raises(CacheError, match="VOLTFORGE_OFFLINE"):
            plain(server.url, offline=True).put(built.key, built.wheel, built.envelope)
        assert server.asked == []
    (tmp_path / "cache").mkdir()
    for address in (str(tmp_path / "cache"), (tmp_path / "cache").as_uri()):
        plain(address, offline=True).put(built.key, built.wheel, built.envelope)
        assert isinstance(plain(address, offline=True).find(built.key, trust, offline), CachedWheel)


@pytest.mark.parametrize(
    ("address", "usable"),
    [
        ("", None),
        ("  ", None),
        ("/srv/cache ", "/srv/cache"),
        ("~/cache", str(Path.home() / "cache")),
        ("cache", str(Path.cwd() / "cache")),
        ("file:///srv/cache", "file:///srv/cache"),
        ("HTTPS://me:pass%40word@cache.example:8443/wheels", "https://me:pass%40word@cache.example:8443/wheels"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
    ],
)
def test_cache_address_comes_from_the_environment(address, usable):
    found = SharedCache.from_environment({"VOLTFORGE_CACHE": address, "VOLTFORGE_OFFLINE": "1"})
    assert (found.address if found else None) == usable
    assert SharedCache.from_environment({}) is None
    assert found is None or (found.offline and "pass" not in str(found))


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/wheels", "ftp://cache.example/", "http://", "https:///wheels", "https:/me:secret@cache.example/",
        "http://me:secret@cache.example:port/", "http://cache.example/?token=secret", "http://cache.example/#secret",
        "host:/srv/cache", "file://host/srv/cache", "file:cache", "http://[::1/", "~nosuchuser/cache", "http://a:99999/",
        "http://me:se/cret@cache.example/",
    ],
)  # fmt: skip
def test_invalid_address_is_reported_without_its_secrets(address):
    with pytest.raises(CacheError, match=r"VOLTFORGE_CACHE is .*, which is neither a folder nor") as caught:
        SharedCache.from_environment({"VOLTFORGE_CACHE": address})
    assert "secret" not in str(caught.value)
    assert "se/cret" not in str(caught.value)
    assert caught.value.hint


# --- uploads that are refused ---


def refused(cache: SharedCache, built: Built) -> CacheError:
    with pytest.raises(CacheError) as caught:
        cache.put(built.key, built.wheel, built.envelope)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("part", "what", "hint"),
    [
        ("static", "answered 405 Method Not Allowed: the server does not accept uploads", "dav_methods"),
        ("small", "answered 413 ", "client_max_body_size"),
        ("put", "answered 500 Internal Server Error", "create_full_put_path"),
        ("moved", "is redirected to http", "set VOLTFORGE_CACHE to that address"),
    ],
)
def test_refusal_by_nginx_is_explained(nginx, tmp_path, signer, part, what, hint):
    large = build(tmp_path, signer, size=3_000_000)
    error = refused(plain(f"{nginx.address}/{part}/of-{tmp_path.name}"), large)
    assert what in error.what
    assert hint in error.hint
    assert not list((nginx.folder / part).rglob("*.jsonl") if part != "moved" else [])


@pytest.mark.parametrize(
    ("part", "user", "what", "hint"),
    [
        ("closed", "", "answered 401 .*: it requires a user and a password, or different ones", "netrc"),
        ("closed", "me:wrong-one@", "answered 401 .*: it requires a user and a password, or different ones", "netrc"),
        ("fixed", "", "answered 403 .*: this user may not write there", "ask for write permission"),
    ],
)
def test_refusal_by_a_webdav_server_is_explained(webdav, tmp_path, signer, said, part, user, what, hint):
    large = build(tmp_path, signer, size=3_000_000)  # it hangs up in the middle of it
    error = refused(plain(f"{webdav.address.replace('//', f'//{user}')}/{part}/x"), large)
    assert re.search(what, error.what)
    assert hint in error.hint
    assert "wrong-one" not in str(error) + said.getvalue()
    assert list((webdav.folder / part).glob("x")) == []


def test_user_and_password_are_read_from_netrc(webdav, tmp_path, built, signer, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password sec/ret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    one = plain(f"{webdav.address}/closed/of-{tmp_path.name}")
    assert one.put(built.key, built.wheel, built.envelope)
    assert isinstance(one.find(built.key, Trust.of(signer), store(tmp_path / "s")), CachedWheel)


def test_unwritable_folder_is_explained(tmp_path, built, signer):
    (tmp_path / "file").touch()
    assert "cannot be written: " in refused(plain(str(tmp_path / "file")), built).what
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        mine = build(Path(room) / "built", signer)
        (Path(room) / "cache").mkdir(mode=0o555)
        assert "cannot be written: Permission denied" in refused(plain(f"{room}/cache"), mine).what


def test_missing_folder_is_created_by_an_upload_and_reported_by_a_search(tmp_path, built, signer):
    one, trust = plain(str(tmp_path / "new" / "cache")), Trust.of(signer)
    assert one.find(built.key, trust, store(tmp_path / "s")) == CacheMiss(f"{tmp_path}/new/cache is not a folder")
    assert one.put(built.key, built.wheel, built.envelope)
    assert isinstance(one.find(built.key, trust, store(tmp_path / "s")), CachedWheel)


# --- servers that break in the middle of an upload ---


@dataclass
class Writable:
    """A server that takes files, and misbehaves when it is told to."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request, but for MKCOL's."""
    faults: list[str | int] = field(default_factory=list)
    """For each coming PUT: a status to answer, ``hang up`` in the middle of it, ``forget`` it, or keep ``half``."""
    folders: int = 405
    """The status of the answer to MKCOL."""

    def puts(self) -> list[str]:
        return [path for method, path in self.asked if method == "PUT"]


@pytest.fixture
def writable() -> Iterator[Writable]:
    state = Writable()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            state.asked.append((self.command, self.path))
            data = state.files.get(self.path.replace("%2B", "+"))
            self.answer(404) if data is None else self.answer(200, data)

        def do_HEAD(self):
            self.do_GET()

        def do_MKCOL(self):
            self.answer(state.folders)

        def do_PUT(self):
            state.asked.append(("PUT", self.path))
            fault = state.faults.pop(0) if state.faults else 201
            length = int(self.headers["Content-Length"])
            if fault == "hang up":
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            data = self.rfile.read(length)
            if fault in (201, "half"):
                state.files[self.path.replace("%2B", "+")] = data[: length // 2] if fault == "half" else data
            self.answer(fault if isinstance(fault, int) else 200)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.handle_error = lambda *_: None
        state.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            listener.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("faults", "folders", "words"),
    [
        (["hang up"] * 2, 405, "cannot be reached, or dropped the connection"),
        (["hang up"] * 2, 403, "answered 403 Forbidden: this user may not write there"),
        (["forget"], 405, "was uploaded, but is missing or incomplete there"),
        (["half"], 405, "was uploaded, but is missing or incomplete there"),
        ([401], 405, "requires a user and a password, or different ones"),
        ([403], 405, "this user may not write there"),
        ([404], 405, "the folder does not exist, and the server does not create it"),
        ([409], 403, "answered 403 Forbidden: this user may not write there"),
        ([413], 405, "the wheel is larger than the server allows"),
        ([418], 405, "answered 418"),
        ([501], 405, "does not support uploads"),
        ([503] * 2, 405, "answered 503"),
        ([507], 405, "its disk is full"),
    ],
)  # fmt: skip
def test_failed_upload_leaves_no_statement(writable, built, counted, faults, folders, words):
    writable.faults, writable.folders = list(faults), folders
    with pytest.raises(CacheError, match=words):
        plain(writable.url).put(built.key, built.wheel, built.envelope)
    assert not any("keys" in path for path in [*writable.puts(), *writable.files])
    counted(FAULTS)


@pytest.mark.parametrize("fault", ["hang up", 500, 503])
def test_upload_is_retried_from_its_beginning(writable, built, signer, tmp_path, fault):
    writable.faults = [fault]
    assert plain(writable.url).put(built.key, built.wheel, built.envelope)
    assert writable.files == built.laid_out()


def test_wheel_is_uploaded_before_its_statement_and_a_retry_sends_the_rest(writable, built):
    writable.faults = [201, 507]
    with pytest.raises(CacheError, match="disk is full"):
        plain(writable.url).put(built.key, built.wheel, built.envelope)
    assert [path.split("/")[1] for path in writable.puts()] == ["wheels", "keys"]
    assert list(writable.files) == [f"/{built.wheel_path}"]
    assert "1.0%2Bsm70" in writable.puts()[0]  # some stores take a bare + for a space
    writable.asked.clear()
    assert plain(writable.url).put(built.key, built.wheel, built.envelope)
    assert [path.split("/")[1] for path in writable.puts()] == ["keys"]
    assert writable.files == built.laid_out()


def test_upload_shows_its_progress(writable, built, said, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0)
    plain(writable.url).put(built.key, built.wheel, built.envelope)
    shown = said.getvalue().splitlines()
    assert f"{built.wheel.name}: {files.size(built.wheel.stat().st_size)} of" in shown[-1]


def test_nothing_is_uploaded_to_an_unreachable_server(built):
    assert "cannot be reached" in refused(plain(f"http://127.0.0.1:{free_port()}"), built).what


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(302, {"Location": "http://[::1"}), "redirects to an invalid address"),
        (Fault(headers={"Content-Encoding": "gzip"}), "the answer is truncated or garbled"),
        (Fault(302, {"Location": "file:///etc/passwd"}), "redirects to an address that is neither http nor https"),
        (Fault(cut=0), "the answer is truncated"),
        (Fault(body=b"x" * 5_000_000), "is larger than 4.0 MB"),
        (Fault(403), "answered 403 Forbidden"),
        (Fault(404), "answered 501 .*: the server does not support uploads"),
    ],
)  # fmt: skip
def test_nothing_is_uploaded_when_statements_are_unreadable(built, fault, words):
    with serving() as server:
        server.files = {f"/{built.statement_path}": built.envelope}
        server.faults = {f"/{built.statement_path}": [fault]}
        with pytest.raises(CacheError, match=words):
            plain(server.url).put(built.key, built.wheel, built.envelope)


def test_nothing_is_uploaded_when_the_wheels_presence_is_unknown(built):
    with serving() as server:
        server.faults = {f"/{built.wheel_path}": [Fault(302, {"Location": "file:///etc/passwd"})]}
        error = refused(plain(server.url), built)
    assert "redirects to an address that is neither http nor https" in error.what


# --- what a cache does to those who search ---


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@contextlib.contextmanager
def scripted(answers: Callable[[str], Iterator[bytes]]) -> Iterator[str]:
    """A server that sends what it is told to for a path, a part every few milliseconds, whether that is HTTP or not."""
    closing = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            path = self.rfile.readline().split()[1].decode().replace("%2B", "+")
            while self.rfile.readline().strip():
                pass
            with contextlib.suppress(OSError):
                for part in answers(path):
                    self.wfile.write(part)
                    if closing.wait(0.005):
                        return

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = False

    with Listener(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}"
        finally:
            closing.set()
            listener.shutdown()
            thread.join()


@pytest.fixture
def hurried(monkeypatch):
    """The same limits in time, but shorter."""
    monkeypatch.setattr(index, "TIMEOUT", (5, 0.3))
    monkeypatch.setattr(cache_limits, "ANSWER", 1.0)
    monkeypatch.setattr(cache_limits, "WINDOW", 0.4)


def missed(one: SharedCache, built: Built, trust: Trust, folder: Path) -> str:
    """Why there is no wheel; it came in time, and nothing lies where the wheel would."""
    begin = time.monotonic()
    miss = one.find(built.key, trust, store(folder))
    assert time.monotonic() - begin < 10
    assert isinstance(miss, CacheMiss)
    assert [path for path in folder.rglob(built.wheel.name) if "rejected" not in path.parts] == []
    return miss.why


STATEMENT, WHEEL = "statement", "wheel"
PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"
SERVED: dict[str, tuple[str, Callable[[bytes], list[Fault]], str]] = {
    "statement: server error": (STATEMENT, lambda _: [Fault(500)] * 9, "answered 500 Internal Server Error"),
    "statement: asks for hours": (STATEMENT, lambda _: [Fault(503, {"Retry-After": "999"})] * 9, "in time"),
    "statement: forbidden": (STATEMENT, lambda _: [Fault(403)], "answered 403 Forbidden"),
    "statement: wants a password": (STATEMENT, lambda _: [Fault(401)], "answered 401 .*a user and a password"),
    "statement: a page": (STATEMENT, lambda _: [Fault(body=PAGE)], "is not a DSSE envelope"),
    "statement: empty": (STATEMENT, lambda _: [Fault(body=b"")], "the file is empty"),
    "statement: no JSON that ends": (STATEMENT, lambda _: [Fault(body=b"[" * 1_000_000)], "is not a DSSE envelope"),
    "statement: a huge number": (STATEMENT, lambda _: [Fault(body=b"1" * 100_000)], "is not a DSSE envelope"),
    "statement: truncated": (STATEMENT, lambda data: [Fault(body=data[:-99])], "is not a DSSE envelope"),
    "statement: broken off": (STATEMENT, lambda data: [Fault(cut=len(data) // 2)], "the answer is truncated"),
    "statement: stalls": (STATEMENT, lambda _: [Fault(cut=99, stall=True)], "stopped sending"),
    "statement: silent": (STATEMENT, lambda _: [Fault(cut=0, stall=True)], "stopped sending"),
    "statement: too large": (STATEMENT, lambda data: [Fault(body=data * 4000)], "is larger than 4.0 MB"),
    "statement: too many": (STATEMENT, lambda _: [Fault(body=b"\n" * 4_000_000)], "is not a DSSE envelope"),
    "statement: a part": (STATEMENT, lambda data: [Fault(206, body=data)], "answered 206"),
    "statement: a bomb": (
        STATEMENT,
        lambda _: [Fault(body=gzip.compress(bytes(100_000_000)), headers={"Content-Encoding": "gzip"})],
        "is larger than 4.0 MB",
    ),
    "statement: not packed": (
        STATEMENT, lambda _: [Fault(headers={"Content-Encoding": "gzip"})], "truncated or garbled",
    ),
    "statement: sent on without end": (STATEMENT, lambda _: [Fault(302, {"Location": "?"})] * 99, "redirects without"),
    "statement: sent on into this disk": (
        STATEMENT, lambda _: [Fault(302, {"Location": "file:///etc/passwd"})], "neither http nor https",
    ),
    "statement: sent on to nowhere": (
        STATEMENT, lambda _: [Fault(302, {"Location": "http://[::1"})], "redirects to an invalid address",
    ),
    "statement: sent on to a strange name": (
        STATEMENT, lambda _: [Fault(302, {"Location": f"http://{'a' * 300}.example/"})], "invalid address",
    ),
    "wheel: gone": (WHEEL, lambda _: [Fault(404)], "answered 404 Not Found"),
    "wheel: server error": (WHEEL, lambda _: [Fault(500)] * 9, "answered 500 Internal Server Error"),
    "wheel: a page": (WHEEL, lambda _: [Fault(body=PAGE)], "gave bytes with sha256 .*, not"),
    "wheel: empty": (WHEEL, lambda _: [Fault(body=b"")], "gave bytes with sha256 .*, not"),
    "wheel: truncated": (WHEEL, lambda data: [Fault(body=data[:-99])], "gave bytes with sha256 .*, not"),
    "wheel: other bytes": (WHEEL, lambda data: [Fault(body=data[::-1])], "gave bytes with sha256 .*, not"),
    "wheel: one byte more": (WHEEL, lambda data: [Fault(body=data + b"x")], "gave bytes with sha256 .*, not"),
    "wheel: broken off": (WHEEL, lambda _: [Fault(cut=999)] * 9, "broke off in the middle of the file, in 2 attempts"),
    "wheel: stalls": (WHEEL, lambda _: [Fault(cut=999, stall=True)] * 9, "stopped sending, in 2 attempts|too slow"),
    "wheel: silent": (WHEEL, lambda _: [Fault(cut=0, stall=True)] * 9, "stopped sending, in 2 attempts|too slow"),
    "wheel: sent on without end": (WHEEL, lambda _: [Fault(302, {"Location": "?"})] * 99, "redirects without end"),
    "wheel: sent on to nowhere": (
        WHEEL, lambda _: [Fault(302, {"Location": "http://[::1"})], "redirects to an invalid address",
    ),
    "wheel: sent on into this disk": (
        WHEEL, lambda _: [Fault(302, {"Location": "file:///etc/passwd"})], "neither http nor https",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_any_server_fault_is_a_miss_and_leaves_no_file(tmp_path, built, signer, hurried, counted, name):
    which, faults, words = SERVED[name]
    path = f"/{built.statement_path if which == STATEMENT else built.wheel_path}"
    with serving() as server:
        server.files = built.laid_out()
        server.faults[path] = faults(server.files[path])
        one, trust = plain(server.url), Trust.of(signer)
        why = missed(one, built, trust, tmp_path)
        assert re.search(words, why), why
        assert which == WHEEL or f"/{built.wheel_path}" not in server.paths()
        assert len(server.asked) <= 10
        server.faults.clear()
        hit = one.find(built.key, trust, store(tmp_path))
        assert isinstance(hit, CachedWheel)
        assert files.sha256(hit.wheel) == built.sha256
    counted(FAULTS)


def forever(*parts: bytes) -> Iterator[bytes]:
    """The first parts once, the last again and again."""
    yield from parts[:-1]
    while True:
        yield parts[-1]


SCRIPTED: dict[str, tuple[str, Callable[[], Iterator[bytes]], str]] = {
    "statement: not HTTP": (STATEMENT, lambda: iter([b"220 ready\r\n"]), "dropped the connection|broke off"),
    "statement: no answer": (STATEMENT, lambda: iter([]), "dropped the connection"),
    "statement: a head without end": (STATEMENT, lambda: forever(b"HTTP/1.0 200 OK\r\n", b"X: y\r\n"), "time|conn"),
    "statement: a trickling head": (STATEMENT, lambda: forever(b"HTTP/1.0 200 OK\r\nX: ", b"y"), "in time"),
    "statement: a trickling body": (STATEMENT, lambda: forever(b"HTTP/1.0 200 OK\r\n\r\n", b"y"), "in time"),
    "statement: a body without end": (STATEMENT, lambda: forever(b"HTTP/1.0 200 OK\r\n\r\n", bytes(9**6)), "4.0 MB"),
    "wheel: not HTTP": (WHEEL, lambda: iter([b"220 ready\r\n"]), "dropped the connection|broke off"),
    "wheel: no answer": (WHEEL, lambda: iter([]), "dropped the connection"),
    "wheel: a trickling head": (WHEEL, lambda: forever(b"HTTP/1.0 200 OK\r\nX: ", b"y"), "did not answer in time"),
    "wheel: a trickling body": (WHEEL, lambda: forever(b"HTTP/1.0 200 OK\r\n\r\n", b"y"), "too slow: .* per second"),
    "wheel: a body without end": (WHEEL, lambda: forever(b"HTTP/1.0 200 OK\r\n\r\n", bytes(9**6)), "more than 9.0 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTED)
def test_invalid_or_endless_answer_is_a_miss_in_time(tmp_path, built, signer, hurried, counted, monkeypatch, name):
    which, parts, words = SCRIPTED[name]
    monkeypatch.setattr(cache_limits, "LARGEST_WHEEL", 9_000_000)

    def answers(path: str) -> Iterator[bytes]:
        right = answer(built.laid_out()[path])
        return parts() if (which == STATEMENT) == path.startswith("/keys/") else iter([right])

    with scripted(answers) as url:
        why = missed(plain(url), built, Trust.of(signer), tmp_path)
    assert re.search(words, why), why
    counted(FAULTS)


def test_statement_is_not_read_after_its_timeout(tmp_path, built, signer, hurried):
    with scripted(lambda _: forever(b"HTTP/1.0 200 OK\r\n\r\n", b"y")) as url:
        before = set(threading.enumerate())
        assert "in time" in missed(plain(url), built, Trust.of(signer), tmp_path)
        within(5, lambda: set(threading.enumerate()) <= before)


def test_unexpected_error_of_requests_is_a_miss(tmp_path, built, signer, monkeypatch):
    def confused(*_, **__):
        raise LookupError("unknown encoding")  # made up: the known ways to it are closed

    monkeypatch.setattr(requests.Session, "request", confused)
    why = missed(plain("http://127.0.0.1:1"), built, Trust.of(signer), tmp_path)
    assert why == "http://127.0.0.1:1: unreadable answer (LookupError)"


def test_stopped_server_is_a_miss(tmp_path, built, signer, counted):
    address = f"http://me:secret@127.0.0.1:{free_port()}/cache"
    why = missed(plain(address), built, Trust.of(signer), tmp_path)
    assert why.startswith("http://***@127.0.0.1:")
    assert why.endswith("cannot be reached, or dropped the connection")
    counted(FAULTS)


def renamed(built: Built, name: str) -> bytes:
    """A statement of a wheel with another name, which voltforge itself would not make."""
    return statement(built.wheel).replace(built.wheel.name.encode(), name.encode())


def lie(name: str, built: Built, me: Signer, stranger: Signer) -> bytes:
    """A statement that is not of this build by a trusted key."""
    return {
        "not signed": lambda: signing.make_envelope(statement(built.wheel), None),
        "signed by a stranger": lambda: signing.make_envelope(statement(built.wheel), stranger),
        "another build's": lambda: signing.make_envelope(statement(built.wheel, "e" * 64), me),
        "a folder in the name": lambda: signing.make_envelope(renamed(built, "x/sample-1-py3-none-any.whl"), me),
        "a folder above": lambda: signing.make_envelope(renamed(built, "../../sample-1-py3-none-any.whl"), me),
        "no wheel": lambda: signing.make_envelope(renamed(built, "sample-1.0.tar.gz"), me),
        "another project's wheel": lambda: signing.make_envelope(renamed(built, "torch-1-py3-none-any.whl"), me),
        "no statement": lambda: signing.make_envelope(b"{}", me),
    }[name]()


LIES = {
    "not signed": "is not signed",
    "signed by a stranger": "unknown key",
    "another build's": "about another build, e{64}",
    "a folder in the name": "invalid file name",
    "a folder above": "invalid file name",
    "no wheel": "is not on a wheel",
    "another project's wheel": "says that it is 'sample'",
    "no statement": "is not an in-toto statement",
}


@pytest.mark.parametrize("name", LIES)
def test_statement_of_another_build_or_untrusted_key_is_a_miss(tmp_path, built, signer, stranger, counted, name):
    content = {built.statement_path: lie(name, built, signer, stranger), built.wheel_path: built.wheel}
    samples.tree(tmp_path / "cache", content)
    why = missed(plain(str(tmp_path / "cache")), built, Trust.of(signer), tmp_path / "store")
    assert why.startswith(f"{tmp_path}/cache/{built.statement_path}: ")
    assert re.search(LIES[name], why), why
    counted(FAULTS)


def test_one_valid_statement_among_invalid_ones_is_enough(tmp_path, built, signer, stranger):
    bad = [lie(name, built, signer, stranger) for name in LIES]
    content = {built.statement_path: b"".join([*bad, built.envelope]), built.wheel_path: built.wheel}
    samples.tree(tmp_path / "cache", content)
    assert isinstance(
        plain(str(tmp_path / "cache")).find(built.key, Trust.of(signer), store(tmp_path / "s")), CachedWheel
    )


def test_changed_byte_anywhere_in_the_statement_is_a_miss(tmp_path, built, signer, counted):
    samples.tree(tmp_path / "cache", {built.statement_path: built.envelope, built.wheel_path: built.wheel})
    one, places = plain(str(tmp_path / "cache")), range(0, len(built.envelope), 8)
    for position in places:
        changed = bytearray(built.envelope)
        changed[position] ^= 1
        (tmp_path / "cache" / built.statement_path).write_bytes(changed)
        assert missed(one, built, Trust.of(signer), tmp_path / "store"), position
    counted(FAULTS, len(places))


def put_aside(path: Path) -> None:
    path.unlink()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "statement_words", "wheel_words"),
    [
        (put_aside, "^$", "does not have it"),
        (pipe, "is not a file", "is not a file"),
        (folder, "is not a file", "is not a file"),
        (endless, "is not a file", "is not a file"),
        (circle, "", "does not have it|cannot be read"),
        (lambda path: path.write_bytes(b"x" * 5_000_000), "is larger than 4.0 MB", "gave bytes with sha256"),
    ],
    ids=["gone", "pipe", "folder", "endless", "circle", "large"],
)
def test_any_unusable_file_in_a_folder_is_a_miss(tmp_path, built, signer, counted, spoil, statement_words, wheel_words):
    for path, words in ((built.wheel_path, wheel_words), (built.statement_path, statement_words)):
        files.remove(tmp_path / "cache")
        samples.tree(tmp_path / "cache", {built.statement_path: built.envelope, built.wheel_path: built.wheel})
        spoil(tmp_path / "cache" / path)
        why = missed(plain(str(tmp_path / "cache")), built, Trust.of(signer), tmp_path / "store")
        assert re.search(words, why), why
        counted(FAULTS)


def test_unreadable_cache_is_a_miss(built, signer, counted):
    trust = Trust.of(signer)
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        mine = build(Path(room) / "built", signer)
        one = plain(f"{room}/cache")
        one.put(mine.key, mine.wheel, mine.envelope)
        (Path(room) / "cache" / mine.statement_path).chmod(0)
        assert "cannot be read: Permission denied" in missed(one, mine, trust, Path(room) / "store")
        (Path(room) / "cache" / "keys").chmod(0)
        assert "cannot be read: Permission denied" in missed(one, mine, trust, Path(room) / "store")
        (Path(room) / "cache" / "keys").chmod(0o755)
    counted(FAULTS, 2)


def test_unwritable_download_folder_is_a_miss(built, signer, counted):
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        mine = build(Path(room) / "built", signer)
        plain(f"{room}/cache").put(mine.key, mine.wheel, mine.envelope)
        (Path(room) / "store").mkdir(mode=0o555)
        why = missed(plain(f"{room}/cache"), mine, Trust.of(signer), Path(room) / "store")
    assert "cannot be written: Permission denied" in why
    counted(FAULTS)
