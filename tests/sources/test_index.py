"""The configured package index, and files on real indexes on loopback and on disk."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import ssl
import sys
import time
import zipfile
from pathlib import Path

import pytest
import trustme
from hypothesis import example, given
from hypothesis import strategies as st
from pypi_simple import PYPI_SIMPLE_ENDPOINT
from rich.console import Console
from uv import find_uv_bin

from tests.support.corruption import ANSWERS_COUNTED, Room, cases, damaged, saying
from tests.support.servers import Fault, Server, serving
from voltforge.sources import index
from voltforge.sources.fetch import Artifact, DownloadError, Store
from voltforge.sources.index import Indexes, NotOnIndexError, Patience, configured
from voltforge.system import console, urls
from voltforge.system.files import remove
from voltforge.system.process import run
from voltforge.system.urls import redacted

NO_PIP = Path("no-such-python")
"""An interpreter that does not exist, so that only the given environment counts."""
SDIST = "small-1.0.tar.gz"
DATA = b"not really an archive" * 100
HASH = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(console, "screen", Console(file=io.StringIO()))


@pytest.fixture
def server():
    with serving() as one:
        one.files[f"/files/{SDIST}"] = DATA
        yield one


@pytest.fixture
def other():
    with serving() as one:
        one.files[f"/files/{SDIST}"] = DATA
        yield one


# --- the configured index ---


def test_without_configuration_and_pip_the_index_of_pypi_simple_is_used():
    assert configured({"PATH": ""}, python=NO_PIP) == Indexes(default=PYPI_SIMPLE_ENDPOINT)


# --- printed addresses ---


@given(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(["pypi.example/simple/", "127.0.0.1:8080/a/b", "[::1]/x?sig=SECRET", "h.example#token=SECRET"]),
)
def test_no_printed_address_contains_the_password(user, password, rest):
    shown = redacted(f"https://{user}:<{password}>@{rest}")
    assert f"<{password}>" not in shown
    assert "SECRET" not in shown
    assert shown.startswith("https://***@" + rest.partition("?")[0].partition("#")[0])


def test_the_query_of_a_signed_address_is_not_printed():
    assert redacted("https://s3.example/file?signature=x") == "https://s3.example/file?***"


@pytest.mark.parametrize("address", ["https://pypi.example/simple/", "file:///srv/simple", "/srv/wheels", "C@D"])
def test_an_address_without_credentials_is_printed_unchanged(address):
    assert redacted(address) == address


# --- finding a file ---


def test_a_file_is_found_on_an_html_index_with_its_hash(server):
    link = Indexes(server.project("small", SDIST)).find("Small", SDIST)
    assert (link.url, link.sha256) == (f"{server.url}/files/{SDIST}", HASH)


def test_a_file_is_found_on_a_json_index_with_its_hash(server):
    listing = {"filename": SDIST, "url": f"../../files/{SDIST}", "hashes": {"sha256": HASH}}
    page = {"meta": {"api-version": "1.0"}, "name": "small", "files": [listing]}
    server.files["/simple/small/"] = json.dumps(page).encode()
    server.types["/simple/small/"] = "application/vnd.pypi.simple.v1+json"
    link = Indexes(f"{server.url}/simple/").find("small", SDIST)
    assert (link.url, link.sha256) == (f"{server.url}/files/{SDIST}", HASH)


def test_an_index_without_hashes_is_accepted(server):
    assert Indexes(server.project("small", SDIST, hashes=False)).find("small", SDIST).sha256 is None


def test_a_file_is_found_on_an_index_on_disk(tmp_path, server):
    (tmp_path / "simple" / "small-thing").mkdir(parents=True)
    page = f'<a href="../../files/{SDIST}#sha256={HASH}">{SDIST}</a>'
    (tmp_path / "simple" / "small-thing" / "index.html").write_text(page)
    indexes = Indexes(f"{server.url}/simple/", extra=((tmp_path / "simple").as_uri(),))
    link = indexes.find("Small_Thing", SDIST)
    assert urls.local_path(link.url) == tmp_path / "files" / SDIST
    assert link.sha256 == HASH


def test_find_links_precede_indexes(tmp_path, server):
    indexes = Indexes(server.project("small", SDIST), find_links=(f"{server.url}/wheels.html",))
    server.files["/wheels.html"] = f'<a href="mine/{SDIST}">download</a>'.encode()
    assert indexes.find("small", SDIST).url == f"{server.url}/mine/{SDIST}"
    (tmp_path / SDIST).write_bytes(DATA)
    indexes = Indexes(indexes.default, find_links=(str(tmp_path), *indexes.find_links))
    assert urls.local_path(indexes.find("small", SDIST).url) == tmp_path / SDIST


def test_an_extra_index_is_asked_if_the_default_index_does_not_have_the_project(server, other):
    indexes = Indexes(f"{server.url}/simple/", extra=(other.project("small", SDIST),))
    assert indexes.find("small", SDIST).place == indexes.extra[0]
    assert server.paths() == ["/simple/small/"]


def test_a_temporary_index_error_is_retried_and_a_lasting_one_skips_the_index(server, other):
    server.project("small", SDIST)
    server.faults["/simple/small/"] = [Fault(503)]
    indexes = Indexes(f"{server.url}/simple/", extra=(other.project("small", SDIST),))
    session = indexes.session(Patience(attempts=2, first=0))
    assert indexes.find("small", SDIST, session).place == indexes.default
    server.faults["/simple/small/"] = [Fault(503)] * 2
    assert indexes.find("small", SDIST, session).place == indexes.extra[0]


def test_the_error_for_a_missing_file_names_every_index_without_passwords(tmp_path, server, other):
    server.password = "right"
    other.files["/simple/small/"], other.types["/simple/small/"] = b"\x00", "image/png"
    indexes = Indexes(
        server.url.replace("//", "//me:wrong@") + "/simple/",
        extra=(f"{other.url}/simple/", tmp_path.as_uri()),
        find_links=(str(tmp_path), f"{other.url}/none.html"),
    )
    with pytest.raises(NotOnIndexError) as caught:
        indexes.find("small", SDIST)
    assert caught.value.attempts == (
        (str(tmp_path), "does not have it"),
        (f"{other.url}/none.html", "answered 404 Not Found"),
        (server.url.replace("//", "//***@") + "/simple/", "answered 401 Unauthorized"),
        (f"{other.url}/simple/", "its page cannot be read (UnsupportedContentTypeError)"),
        (tmp_path.as_uri(), "does not have it"),
    )
    assert "wrong" not in str(caught.value)


def test_a_page_from_the_network_cannot_link_to_a_local_file(server):
    server.project("small", SDIST, base="file:///etc/")
    with pytest.raises(NotOnIndexError, match="neither http nor https"):
        Indexes(f"{server.url}/simple/").find("small", SDIST)


def test_credentials_are_sent_to_their_own_server_only(server, other):
    server.password = "p@ss"
    for base in (f"{server.url}/files/", f"{other.url}/files/"):
        server.project("small", SDIST, base=base)
        link = Indexes(server.url.replace("//", "//me:p%40ss@") + "/simple/").find("small", SDIST)
        assert ("me:p%40ss@" in link.url) == base.startswith(server.url)


# --- answers that lie ---

PATIENCE = Patience(attempts=2, first=0, longest=0)
HTML = f"""<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="1.0"><base href="/simple/small/">
</head><body><h1>Links</h1><a href="../../files/{SDIST}#sha256={HASH}" data-requires-python="&gt;=3.8" data-yanked="bad"
>{SDIST}</a><br/><!-- a remark --><a href="x.whl" data-core-metadata="sha256={HASH}">x&amp;y.whl</a></body></html>"""
LISTED = {
    "filename": SDIST, "url": f"../../files/{SDIST}", "hashes": {"sha256": HASH}, "size": len(DATA), "yanked": "bad",
    "requires-python": ">=3.8", "upload-time": "2023-11-14T22:13:20Z", "core-metadata": {"sha256": HASH},
}  # fmt: skip
JSON = {"meta": {"api-version": "1.1"}, "name": "small", "versions": ["1.0"], "files": [LISTED]}
JSON_TYPE = "application/vnd.pypi.simple.v1+json"


@pytest.fixture(scope="module")
def liar():
    with serving() as one:
        one.files[f"/files/{SDIST}"] = DATA
        yield one


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return Room(tmp_path_factory.mktemp("room") / "watched")


def fetched(url: str, room: Room) -> list[str]:
    """Fetch the file by way of the index in a watched room: it is right, or what each place did is a sentence."""
    remove(room.out)
    indexes = Indexes(f"{url}/simple/")
    store = Store(room.out, ask_indexes=lambda: indexes, ask_archives=lambda: (), patience=PATIENCE)
    wanted = Artifact(SDIST, HASH, index="small", size=len(DATA))
    with room.watched(DownloadError) as caught:
        assert store.get(wanted).read_bytes() == DATA
    with room.watched(NotOnIndexError):
        indexes.find("small", SDIST, indexes.session(PATIENCE))
    return [attempt.outcome for error in caught for attempt in error.missing[0].attempts]


def paged(liar: Server, body: bytes, kind: str, fault: Fault | None = None) -> str:
    """Let the server answer with this page each time that it is asked."""
    liar.files["/simple/small/"], liar.types["/simple/small/"] = body, kind
    liar.faults["/simple/small/"] = [fault] * 9 if fault else []
    return liar.url


def test_undamaged_pages_are_read(liar, room):
    assert fetched(paged(liar, HTML.encode(), "text/html"), room) == []
    assert fetched(paged(liar, json.dumps(JSON).encode(), JSON_TYPE), room) == []


@cases(160)
@given(
    damaged(HTML.encode()), st.sampled_from(["text/html", "text/html; charset=utf-16", "text/html; charset=no-such"])
)
@example(b"<![x[", "text/html")
@example(b'<base href="http://[">' + HTML.encode(), "text/html")
@example(b'<a class="a b" data-yanked href="x">' * 2 + b"<a data-gpg-sig=1 data-gpg-sig href=//[>", "text/html")
@example(b"<a>" * 50_000, "text/html")
@example(HTML.replace(HASH, "\x1b[2J" * 99).encode(), "text/html")
def test_a_damaged_html_page_is_refused_or_read(liar, room, counted, page, kind):
    fetched(paged(liar, page, kind), room)
    counted(ANSWERS_COUNTED)


ODD = st.sampled_from(
    [None, True, -1, 0, 10**400, 1e308, "", "x", [], {}, [[]], {"sha256": "\x1b[2J"}, {"sha256": 7}, {"md5": "x"},
     "9.9", "file:///etc/passwd", "ftp://x.example/y", "//[", "javascript:x", f"../../files/{SDIST}", SDIST, "1e999",
     "\ud800"]
)  # fmt: skip


@cases(160)
@given(
    st.one_of(
        damaged(json.dumps(JSON).encode()),
        st.lists(st.tuples(st.sampled_from([*LISTED, *JSON, "api-version"]), ODD), min_size=1, max_size=3),
    )
)
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example([("size", -1)])
@example([("yanked", True), ("size", 10**400)])
def test_a_damaged_json_page_is_refused_or_read(liar, room, counted, damage):
    if isinstance(damage, list):
        page = json.loads(json.dumps(JSON))
        for key, value in damage:
            place = (
                page["files"][0] if key in LISTED and page["files"] else page["meta"] if key == "api-version" else page
            )
            if isinstance(place, dict):
                place[key] = value if key != "files" or isinstance(value, list) else []
        damage = json.dumps(page).encode()
    fetched(paged(liar, damage, JSON_TYPE), room)
    counted(ANSWERS_COUNTED)


HEADERS = st.dictionaries(
    st.sampled_from(
        ["Content-Type", "Content-Length", "Content-Encoding", "Content-Range", "Content-Disposition", "Location",
         "Retry-After", "Transfer-Encoding", "Set-Cookie", "ETag", "X-PyPI-Last-Serial", "Connection"]
    ),
    st.sampled_from(
        ["9" * 5000, "-5", "7", "1, 2", "gzip", "deflate", "zstd", "gzip, gzip, gzip, gzip, gzip, gzip", "chunked",
         "x" * 60_000, "http://[", "file:///etc/passwd", "ftp://x.example/y", "/simple/small/", "//", "?", "\xff\xfe",
         "http://127.0.0.1:99999/", "http://\xe9.\xe9/", "http:///x", "http://..", "mailto:x", "nan", "1e999", "; ;",
         "Mon, 99 Nov 99999 99:99:99 GMT", "bytes 0-5/9", "a=b; expires=x", "close", "image/png",
         "text/html; charset=utf-7", "text/html; charset=" + "x" * 3000]
    ),
    max_size=3,
)  # fmt: skip


@cases(200)
@given(
    st.sampled_from(
        [None, None, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401, 404, 416, 429, 500, 503, 599, 700, 999]
    ),
    HEADERS,
    st.sampled_from([b"", b"no page", b"\x1f\x8b\x08damaged", HTML.encode()]),
    st.sampled_from(["/simple/small/", f"/files/{SDIST}"]),
)
@example(302, {"Location": "http://["}, b"", "/simple/small/")
@example(503, {"Retry-After": "Mon, 99 Nov 99999 99:99:99 GMT"}, b"", "/simple/small/")
@example(None, {"Content-Length": "9" * 5000}, b"x", f"/files/{SDIST}")
@example(206, {"Content-Range": f"bytes 0-{'9' * 5000}/*"}, b"x", f"/files/{SDIST}")
def test_strange_headers_are_refused_or_ignored(liar, room, counted, status, headers, body, path):
    paged(liar, HTML.encode(), "text/html")
    liar.faults[path] = [Fault(status, headers=headers, body=body)] * 9
    fetched(liar.url, room)
    liar.faults[path] = []
    counted(ANSWERS_COUNTED)


ANSWER = b"""HTTP/1.1 200 OK
Content-Type: text/html
Transfer-Encoding: chunked

