"""Fetching by hash: from real servers that break, lie, stall and redirect, from folders, and by several processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.support.corruption import bounded, saying
from tests.support.servers import Fault, Server, serving
from voltforge.sources import fetch, index, transfer
from voltforge.sources.fetch import Artifact, DownloadError, Store
from voltforge.sources.index import Indexes, Patience
from voltforge.sources.transfer import FetchError, StoreWriteError
from voltforge.system import console

FILE = "thing-1.0.tar.gz"
DATA = random.Random(7).randbytes(300_000)
PATH = f"/{FILE}"
NO_INDEX = Indexes(None)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    with serving() as one:
        one.files[PATH] = DATA
        yield one


@pytest.fixture
def other():
    with serving() as one:
        one.files[PATH] = DATA
        yield one


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Return the printed output."""
    paper = io.StringIO()
    monkeypatch.setattr(console, "screen", Console(file=paper, highlight=False, soft_wrap=True))
    return paper


def artifact(server: Server | None = None, data: bytes = DATA, file: str = FILE, **more) -> Artifact:
    url = f"{server.url}/{file}" if server else None
    return Artifact(file, hashlib.sha256(data).hexdigest(), **{"size": len(data), "url": url, **more})


def store(folder: Path, indexes: Indexes = NO_INDEX, archives: tuple[str, ...] = (), **more) -> Store:
    more = {"patience": Patience(attempts=4, first=0), **more}
    return Store(folder, ask_indexes=lambda: indexes, ask_archives=lambda: archives, **more)


def problem(a_store: Store, *artifacts: Artifact) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        a_store.get_all(artifacts)
    return caught.value


def outcomes(error: DownloadError) -> list[str]:
    return [attempt.outcome for missing in error.missing for attempt in missing.attempts]


def part_of(folder: Path, wanted: Artifact) -> Path:
    """Return the partial file that a killed run leaves."""
    path = folder / wanted.sha256[:16] / f"{wanted.sha256}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- keeping ---


def test_a_file_is_downloaded_once_and_stored_under_its_own_name(tmp_path, server):
    one = store(tmp_path)
    assert not one.holds(artifact(server))
    path = one.get(artifact(server))
    assert (path.name, path.read_bytes()) == (FILE, DATA)
    assert one.holds(artifact(server))
    assert store(tmp_path).get(artifact(server)) == path
    assert server.paths() == [PATH]
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", FILE]


def test_two_files_with_the_same_name_are_both_stored(tmp_path, server, other):
    other.files[PATH] = b"another"
    first, second = store(tmp_path).get_all([artifact(server), artifact(other, b"another")])
    assert (first.read_bytes(), second.read_bytes()) == (DATA, b"another")


def test_a_corrupt_stored_file_is_set_aside_and_downloaded_again(tmp_path, server, said):
    path = store(tmp_path).get(artifact(server))
    path.write_bytes(DATA[:-1] + b"?")
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    [rejected] = (tmp_path / "rejected").iterdir()
    assert rejected.read_bytes() == DATA[:-1] + b"?"
    assert rejected.name == f"{FILE}-{hashlib.sha256(rejected.read_bytes()).hexdigest()}"
    assert str(rejected) in said.getvalue()


def test_holds_checks_the_size_but_not_the_bytes(tmp_path, server):
    path = store(tmp_path).get(artifact(server))
    path.write_bytes(bytes(len(DATA)))
    assert store(tmp_path).holds(artifact(server))
    path.write_bytes(DATA[:-1])
    assert not store(tmp_path).holds(artifact(server))
    assert store(tmp_path).holds(artifact(server, size=None))


def test_a_file_that_a_user_put_into_the_folder_is_used_in_place(tmp_path, server):
    (tmp_path / FILE).write_bytes(DATA)
    assert store(tmp_path).holds(artifact(server))
    assert store(tmp_path).get(artifact(server)) == tmp_path / FILE
    assert server.asked == []


def test_a_wrong_file_that_a_user_put_there_is_left_and_not_used(tmp_path, server, said):
    (tmp_path / FILE).write_bytes(b"wrong")
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert (tmp_path / FILE).read_bytes() == b"wrong"
    assert hashlib.sha256(b"wrong").hexdigest() in said.getvalue()


@pytest.mark.parametrize("data", [b"", b"x"])
def test_a_tiny_or_empty_file_can_be_downloaded(tmp_path, server, data):
    server.files[PATH] = data
    assert store(tmp_path).get(artifact(server, data)).read_bytes() == data


