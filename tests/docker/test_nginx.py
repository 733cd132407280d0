"""docker/nginx.conf, run by the real nginx in front of two real servers, one of them sometimes down."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import Backend, free_port

CONFIGURATION = Path(__file__).parents[2] / "docker" / "nginx.conf"
LEFT_OUT = float(re.findall(r"fail_timeout=(\d+)s", CONFIGURATION.read_text())[0])
"""Seconds for which a failed server is skipped."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def server(self) -> str:
        """The name of the server that sent the answer."""
        assert self.status == 200, self.body
        return self.json["system_fingerprint"]

    @property
    def error(self) -> dict[str, Any]:
        """The message of an error in OpenAI's format."""
        assert self.headers["Content-Type"] == "application/json"
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        return error


@dataclass
class Front:
    """A running nginx."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def connect(self, timeout: float = 60) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        with self.connect() as connection:
            return request(connection, method, path, body, **headers)

    def chat(self, session: str = "", **more: Any) -> Answer:
        """Return the whole answer to a prompt, with or without a session."""
        return self.ask("POST", CHAT, prompt(**more), **of(session))

    def log(self, count: int) -> list[dict[str, Any]]:
        """Return the lines of the access log, after it has the expected number of them: nginx writes a line after the
        answer.
        """
        path = self.folder / "access.log"
        within(5, lambda: path.read_bytes().count(b"\n") >= count)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == count
        return lines

    def errors(self) -> list[str]:
        return (self.folder / "error.log").read_text().splitlines()


def request(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """Send a prompt on a connection that stays open."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def prompt(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 1, **more}


def of(session: str) -> dict[str, str]:
    return {"X_Session_ID": session} if session else {}


class Stream:
    """A streamed answer; ``words`` are the received tokens, ``times`` when each was sent and received."""

    def __init__(self, front: Front, session: str = "", **more: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in of(session).items()}
        self.connection.request("POST", CHAT, json.dumps(prompt(stream=True, **more)), headers)
        self.response = self.connection.getresponse()
        self.server = ""
        self.words: list[str] = []
        self.times: list[tuple[float, float]] = []
        self.done = False
        self.rest = b""

    def read(self, count: int | None = None) -> None:
        """Read some tokens, or all; http.client raises IncompleteRead if the last chunk never comes."""
        before = len(self.words)
        while count is None or len(self.words) < before + count:
            data = self.response.read1()  # readline would take a cut for the end
            if not data:
                return
            *events, self.rest = (self.rest + data).split(b"\n\n")
            for event in events:
                self.take(event.decode())

    def take(self, event: str) -> None:
        if event == "data: [DONE]":
            self.done = True
            return
        part = json.loads(event.removeprefix("data: "))
        self.server = part["system_fingerprint"]
        self.words.append(part["choices"][0]["delta"]["content"].strip())
        self.times.append((part["sent"], time.monotonic()))

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def placed(folder: Path, port: int, addresses: list[str]) -> str:
    """The configuration with other ports, addresses and paths, otherwise unchanged."""
    text = CONFIGURATION.read_text()
    places = {
        "listen 80;": f"listen 127.0.0.1:{port};",
        "vllm-0:8000": addresses[0],
        "vllm-1:8000": addresses[1],
        "/dev/stdout": f"{folder}/access.log",
        "/dev/stderr": f"{folder}/error.log",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        # The folder of large bodies is compiled in and belongs to root.
        "http {": "http {\n" + "".join(
            f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        ),
    }  # fmt: skip
    for old, new in places.items():
        assert old in text, f"docker/nginx.conf does not say {old!r} any more, which this test puts elsewhere"
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def running(folder: Path, addresses: list[str]) -> Iterator[Front]:
    """Run nginx with docker/nginx.conf in front of two addresses until the block ends."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if not program:
        pytest.fail("nginx is not installed, and its configuration can be tried by nothing else: apt-get install nginx")
    folder.mkdir()
    port = free_port()
    (folder / "nginx.conf").write_text(placed(folder, port, addresses))
    # Its workers would run as nobody, who may not write into pytest's folders.
    more = "daemon off; user root;" if os.geteuid() == 0 else "daemon off;"
    command = [program, "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log"), "-g", more]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        within(10, lambda: process.poll() is not None or takes_connections(port))
        assert process.poll() is None, process.communicate()[1].decode()
        yield Front(folder, port, process)
        bad = re.compile(r"\[(alert|crit|emerg)\]")
        assert [line for line in (folder / "error.log").read_text().splitlines() if bad.search(line)] == []
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def within(seconds: float, what: Callable[[], Any]) -> float:
    """Wait until a condition holds, and return the seconds that it took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds, f"not within {seconds} seconds"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture
def pair() -> Iterator[list[Backend]]:
    """Two running servers."""
    both = [Backend("vllm-0"), Backend("vllm-1")]
    try:
        for server in both:
            server.start()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture
def front(tmp_path, pair) -> Iterator[Front]:
    """nginx in front of both servers."""
    with running(tmp_path / "nginx", [server.address for server in pair]) as nginx:
        yield nginx


def sessions_of(front: Front, backend: Backend, count: int) -> list[str]:
    """Sessions that belong to a server."""
    found: list[str] = []
    for number in range(1000):
        if len(found) < count and front.chat(f"session {number}").server == backend.name:
            found.append(f"session {number}")
    return found


def asked(*backends: Backend) -> list[str]:
    return [user for backend in backends for user in backend.seen()["asked"]]


# --- who answers ---


@pytest.mark.slow
def test_a_session_stays_with_its_server_and_a_thousand_sessions_are_shared_evenly(front, pair):
    sessions = [f"{random.getrandbits(128):032x}" for _ in range(1000)]
    order = sessions * 4
    random.shuffle(order)

    def ask(mine: list[str]) -> list[tuple[str, str]]:
        with front.connect() as connection:
            return [(user, request(connection, "POST", CHAT, prompt(), **of(user)).server) for user in mine]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [one for part in pool.map(ask, (order[start::8] for start in range(8))) for one in part]
    homes: dict[str, set[str]] = collections.defaultdict(set)
    for session, server in answers:
        homes[session].add(server)
    assert len(answers) == 4000
    assert all(len(servers) == 1 for servers in homes.values())
    first = sum(servers == {pair[0].name} for servers in homes.values())
    print(f"1000 sessions: {first} and {1000 - first}")
    assert 400 <= first <= 600


def test_a_session_keeps_its_server_after_nginx_restarts(tmp_path, front, pair):
    before = {f"session {number}": front.chat(f"session {number}").server for number in range(40)}
    with running(tmp_path / "again", [server.address for server in pair]) as again:
        assert {session: again.chat(session).server for session in before} == before


def test_requests_without_a_session_go_to_the_server_with_fewer_of_them(front, pair):
    for server in pair:
        server.behave(pace=0.2)
    streams = [Stream(front, max_tokens=10) for _ in range(40)]
    for stream in streams:
        stream.read()
        stream.close()
    assert collections.Counter(stream.server for stream in streams) == {"vllm-0": 20, "vllm-1": 20}


def test_an_empty_session_header_is_ignored(front, pair):
    assert {front.ask("POST", CHAT, prompt(), X_Session_ID="").server for _ in range(20)} == {"vllm-0", "vllm-1"}


@pytest.mark.slow
def test_a_slow_server_does_not_delay_the_other(front, pair):
    slow, quick = pair
    slows, quicks = sessions_of(front, slow, 5), sessions_of(front, quick, 5)
    slow.behave(delay=6)
    quick.behave(delay=0.5)
    with concurrent.futures.ThreadPoolExecutor(13) as pool:
        waiting = [pool.submit(front.chat, session, user="waits") for session in slows]
        waiting += [pool.submit(front.chat, user="waits") for _ in range(8)]
        within(5, lambda: asked(*pair).count("waits") == 13 and sum(one.done() for one in waiting) == 4)
        quick.behave(delay=0)
        begin = time.monotonic()
        for session in quicks * 20:
            assert front.chat(session).server == quick.name
        # Four requests without a session wait there, so this server has more open requests all the time.
        for _ in range(100):
            assert front.chat().server == quick.name
        took = time.monotonic() - begin
        assert sum(one.done() for one in waiting) == 4, "the slow server was not slow for long enough"
    print(f"200 requests beside a server that takes 6 s: {took:.2f} s")


# --- streams ---


@pytest.mark.parametrize("chunked", [1, 0], ids=["in chunks", "until the connection ends"])
def test_every_token_is_passed_on_before_the_next_is_sent(front, pair, chunked):
    for server in pair:
        server.behave(pace=0.3, chunked=chunked)
    stream = Stream(front, max_tokens=6)
    stream.read()
    stream.close()
    assert stream.words == [f"word{number}" for number in range(6)]
    assert stream.done
    assert stream.response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    late = [came - sent for sent, came in stream.times]
    print(f"late by at most {max(late) * 1000:.1f} ms")
    assert all(came < following for (_, came), (following, _) in zip(stream.times, stream.times[1:], strict=False))