5
<a hr
4
ef=x
0

""".replace(b"\n", b"\r\n")


@cases(120)
@given(damaged(ANSWER))
@example(ANSWER.replace(b"5\r", b"-5\r"))
@example(ANSWER.replace(b"5\r", b"f" * 5000 + b"\r"))
@example(b"HTTP/1.1 100 Continue\r\n\r\n" * 99 + ANSWER)
@example(b"")
def test_malformed_http_is_refused_or_ignored(room, counted, answer):
    with saying(lambda path: [answer]) as url:
        fetched(url, room)
    counted(ANSWERS_COUNTED)


@pytest.mark.parametrize(
    ("page", "kind", "words"),
    [
        (b"[" * 100_000, JSON_TYPE, "its page cannot be read (RecursionError)"),
        (b"<![x[", "text/html", "its page cannot be read (ParserRejectedMarkup)"),
        (HTML.encode(), "image/png", "its page cannot be read (UnsupportedContentTypeError)"),
        (HTML.replace(HASH, "0" * 64).encode(), "text/html", f"has a file of that name with sha256 {'0' * 64}"),
        (HTML.replace(SDIST, "other.tar.gz").encode(), "text/html", "does not have it"),
        (
            HTML.replace("../../", "ftp://x.example/").encode(),
            "text/html",
            "redirects to an address that is neither http nor",
        ),
        (
            HTML.replace("../../files", "javascript:files").encode(),
            "text/html",
            "redirects to an address that is neither",
        ),
    ],
)
def test_an_unusable_page_is_reported(liar, room, page, kind, words):
    [outcome] = fetched(paged(liar, page, kind), room)
    assert outcome.startswith(words)


def test_a_yanked_file_or_one_with_a_wrong_size_is_still_found_by_its_hash(liar, room):
    for key, value in (("yanked", True), ("size", -1), ("size", 10**300)):
        page = {**JSON, "files": [{**LISTED, key: value}]}
        fetched(paged(liar, json.dumps(page).encode(), JSON_TYPE), room)
        assert (room.out / HASH[:16] / SDIST).exists() == (key == "yanked" or value == -1 or value > 0)


def test_a_malformed_hash_on_a_page_is_ignored_and_never_printed(liar, room):
    assert fetched(paged(liar, HTML.replace(HASH, "\x1b[2J").encode(), "text/html"), room) == []


def test_text_of_a_server_is_never_printed(room):
    with saying(lambda path: [b"HTTP/1.1 404 \x1b[2Jcleared\r\nContent-Length: 0\r\n\r\n"]) as url:
        assert fetched(url, room) == ["does not have it"]
    with saying(lambda path: [b"HTTP/1.1 403 \x1b[2Jcleared\r\nContent-Length: 0\r\n\r\n"]) as url:
        assert fetched(url, room) == ["answered 403 Forbidden"]
    assert (
        redacted("http://x.example/\x1b[2J\ud800" + "y" * 9000) == "http://x.example/%1B[2J%3F" + "y" * 474 + "\u2026"
    )


ENDLESS = b"HTTP/1.1 %s\r\nContent-Type: text/html\r\nLocation: /simple/small/\r\n\r\n"


def endless(status: bytes, block: bytes, pause: float = 0.0):
    """The same bytes again and again."""
    yield ENDLESS % status
    while True:
        yield block
        time.sleep(pause)


def test_an_endless_page_fails_at_the_limit(room):
    with saying(lambda path: endless(b"200 OK", b"<a href=x>y</a>" * 4000)) as url:
        assert fetched(url, room) == ["sends a page of more than 16.0 MB"]


def test_a_page_that_inflates_endlessly_fails_at_the_limit(room):
    packed = gzip.compress(bytes(300_000_000))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    with saying(lambda path: [head % len(packed), packed]) as url:
        assert fetched(url, room) == ["sends a page of more than 16.0 MB"]


def test_a_page_that_arrives_byte_by_byte_fails_in_time(room, monkeypatch):
    monkeypatch.setattr(index, "PAGE_TIME", 0.2)
    with saying(lambda path: endless(b"200 OK", b" ", 0.01)) as url:
        assert fetched(url, room) == ["did not send its page in 0 s"]


@pytest.mark.parametrize("status", [b"302 Found", b"503 Service Unavailable"])
def test_an_endless_body_of_a_redirect_or_error_is_not_read(room, status):
    with saying(lambda path: endless(status, b"x" * 60_000)) as url:
        words = "redirects without end" if status.startswith(b"302") else "answered 503 Service Unavailable"
        assert fetched(url, room) == [words]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/simple/small/", "redirects without end"),
        ("file:///etc/passwd", "redirects to an address that is neither http nor https"),
        ("ftp://x.example/y", "redirects to an address that is neither http nor https"),
        ("http://[", "sends an invalid header, or redirects to an invalid address"),
        ("http://127.0.0.1:99999/", "sends an invalid header, or redirects to an invalid address"),
    ],
)
@pytest.mark.parametrize("path", ["/simple/small/", f"/files/{SDIST}"])
def test_a_redirect_without_a_usable_target_is_reported(liar, room, path, location, words):
    paged(liar, HTML.encode(), "text/html")
    liar.faults[path] = [Fault(302, headers={"Location": location.replace("/simple/small/", path)})] * 99
    [outcome] = fetched(liar.url, room)
    liar.faults[path] = []
    assert outcome == words or "is not a valid address" in outcome


# --- certificates ---


@pytest.fixture
def private(tmp_path):
    """An https server whose certificate only ``ca.pem`` vouches for."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving(context) as one:
        one.files[f"/files/{SDIST}"] = DATA
        one.project("small", SDIST)
        yield one


