"""A small server with OpenAI's interface, in a process of its own, that can be killed, frozen and started again.

It stands where vLLM stands behind nginx. It is not vLLM: there is no GPU here, and its answers are counted words. What
is real is what nginx sees of it: sockets, HTTP/1.1, chunks sent one by one, and a process that dies.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection is given.

    The kernel gives those their ports from 32768 up. One of them would otherwise take the port of a server that is
    down, or be connected to itself: then the port would seem to answer.
    """
    for _ in range(100):
        port = random.randrange(15000, 30000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port was found between 15000 and 30000")


# --- on the test's side ---


@dataclass
class Backend:
    """The server's process, by the name that it gives in its answers (``system_fingerprint``)."""

    name: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it takes requests."""
        command = [sys.executable, "-m", "tests.support.backends", str(self.port), self.name]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n", f"{self.name} did not start on port {self.port}"

    def kill(self) -> None:
        """End it at once, whatever it is doing, as the kernel does with a process that is out of memory."""
        if self.process:
            self.process.kill()
            self.process.wait(10)
            for stream in (self.process.stdin, self.process.stdout):
                assert stream
                stream.close()
            self.process = None

    def freeze(self) -> None:
        """Let it hang: the kernel still takes connections for it, and nobody answers them."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Its answer to a request that does not go through nginx."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            return json.loads(connection.getresponse().read())

    def behave(self, **manner: float) -> None:
        """From now on: ``delay`` before an answer, ``pace`` between its words, both in seconds; status ``health``.

        ``chunked=0``: the end of a stream is that of the connection, as servers do that know no chunks.
        """
        self.ask("POST", "/behave", manner)

    def seen(self) -> dict[str, Any]:
        """The ``user`` of each request it was ``asked``, in order, and how many clients are ``gone`` before the end."""
        return self.ask("GET", "/seen")


# --- in its own process ---


@dataclass
class State:
    name: str
    delay: float = 0
    pace: float = 0
    health: int = 200
    chunked: int = 1
    asked: list[str] = field(default_factory=list)
    gone: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each chunk is a packet, as uvicorn sends it
    state: State

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer({}, self.state.health)
        elif self.path.partition("?")[0] == "/v1/models":
            key = self.headers.get("Authorization", "")
            self.answer({"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": key}]})
        elif self.path == "/seen":
            self.answer({"asked": self.state.asked, "gone": self.state.gone})
        else:
            self.refuse(404, "no such page")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/behave":
            vars(self.state).update(request)
            self.answer({})
        elif self.path == "/v1/chat/completions":
            self.state.asked.append(request.get("user", ""))
            time.sleep(self.state.delay)
            count = request.get("max_tokens", 1)
            if count < 1:
                self.refuse(400, "max_tokens must be at least 1")
            elif request.get("stream"):
                self.stream(count)
            else:
                message = {"role": "assistant", "content": "".join(f"word{number} " for number in range(count))}
                self.answer(self.part("chat.completion", message=message, finish_reason="length"))
        else:
            self.refuse(404, "no such page")

    def part(self, kind: str, **choice: Any) -> dict[str, Any]:
        return {
            "id": "chatcmpl-1", "object": kind, "created": int(time.time()), "model": "tiny",
            "system_fingerprint": self.state.name,
            "sent": time.monotonic(),  # one clock for all processes of a machine
            "choices": [{"index": 0, **choice}],
        }  # fmt: skip

    def answer(self, what: Any, status: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        self.answer({"error": {"message": message, "type": "Refused", "param": None, "code": status}}, status)

    def stream(self, count: int) -> None:
        """Server-sent events, each in a chunk of its own (RFC 9112, section 7.1), or one after the other."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        chunked = bool(self.state.chunked) and self.request_version == "HTTP/1.1"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number in range(count):
                part = self.part("chat.completion.chunk", delta={"content": f"word{number} "}, finish_reason=None)
                self.event(json.dumps(part), chunked)
                time.sleep(self.state.pace)
            self.event("[DONE]", chunked)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.state.gone += 1
            self.close_connection = True

    def event(self, what: str, chunked: bool) -> None:
        data = f"data: {what}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)


class Listener(ThreadingHTTPServer):
    request_queue_size = 2048  # uvicorn's
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients hang up here, on purpose


def main(port: int, name: str) -> None:
    Handler.state = State(name)
    with Listener(("127.0.0.1", port), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()  # until the test that started it closes the pipe, or dies


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