def test_a_client_that_hangs_up_stops_the_generation(front, pair):
    for server in pair:
        server.behave(pace=0.05)
    stream = Stream(front, max_tokens=1000)
    stream.read(2)
    stream.close()
    within(5, lambda: sum(server.seen()["gone"] for server in pair) == 1)


@pytest.mark.slow
def test_a_killed_server_cuts_its_stream_and_its_sessions_move_and_return(front, pair):
    dies, stays = pair
    mine, others = sessions_of(front, dies, 5), sessions_of(front, stays, 5)
    for server in pair:
        server.behave(pace=0.1)
    cut, whole = Stream(front, mine[0], max_tokens=30, user="cut"), Stream(front, others[0], max_tokens=30)
    cut.read(5)
    dies.kill()
    with pytest.raises(http.client.IncompleteRead):
        cut.read()
    assert cut.words == [f"word{number}" for number in range(len(cut.words))], "no word is missing or came twice"
    assert not cut.done
    assert "cut" not in asked(stays)
    whole.read()
    assert whole.done
    assert len(whole.words) == 30

    assert {front.chat(session).server for session in mine + others} == {stays.name}
    dies.start()
    came = within(LEFT_OUT + 5, lambda: front.chat(mine[0]).server == dies.name)
    print(f"the sessions returned {came:.1f} s after the server")
    assert {front.chat(session).server for session in mine} == {dies.name}
    assert {front.chat(session).server for session in others} == {stays.name}
    for stream in (cut, whole):
        stream.close()


# --- what is asked again, and what not ---


def test_an_undelivered_prompt_is_retried_once_at_the_other_server(front, pair):
    dead, living = pair
    mine = sessions_of(front, dead, 3)
    before = len(asked(*pair))
    dead.kill()
    assert [front.chat(session, user=session).server for session in mine] == [living.name] * 3
    assert [asked(living).count(session) for session in mine] == [1, 1, 1]
    # The second and third request skip the dead server.
    tried = collections.Counter(line["upstream"] for line in front.log(before + 3)[before:])
    assert tried == {f"{dead.address}, {living.address}": 1, living.address: 2}