def test_configured_certificates_override_the_variable_of_requests(private, tmp_path, monkeypatch):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "other.pem"))
    indexes = Indexes(f"{private.url}/simple/", certificate=str(tmp_path / "ca.pem"), certificate_from="PIP_CERT")
    assert indexes.find("small", SDIST).sha256 == HASH


def test_an_untrusted_certificate_is_reported_with_the_setting(private, tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    for name, words in (("other.pem", "is not trusted by"), ("none.pem", "cannot be checked:")):
        indexes = Indexes(f"{private.url}/simple/", certificate=str(tmp_path / name), certificate_from="SSL_CERT_FILE")
        with pytest.raises(NotOnIndexError, match=f"{words} .*{name}, which SSL_CERT_FILE names"):
            indexes.find("small", SDIST)


def test_without_a_certificate_setting_the_error_names_the_variable_to_set(private, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotOnIndexError, match="set SSL_CERT_FILE"):
        Indexes(f"{private.url}/simple/").find("small", SDIST)


# --- uv ---


@pytest.fixture
def wheel(tmp_path):
    """A real wheel of nothing but itself, and a requirements file that locks it by hash."""
    info = "small-1.0.dist-info"
    members = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "small.py": "",
    }
    record = []
    path = tmp_path / "files" / "small-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
            mark = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={mark},{len(text)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "lock.txt").write_text(f"small==1.0 --hash=sha256:{digest}\n")
    return path