@pytest.mark.parametrize("file", ["", "..", "a/b", "/etc/passwd", "rejected"])
def test_a_file_name_outside_the_folder_is_refused(tmp_path, file):
    with pytest.raises(FetchError, match="not a file name"):
        store(tmp_path).get(Artifact(file, "0" * 64))


def test_a_malformed_hash_is_refused(tmp_path):
    with pytest.raises(FetchError, match="64 hexadecimal digits"):
        store(tmp_path).get(Artifact(FILE, "../../../../x"))


# --- places ---


@pytest.mark.parametrize("name", [FILE, "{sha256}", "{start}/" + FILE])
@pytest.mark.parametrize("kind", ["folder", "address"])
def test_mirrors_are_asked_first_by_name_by_hash_and_by_the_stores_layout(tmp_path, server, other, name, kind):
    wanted = artifact(server)
    name = name.format(sha256=wanted.sha256, start=wanted.sha256[:16])
    (tmp_path / "mirror" / name).parent.mkdir(parents=True)
    (tmp_path / "mirror" / name).write_bytes(DATA)
    other.files = {f"/sub/{name}": DATA}
    mirror = str(tmp_path / "mirror") if kind == "folder" else f"{other.url}/sub/"
    assert store(tmp_path / "store", mirrors=(mirror,)).get(wanted).read_bytes() == DATA
    assert server.asked == []


def test_variables_name_the_mirrors_in_order_and_forbid_the_network(tmp_path):
    environ = {"VOLTFORGE_MIRRORS": "https://a.example/x, /b\nfile:///c", "VOLTFORGE_OFFLINE": "1"}
    one = Store.from_environment(tmp_path, environ)
    assert one.mirrors == ("https://a.example/x", "/b", "file:///c")
    assert one.offline
    assert not Store.from_environment(tmp_path, {"VOLTFORGE_OFFLINE": "0"}).offline


def test_variables_name_the_index(tmp_path):
    one = Store.from_environment(tmp_path, {"UV_DEFAULT_INDEX": "https://a.example/simple", "PATH": ""})
    assert one.indexes.default == "https://a.example/simple"


def test_a_file_is_found_on_the_package_index_by_its_project(tmp_path, server):
    server.files[f"/files/{FILE}"] = server.files.pop(PATH)
    indexes = Indexes(server.project("thing", FILE))
    assert store(tmp_path, indexes).get(artifact(index="thing")).read_bytes() == DATA


def test_the_next_index_is_asked_if_the_first_has_another_file_with_that_name(tmp_path, server, other):
    for each, data in ((server, b"another"), (other, DATA)):
        each.files[f"/files/{FILE}"] = data
        each.project("thing", FILE)
    indexes = Indexes(f"{server.url}/simple/", extra=(f"{other.url}/simple/",))
    assert store(tmp_path, indexes).get(artifact(index="thing")).read_bytes() == DATA
    assert f"/files/{FILE}" not in server.paths()


def test_a_file_is_found_in_the_archive_of_the_distribution(tmp_path, server, other):
    other.files = {"/debian/pool/main/t/thing/thing_1.0~1+b1_amd64.deb": DATA}
    wanted = artifact(file="thing_1.0~1+b1_amd64.deb", pool="pool/main/t/thing/thing_1.0~1+b1_amd64.deb")
    one = store(tmp_path, archives=(f"{server.url}/debian", f"{other.url}/debian/"))
    assert one.get(wanted).read_bytes() == DATA


def test_the_error_names_every_failed_place_and_its_answer(tmp_path, server, other):
    server.files[PATH] = b"bad"
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / FILE).write_bytes(b"worse")
    wanted = artifact(server, index="thing", pool="pool/x.deb", size=None)
    one = store(tmp_path / "s", Indexes(f"{other.url}/simple/"), (other.url,), mirrors=(str(tmp_path / "mirror"),))
    error = problem(one, wanted)
    bad, worse = hashlib.sha256(b"bad").hexdigest(), hashlib.sha256(b"worse").hexdigest()
    assert [(attempt.place, attempt.outcome) for attempt in error.missing[0].attempts] == [
        (str(tmp_path / "mirror"), f"gave bytes with sha256 {worse}, not {wanted.sha256}"),
        (f"{other.url}/simple/", "does not have it"),
        (
            f"{server.url}{PATH}",
            f"gave bytes with sha256 {bad}, not {wanted.sha256}; "
            f"stored for inspection as {tmp_path / 's' / 'rejected' / f'{FILE}-{bad}'}",
        ),
        (f"{other.url}/pool/x.deb", "answered 404 Not Found"),
    ]
    assert all(attempt.place in str(error) for attempt in error.missing[0].attempts)
    assert (tmp_path / "s" / "rejected" / f"{FILE}-{bad}").read_bytes() == b"bad"
    assert not one.holds(wanted)