def test_a_delivered_prompt_is_never_sent_twice(front, pair):
    dies, stays = pair
    mine = sessions_of(front, dies, 1)[0]
    dies.behave(delay=30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(front.chat, mine, user="once")
        within(5, lambda: "once" in dies.seen()["asked"])
        dies.kill()
        answer = waiting.result(10)
    assert answer.status == 502
    assert answer.error["type"] == "BadGatewayError"
    assert "once" not in asked(stays)


@pytest.mark.slow
def test_a_server_that_drops_connections_is_skipped_soon(tmp_path, pair):
    """A container that left its network: packets to it are lost."""
    with full() as silent, running(tmp_path / "nginx", [silent, pair[1].address]) as front:
        times = []
        for number in range(20):
            begin = time.monotonic()
            assert front.chat(f"session {number}", user=f"user {number}").server == pair[1].name
            times.append(time.monotonic() - begin)
        assert sorted(asked(pair[1])) == sorted(f"user {number}" for number in range(20))
    slow = [one for one in times if one > 1]
    assert len(slow) == 1, "one request waits, and the others leave the server out"
    assert slow[0] < 3


@pytest.mark.slow
def test_two_servers_that_drop_connections_are_reported_as_down(tmp_path):
    with full() as one, full() as other, running(tmp_path / "nginx", [one, other]) as front:
        answer = front.chat()
        assert (answer.status, answer.error["message"]) == (503, "No server is ready.")


@contextlib.contextmanager
def full() -> Iterator[str]:
    """The address of a listener with a full queue: Linux drops new connections to it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


# --- what nginx itself answers ---


def test_the_pair_is_healthy_while_one_server_is(front, pair):
    def health() -> set[int]:
        return {front.ask("GET", "/health").status for _ in range(6)}  # the servers are tried in turn

    assert health() == {200}
    pair[0].behave(health=503)  # as vLLM answers when its engine is dead
    assert health() == {200}
    pair[0].kill()
    assert health() == {200}
    pair[1].behave(health=500)
    assert health() == {503}
    assert front.ask("GET", "/health").error["type"] == "ServiceUnavailableError"
    pair[1].kill()
    assert health() == {503}
    pair[0].start()
    assert health() == {200}, "at once: for this, nobody is left out"


@pytest.mark.slow
def test_the_pair_is_healthy_while_one_server_hangs(front, pair):
    pair[0].freeze()
    assert {front.ask("GET", "/health").status for _ in range(2)} == {200}


@pytest.mark.slow
def test_nginx_starts_and_reports_that_both_servers_are_down(tmp_path):
    both = [Backend("vllm-0"), Backend("vllm-1")]
    with running(tmp_path / "nginx", [server.address for server in both]) as front:
        for session in ("", "", "mine", "mine"):  # the first request finds out, the second skips the server
            answer = front.chat(session)
            assert answer.status == 503
            assert answer.error["message"] == "No server is ready."
        try:
            for server in both:
                server.start()
            assert front.ask("GET", "/health").status == 200
            within(LEFT_OUT + 5, lambda: front.chat("mine").status == 200 and front.chat().status == 200)
        finally:
            for server in both:
                server.kill()


def test_a_body_of_the_limit_goes_through_and_a_byte_more_is_refused_in_json(front, pair):
    megabytes = int(re.findall(r"client_max_body_size (\d+)m;", CONFIGURATION.read_text())[0])

    def body(size: int) -> bytes:
        start, end = json.dumps(prompt(user="large")).encode()[:-1] + b', "image": "', b'"}'
        return start + b"A" * (size - len(start) - len(end)) + end

    assert front.ask("POST", CHAT, body(megabytes << 20)).status == 200
    answer = front.ask("POST", CHAT, body((megabytes << 20) + 1))
    assert answer.status == 413
    assert f"{megabytes} MB" in answer.error["message"]
    assert asked(*pair) == ["large"]


def test_models_and_errors_of_the_servers_pass_unchanged(front, pair):
    answer = front.ask("GET", "/v1/models?limit=1", Authorization="Bearer secret")
    assert answer.json["data"] == [{"id": "tiny", "object": "model", "owned_by": "Bearer secret"}]
    refused = front.chat(max_tokens=0)
    assert (refused.status, refused.error["type"]) == (400, "Refused")


def test_metrics_are_served_by_each_server_and_not_by_nginx(front):
    assert front.ask("GET", "/metrics").error["code"] == 404


def test_the_access_log_names_the_server_and_the_duration(front, pair):
    pair[0].behave(delay=0.3)
    pair[1].behave(delay=0.3)
    server = front.chat("somebody's own words").server
    (line,) = front.log(1)
    assert line["upstream"] == {backend.name: backend.address for backend in pair}[server]
    assert (line["request"], line["status"], line["upstream_status"]) == (f"POST {CHAT}", 200, "200")
    assert line["seconds"] >= 0.3
    assert float(line["header_seconds"]) >= 0.3
    assert "somebody" not in str(line)
    front.ask("GET", "/health")  # the healthcheck runs every ten seconds and is not logged
    front.ask("GET", "/v1/models")
    assert {line["request"] for line in front.log(2)} == {f"POST {CHAT}", "GET /v1/models"}


# --- load ---


@pytest.mark.slow
def test_ten_thousand_requests_two_hundred_at_once(front, pair):
    def ask(client: int) -> list[tuple[str, float]]:
        """Fifty requests on one connection, half of them with a session."""
        answers = []
        with front.connect() as connection:
            ready.wait(30)
            for number in range(50):
                session = f"session {client}" if number % 2 else ""
                begin = time.monotonic()
                answer = request(connection, "POST", CHAT, prompt(user=f"{client}/{number}"), **of(session))
                answers.append((answer.server, time.monotonic() - begin))
        return answers

    ready = threading.Barrier(200)
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = [one for part in pool.map(ask, range(200), timeout=60) for one in part]
    took = time.monotonic() - begin
    times = sorted(seconds for _, seconds in answers)
    print(f"{len(answers)} requests: {took:.1f} s; median {times[5000] * 1000:.0f} ms, 99% {times[9900] * 1000:.0f} ms")
    print(f"shares: {collections.Counter(server for server, _ in answers)}")
    assert sorted(asked(*pair)) == sorted(f"{client}/{number}" for client in range(200) for number in range(50))
    assert front.errors() == []
    assert {line["status"] for line in front.log(len(answers))} == {200}
    assert took < 60