def installed(indexes: Indexes, tmp_path: Path) -> bool:
    argv = [find_uv_bin(), "pip", "install", "--no-config", "--no-cache", "--python", sys.executable, "--target"]
    argv += [str(tmp_path / "target"), "--require-hashes", "--requirements", str(tmp_path / "lock.txt")]
    argv += indexes.uv_arguments()
    assert "secret" not in " ".join(argv)
    run(argv, env=indexes.uv_environment())
    return (tmp_path / "target" / "small.py").exists()


def test_uv_installs_from_an_index_on_disk_if_an_earlier_index_has_another_version(wheel, tmp_path, server):
    server.files["/files/small-0.9-py3-none-any.whl"] = b""
    (tmp_path / "simple" / "small").mkdir(parents=True)
    page = f'<a href="../../files/{wheel.name}">{wheel.name}</a>'
    (tmp_path / "simple" / "small" / "index.html").write_text(page)
    earlier = server.project("small", "small-0.9-py3-none-any.whl")
    indexes = Indexes(f"{server.url}/none/", extra=(earlier, (tmp_path / "simple").as_uri()))
    assert installed(indexes, tmp_path)


def test_uv_installs_from_a_find_links_folder_without_any_index(wheel, tmp_path):
    assert installed(Indexes(None, find_links=(str(wheel.parent),)), tmp_path)