def test_after_wrong_bytes_the_next_place_is_asked(tmp_path, server, other):
    server.files[PATH] = DATA[::-1]
    assert store(tmp_path, mirrors=(server.url,)).get(artifact(other)).read_bytes() == DATA


def test_one_error_names_all_missing_files_and_the_others_are_downloaded(tmp_path, server):
    lost = [artifact(server, file="lost-1"), artifact(server, file="lost-2")]
    error = problem(store(tmp_path), lost[0], artifact(server), lost[1])
    assert [missing.artifact for missing in error.missing] == lost
    assert store(tmp_path).holds(artifact(server))


def test_passwords_are_used_but_never_printed(tmp_path, server, said):
    server.password = "secret"
    private = artifact(server, url=server.url.replace("//", "//me:secret@") + PATH)
    assert store(tmp_path).get(private).read_bytes() == DATA
    lost = artifact(url=server.url.replace("//", "//me:secret@") + "/lost?signature=secret", file="lost")
    for offline in (False, True):
        error = problem(store(tmp_path, mirrors=(private.url,), offline=offline), lost)
        assert "secret" not in str(error) + said.getvalue()
        assert "***@" in str(error)


# --- offline ---


def test_offline_asks_no_server_and_names_all_missing_files_and_where_to_put_them(tmp_path, server):
    one = store(tmp_path, Indexes(f"{server.url}/simple/"), (server.url,), mirrors=(server.url,), offline=True)
    lost = [artifact(server, index="thing"), artifact(file="b.deb", pool="pool/b.deb")]
    error = problem(one, *lost)
    assert server.asked == []
    assert error.offline
    assert [missing.artifact for missing in error.missing] == lost
    for words in (FILE, lost[0].sha256, f"{server.url}{PATH}", "project thing", "b.deb", "pool/b.deb"):
        assert words in error.what
    assert str(tmp_path) in error.hint
    assert "VOLTFORGE_MIRRORS" in error.hint


def test_offline_still_uses_local_folders_and_indexes(tmp_path, server):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / FILE).write_bytes(DATA)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "b").write_bytes(b"b")
    indexes = Indexes(f"{server.url}/simple/", find_links=(str(tmp_path / "links"),))
    one = store(tmp_path / "s", indexes, mirrors=(server.url, (tmp_path / "mirror").as_uri()), offline=True)
    paths = one.get_all([artifact(server, index="thing"), artifact(data=b"b", file="b")])
    assert [path.read_bytes() for path in paths] == [DATA, b"b"]
    assert server.asked == []


# --- connections that break ---


def test_a_killed_download_resumes(tmp_path, server):
    part_of(tmp_path, artifact(server)).write_bytes(DATA[:1000])
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert server.sent == [(PATH, 1000, len(DATA) - 1000)]


def test_a_download_killed_after_the_last_byte_needs_no_request(tmp_path, server):
    part_of(tmp_path, artifact(server)).write_bytes(DATA)
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert server.asked == []


def test_status_416_completes_a_part_of_a_file_of_unknown_size(tmp_path, server):
    part_of(tmp_path, artifact(server)).write_bytes(DATA)
    assert store(tmp_path).get(artifact(server, size=None)).read_bytes() == DATA
    assert server.sent == [(PATH, 0, 0)]


def test_a_part_longer_than_the_file_is_discarded(tmp_path, server):
    part_of(tmp_path, artifact(server)).write_bytes(DATA + b"more")
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    length=st.integers(1, len(DATA)),
    cuts=st.lists(st.integers(0, len(DATA)), max_size=3),
    known=st.booleans(),
    before=st.integers(0, len(DATA)),
)
def test_after_a_break_at_any_byte_the_bytes_are_right_and_none_is_sent_twice(server, length, cuts, known, before):
    data = DATA[:length]
    server.files[PATH], server.sent[:], server.faults[PATH] = data, [], [Fault(cut=cut) for cut in cuts]
    wanted = artifact(server, data, **({} if known else {"size": None}))
    with tempfile.TemporaryDirectory() as folder:
        part_of(Path(folder), wanted).write_bytes(data[:before])
        assert store(Path(folder)).get(wanted).read_bytes() == data
    spans = [range(start, start + count) for _, start, count in server.sent]
    assert sum(map(len, spans)) == length - min(before, length)
    assert not known or all(span.start == before or span.start in [o.stop for o in spans] for span in spans)