@pytest.mark.parametrize("role", ["default", "extra", "find_links"])
def test_uv_gets_credentials_for_every_index_but_never_as_arguments(wheel, tmp_path, server, other, role):
    server.password = "secret/@:"
    server.files[f"/files/{wheel.name}"] = wheel.read_bytes()
    server.project("small", wheel.name, base=f"{server.url}/files/")
    server.files["/links.html"], server.types["/links.html"] = server.files["/simple/small/"], "text/html"
    place = server.url.replace("//", "//me:secret%2F%40%3A@")
    indexes = {
        "default": Indexes(f"{place}/simple/"),
        "extra": Indexes(f"{other.url}/simple/", extra=(f"{place}/simple/",)),
        "find_links": Indexes(f"{other.url}/simple/", find_links=(f"{place}/links.html",)),
    }[role]
    assert installed(indexes, tmp_path)


def test_uv_trusts_the_configured_certificates(wheel, tmp_path, private):
    private.files[f"/files/{wheel.name}"] = wheel.read_bytes()
    indexes = Indexes(private.project("small", wheel.name), certificate=str(tmp_path / "ca.pem"))
    assert installed(indexes, tmp_path)


def test_variables_of_uv_that_its_arguments_replace_are_removed():
    environ = {"UV_INDEX": "https://a.example/simple", "UV_FIND_LINKS": "/wheels", "UV_NO_INDEX": "1", "LANG": "C"}
    assert Indexes().uv_environment(environ) == {"LANG": "C"}


@pytest.mark.slow
def test_the_configured_index_has_a_file_that_every_index_has():
    link = configured().find("six", "six-1.16.0-py2.py3-none-any.whl")
    assert link.sha256 in (None, "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254")