def test_the_rest_is_requested_if_a_body_without_length_breaks_off(tmp_path, server):
    server.faults[PATH] = [Fault(cut=1000, headers={"Content-Length": ""})]
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert [start for _, start, _ in server.sent] == [0, 1000]


def test_the_rest_is_requested_from_a_silent_server(tmp_path, server, monkeypatch):
    monkeypatch.setattr(index, "TIMEOUT", (5, 0.2))
    server.faults[PATH] = [Fault(cut=1000, stall=True)]
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert [start for _, start, _ in server.sent] == [0, 1000]


def test_a_server_that_is_always_silent_fails(tmp_path, server, monkeypatch):
    monkeypatch.setattr(index, "TIMEOUT", (5, 0.1))
    server.faults[PATH] = [Fault(cut=10, stall=True)] * 9
    assert outcomes(problem(store(tmp_path), artifact(server))) == ["stopped sending, in 4 attempts"]


def test_the_next_place_continues_the_part_of_a_server_that_always_breaks_off(tmp_path, server, other):
    server.faults[PATH] = [Fault(cut=1000)] * 9
    assert store(tmp_path, mirrors=(server.url,)).get(artifact(other)).read_bytes() == DATA
    assert len(server.sent) == 4
    assert other.sent == [(PATH, 4000, len(DATA) - 4000)]


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path, server):
    server.faults[PATH] = [Fault(cut=1000), Fault(whole=True)]
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA


@pytest.mark.parametrize(
    ("etag", "starts"),
    [({}, [0, 0]), ({"ETag": ""}, [0, 1000, 0]), ({"ETag": 'W/"weak"'}, [0, 1000, 0])],
    ids=["known by its ETag", "without an ETag", "with a weak ETag"],
)
def test_a_file_that_changed_between_answers_is_downloaded_whole(tmp_path, server, etag, starts):
    server.files[PATH] = DATA[::-1]
    server.faults[PATH] = [Fault(cut=1000, headers=etag)]
    one = store(tmp_path, patience=_Changing(server, attempts=4, first=0))
    assert one.get(artifact(server)).read_bytes() == DATA
    assert [start for _, start, _ in server.sent] == starts


class _Changing(Patience):
    """Puts the right file in place while the store waits to ask again."""

    def __init__(self, server: Server, **more) -> None:
        super().__init__(**more)
        object.__setattr__(self, "server", server)

    def pause(self, failures: int) -> float:
        self.server.files[PATH] = DATA  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize("length", [300, len(DATA)])
def test_bad_bytes_of_an_earlier_place_do_not_reach_the_file(tmp_path, server, length):
    part_of(tmp_path, artifact(server)).write_bytes(bytes(length))
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert not (tmp_path / "rejected").exists()


# --- servers that lie ---


@pytest.mark.parametrize(
    "lie",
    ["bytes 0-299999/300000", "bytes 1000-1999/300000", "bytes 1000-299999/300001", "bytes 5-4/9", "lines 1-2/3", ""],
)
def test_an_unrequested_range_is_not_used(tmp_path, server, lie):
    part_of(tmp_path, artifact(server)).write_bytes(DATA[:1000])
    server.faults[PATH] = [Fault(headers={"Content-Range": lie}, body=b"evil")]
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert sorted(start for _, start, _ in server.sent) == [0, 1000]  # the server's threads end as they like
    assert "Range" not in server.asked[1][1]


def test_a_range_is_refused_if_the_whole_file_was_requested(tmp_path, server):
    server.faults[PATH] = [Fault(206, headers={"Content-Range": "bytes 0-9/10"}, body=DATA)]
    assert outcomes(problem(store(tmp_path), artifact(server))) == ["sent another range than the requested one"]


def test_a_file_with_another_announced_size_is_not_downloaded(tmp_path, server):
    server.files[PATH] = DATA + b"more"
    error = problem(store(tmp_path), artifact(server))
    assert outcomes(error) == [f"offered {len(DATA) + 4} bytes instead of {len(DATA)}"]


def test_an_endless_answer_is_stopped_at_the_known_size(tmp_path, server):
    server.files[PATH] = bytes(64_000_000)
    server.faults[PATH] = [Fault(headers={"Content-Length": ""})]
    error = problem(store(tmp_path), artifact(server))
    assert outcomes(error) == [f"sent more than the expected {len(DATA)} bytes"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_sent_with_a_content_encoding_is_stored_unchanged(tmp_path, server):
    # Some servers call a .tar.gz `Content-Encoding: gzip`; the client must not unpack it.
    server.faults[PATH] = [Fault(headers={"Content-Encoding": "gzip"})] * 9
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


def test_a_redirect_to_another_server_is_followed(tmp_path, server, other):
    server.faults[PATH] = [Fault(302, headers={"Location": f"{other.url}{PATH}"})]
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert other.paths() == [PATH]


def test_a_redirect_to_a_file_of_this_machine_is_refused(tmp_path, server):
    (tmp_path / "local").write_bytes(DATA)
    server.faults[PATH] = [Fault(302, headers={"Location": (tmp_path / "local").as_uri()})]
    error = problem(store(tmp_path / "s"), artifact(server))
    assert outcomes(error) == ["redirects to an address that is neither http nor https"]


def endless(block: bytes, pause: float = 0.0):
    """An answer that says nothing of its size and has no end."""
    yield b"HTTP/1.1 200 OK\r\n\r\n"
    while True:
        yield block
        time.sleep(pause)


def test_an_endless_file_of_unknown_size_is_stopped_at_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MOST", 5_000_000)
    with saying(lambda path: endless(bytes(100_000))) as url:
        error = problem(store(tmp_path), artifact(url=f"{url}{PATH}", size=None))
    assert outcomes(error) == ["sent more than the expected 5000000 bytes"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_that_sends_almost_nothing_fails(tmp_path, monkeypatch):
    """Each byte comes in time, and the file would take a year."""
    monkeypatch.setattr(index, "TIMEOUT", (5, 0.2))
    with saying(lambda path: endless(b"x", 0.02)) as url:
        error = problem(store(tmp_path), artifact(url=f"{url}{PATH}"))
    assert outcomes(error) == ["sent almost nothing, in 4 attempts"]


@pytest.mark.parametrize("status", [b"302 Found", b"503 Service Unavailable"])
def test_an_endless_body_of_a_redirect_or_error_is_not_read(tmp_path, server, status):
    def answer(path: str):
        yield b"HTTP/1.1 %s\r\nLocation: %s\r\n\r\n" % (status, f"{server.url}{PATH}".encode())
        yield from endless(bytes(100_000))

    with saying(answer) as url, bounded():
        one, wanted = store(tmp_path), artifact(url=f"{url}{PATH}")
        if status.startswith(b"302"):
            assert one.get(wanted).read_bytes() == DATA
        else:
            assert outcomes(problem(one, wanted)) == ["answered 503 Service Unavailable"]


@pytest.mark.parametrize("location", ["http://[", "http://\xe9.\xe9/", "http://127.0.0.1:99999/"])
def test_a_malformed_redirect_is_reported_and_skipped(tmp_path, server, other, location):
    server.faults[PATH] = [Fault(302, headers={"Location": location})] * 9
    assert len(outcomes(problem(store(tmp_path), artifact(server)))) == 1
    server.faults[PATH] = [Fault(302, headers={"Location": location})] * 9
    assert store(tmp_path, mirrors=(server.url,)).get(artifact(other)).read_bytes() == DATA


def test_numbers_with_thousands_of_digits_in_headers_are_ignored(tmp_path, server):
    many = "9" * 5000
    server.faults[PATH] = [Fault(headers={"Content-Length": many}, body=DATA)] * 9
    store(tmp_path / "a").get(artifact(server))
    part_of(tmp_path / "b", artifact(server)).write_bytes(DATA[:1000])
    server.faults[PATH] = [Fault(headers={"Content-Range": f"bytes 1000-{many}/*"}, body=b"evil")]
    assert store(tmp_path / "b").get(artifact(server)).read_bytes() == DATA
    server.faults[PATH] = [Fault(503, headers={"Retry-After": "Mon, 99 Nov 99999 99:99:99 GMT"})] * 9
    assert len(outcomes(problem(store(tmp_path / "c"), artifact(server)))) == 1


# --- patience ---


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_error_is_retried(tmp_path, server, status):
    server.faults[PATH] = [Fault(status)] * 2
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA


def test_a_server_with_lasting_errors_fails(tmp_path, server):
    server.faults[PATH] = [Fault(503)] * 9
    assert outcomes(problem(store(tmp_path), artifact(server))) == ["answered 503 Service Unavailable"]
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_client_error_is_not_retried(tmp_path, server, other, status):
    server.faults[PATH] = [Fault(status)] * 9
    assert store(tmp_path, archives=(other.url,)).get(artifact(server, pool=FILE)).read_bytes() == DATA
    assert len(server.asked) == 1


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("3600", 20)])
def test_retry_after_is_obeyed_up_to_a_limit(tmp_path, server, monkeypatch, asked, waited):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults[PATH] = [Fault(429, headers={"Retry-After": asked})]
    store(tmp_path, patience=Patience(attempts=4, first=1, longest=20)).get(artifact(server))
    assert pauses == [waited]


def test_pauses_grow_up_to_the_longest():
    patience = Patience(first=2, longest=30)
    assert [patience.pause(failures) for failures in range(1, 8)] == [0, 2, 4, 8, 16, 30, 30]


def test_an_unreachable_server_is_tried_as_often_as_patience_allows(tmp_path, monkeypatch):
    with serving() as gone:
        wanted = artifact(gone)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    error = problem(store(tmp_path, patience=Patience(attempts=4, first=1)), wanted)
    assert outcomes(error) == ["cannot be reached, or dropped the connection"]
    assert pauses == [1, 2]  # and once at once


def test_an_unknown_host_name_is_tried_twice(tmp_path, monkeypatch):
    tries = []

    def unknown(host, *_):
        tries.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    # A stand-in for the resolver: a real one may take its time, or invent an answer.
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = problem(store(tmp_path), artifact(url="http://nowhere.invalid/" + FILE))
    assert outcomes(error) == ["its name cannot be resolved"]
    assert tries == ["nowhere.invalid"] * 2


@pytest.mark.parametrize("address", ["http://", "http://[", "gopher://x.example/y", "http://a b/", "http://.example/"])
def test_a_malformed_address_is_reported_and_skipped(tmp_path, server, address):
    assert outcomes(problem(store(tmp_path), artifact(url=address)))
    assert store(tmp_path, mirrors=(address,)).get(artifact(server)).read_bytes() == DATA


def test_a_proxy_from_the_environment_is_used(tmp_path, server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    # To a server, a request through a proxy is one with a whole URL: this one sees the path of the other's file.
    assert store(tmp_path).get(artifact(url=f"http://upstream.invalid{PATH}")).read_bytes() == DATA
    assert server.paths() == [PATH]


# The proxy setting is apt's own, as apt-config tells it; CI has it.
@pytest.mark.skipif(not shutil.which("apt-config"), reason="this machine has no apt")
def test_the_archive_is_reached_through_apts_proxy(tmp_path, server, other, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "apt.conf").write_text(f'Acquire::http::Proxy "{other.url}"; Acquire::http::Proxy::127.0.0.1 "DIRECT";')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    direct = store(tmp_path / "direct", archives=(server.url,))
    assert direct.get(artifact(pool=FILE)).read_bytes() == DATA
    through = store(tmp_path / "through", archives=("http://upstream.invalid",))
    assert through.get(artifact(pool=FILE)).read_bytes() == DATA
    assert (server.paths(), other.paths()) == ([PATH], [PATH])


def test_an_untrusted_certificate_fails_at_once_and_the_error_names_the_setting(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    authority = trustme.CA()
    for name, issuer in (("good.pem", authority), ("other.pem", trustme.CA())):
        issuer.cert_pem.write_to_path(tmp_path / name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving(context) as server:
        server.files[PATH] = DATA
        for name in ("other.pem", "none.pem"):
            indexes = Indexes(None, certificate=str(tmp_path / name), certificate_from="SSL_CERT_FILE")
            error = problem(store(tmp_path / "s", indexes, patience=Patience()), artifact(server))
            assert pauses == []
            assert f"{name}, which SSL_CERT_FILE names" in outcomes(error)[0]
        indexes = Indexes(None, certificate=str(tmp_path / "good.pem"))
        assert store(tmp_path / "s", indexes).get(artifact(server)).read_bytes() == DATA


# --- several at once ---


def several(server: Server, count: int, **more) -> list[Artifact]:
    """So many files of that server, each with content of its own."""
    made = []
    for number in range(count):
        data = random.Random(number).randbytes(100_000)
        server.files[f"/file-{number}"] = data
        made.append(artifact(server, data, f"file-{number}", **more))
    return made


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_at_most_four_files_are_downloaded_at_once(tmp_path, server):
    wanted, hold = several(server, 9), threading.Event()
    server.faults = {f"/{artifact.file}": [Fault(hold=hold)] for artifact in wanted}
    paths: list[Path] = []
    fetching = threading.Thread(target=lambda: paths.extend(store(tmp_path).get_all(wanted)))
    fetching.start()
    wait_until(lambda: len(server.asked) >= fetch.AT_ONCE)
    time.sleep(0.3)  # in which a fifth would have been asked for
    assert len(server.asked) == fetch.AT_ONCE == 4
    hold.set()
    fetching.join()
    assert [path.name for path in paths] == [artifact.file for artifact in wanted]
    assert [path.read_bytes() for path in paths] == [server.files[f"/{artifact.file}"] for artifact in wanted]


def test_a_file_is_returned_while_others_are_downloaded(tmp_path, server):
    wanted, hold = several(server, 3), threading.Event()
    server.faults = {f"/{artifact.file}": [Fault(hold=hold)] for artifact in wanted[:2]}
    arriving = store(tmp_path).arriving(wanted)
    assert next(arriving) == (wanted[2], tmp_path / wanted[2].sha256[:16] / "file-2")
    hold.set()
    assert {one for one, _ in arriving} == set(wanted[:2])


def test_a_file_named_twice_is_downloaded_once(tmp_path, server, said):
    wanted = artifact(server)
    assert store(tmp_path).get_all([wanted, *several(server, 1), wanted])[::2] == [store(tmp_path).get(wanted)] * 2
    assert server.paths().count(PATH) == 1
    assert said.getvalue() == ""


def test_missing_files_are_named_in_the_requested_order(tmp_path, server):
    wanted = several(server, 12)
    for artifact in wanted[::2]:
        del server.files[f"/{artifact.file}"]
    error = problem(store(tmp_path), *wanted)
    assert [missing.artifact for missing in error.missing] == wanted[::2]
    assert all(store(tmp_path).holds(artifact) for artifact in wanted[1::2])


def test_the_indexes_are_looked_up_once_for_many_files(tmp_path, server):
    asked = []

    def ask() -> Indexes:
        asked.append(1)
        time.sleep(0.1)  # in which others ask too
        return NO_INDEX

    many = Store(tmp_path, ask_indexes=ask, ask_archives=lambda: (), patience=Patience(attempts=1))
    many.get_all(several(server, 4))
    assert asked == [1]


def test_a_write_error_ends_all_downloads_and_the_next_run_resumes_each(tmp_path, server):
    stalls, fails = several(server, 2)
    hold = threading.Event()
    server.faults = {f"/{stalls.file}": [Fault(cut=50_000, stall=True)], f"/{fails.file}": [Fault(hold=hold)]}
    part, blocked = part_of(tmp_path, stalls), tmp_path / fails.sha256[:16] / fails.file

    def block() -> None:
        wait_until(lambda: part.exists() and part.stat().st_size == 50_000)
        (blocked / "no file").mkdir(parents=True)  # where the finished file would be put
        hold.set()

    before = set(threading.enumerate())
    blocking = threading.Thread(target=block)
    blocking.start()
    with pytest.raises(StoreWriteError):
        store(tmp_path).get_all([stalls, fails])
    blocking.join()
    assert [
        thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("together")
    ] == []
    assert store(tmp_path).get(stalls).read_bytes() == server.files[f"/{stalls.file}"]
    assert (f"/{stalls.file}", 50_000, 50_000) in server.sent


FETCH_ALL = """
import sys
from pathlib import Path
from voltforge.sources.fetch import Artifact, Store
from voltforge.sources.index import Indexes
folder, url, *hashes = sys.argv[1:]
store = Store(Path(folder), ask_indexes=lambda: Indexes(None), ask_archives=lambda: ())
try:
    store.get_all([Artifact(f"file-{n}", one, url=f"{url}/file-{n}") for n, one in enumerate(hashes)])
except KeyboardInterrupt:
    import threading
    sys.exit(130 if threading.active_count() == 1 else 131)
"""


def test_ctrl_c_ends_all_downloads_and_the_next_run_resumes_each(tmp_path, server):
    wanted = several(server, 3)
    server.faults = {f"/{artifact.file}": [Fault(cut=40_000, stall=True)] for artifact in wanted}
    argv = [sys.executable, "-c", FETCH_ALL, str(tmp_path), server.url, *(artifact.sha256 for artifact in wanted)]
    parts = [part_of(tmp_path, artifact) for artifact in wanted]
    with subprocess.Popen(argv, cwd=ROOT) as child:
        wait_until(lambda: all(part.exists() and part.stat().st_size == 40_000 for part in parts))
        child.send_signal(signal.SIGINT)
        # 130: interrupted, and no thread was left; a stalled server is otherwise waited for a minute.
        assert child.wait(20) == 130
    paths = store(tmp_path).get_all(wanted)
    assert [path.read_bytes() for path in paths] == [server.files[f"/{artifact.file}"] for artifact in wanted]
    assert sorted(server.sent[-3:]) == [(f"/file-{number}", 40_000, 60_000) for number in range(3)]


# --- this machine ---


def test_an_unwritable_folder_is_reported(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError, match=r"file.* cannot be written"):
        store(tmp_path / "file" / "folder").get(artifact(server))


FETCH = """
import sys
from pathlib import Path
from voltforge.sources.fetch import Artifact, Store
from voltforge.sources.index import Indexes
folder, url, sha256 = sys.argv[1:]
store = Store(Path(folder), ask_indexes=lambda: Indexes(None), ask_archives=lambda: ())
store.get(Artifact("thing-1.0.tar.gz", sha256, url=url))
"""


def test_processes_that_need_the_same_file_download_it_once(tmp_path, server):
    argv = [sys.executable, "-c", FETCH, str(tmp_path), f"{server.url}{PATH}", artifact().sha256]
    hold = threading.Event()
    server.faults[PATH] = [Fault(hold=hold)]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(subprocess.Popen(argv, cwd=ROOT))
        while first.poll() is None and not server.asked:
            time.sleep(0.01)
        others = [stack.enter_context(subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)) for _ in range(3)]
        said = [child.stdout.readline().decode() for child in others]
        hold.set()
    assert said == [f"  {FILE}: waiting for another process that downloads it\n"] * 3
    assert [child.returncode for child in (first, *others)] == [0] * 4
    assert server.sent == [(PATH, 0, len(DATA))]
    assert store(tmp_path, offline=True).get(artifact()).read_bytes() == DATA


def test_the_part_of_a_killed_process_is_resumed_by_the_next(tmp_path, server):
    server.faults[PATH] = [Fault(cut=200_000, stall=True)]
    argv = [sys.executable, "-c", FETCH, str(tmp_path), f"{server.url}{PATH}", artifact().sha256]
    part = part_of(tmp_path, artifact())
    with subprocess.Popen(argv, cwd=ROOT) as child:
        while child.poll() is None and not (part.exists() and part.stat().st_size == 200_000):
            time.sleep(0.01)
        child.kill()
    assert store(tmp_path).get(artifact(server)).read_bytes() == DATA
    assert server.sent[-1] == (PATH, 200_000, len(DATA) - 200_000)


def test_a_full_disk_is_reported(tmp_path, server):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = 'mount -t tmpfs -o size=64k none "$0" && '
    if not shutil.which("unshare") or subprocess.run([*mount, small + "true", str(tmp_path)], check=False).returncode:
        # Only a small file system of its own can really be full; CI is root and may mount one.
        pytest.skip("this machine lets an ordinary user mount nothing, so no disk can be made full")
    argv = [sys.executable, "-c", FETCH, str(tmp_path), f"{server.url}{PATH}", artifact().sha256]
    argv = [*mount, small + 'exec "$@"', str(tmp_path), *argv]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"StoreWriteError: .*\.part cannot be written: No space left on device", ended.stderr)


@pytest.mark.slow
def test_a_small_file_is_downloaded_from_the_configured_index(tmp_path):
    wanted = Artifact(
        "six-1.16.0-py2.py3-none-any.whl",
        "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254",
        size=11053,
        index="six",
    )
    assert Store.from_environment(tmp_path).get(wanted).stat().st_size == 11053
