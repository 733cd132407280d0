"""Run a small server with OpenAI's interface in a process that can be killed, frozen and restarted.

It replaces vLLM behind nginx. Its answers are numbered words, and there is no model. The sockets, HTTP/1.1, the single
chunks and a process that dies are real.
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
    """Return a port on which no process listens and that the kernel does not assign to outgoing connections.

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
    """The server's process; its answers contain its name (``system_fingerprint``)."""

    name: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process and wait until it accepts requests."""
        command = [sys.executable, "-m", "tests.support.backends", str(self.port), self.name]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n", f"{self.name} did not start on port {self.port}"

    def kill(self) -> None:
        """Kill the process, as the kernel does when memory is exhausted."""
        if self.process:
            self.process.kill()
            self.process.wait(10)
            for stream in (self.process.stdin, self.process.stdout):
                assert stream
                stream.close()
            self.process = None

    def freeze(self) -> None:
        """Stop the process: the kernel still accepts connections, and they get no answer."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request directly, not through nginx, and return the answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            return json.loads(connection.getresponse().read())

    def behave(self, **manner: float) -> None:
        """Set the ``delay`` before an answer and the ``pace`` between its words, in seconds, and the ``health`` status.

        ``chunked=0``: a stream ends with its connection, as with servers that do not support chunks.
        """
        self.ask("POST", "/behave", manner)

    def seen(self) -> dict[str, Any]:
        """Return the ``user`` of each request in order (``asked``) and how many clients left early (``gone``)."""
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
    disable_nagle_algorithm = True  # each chunk is a packet, as with uvicorn
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
            "sent": time.monotonic(),  # all processes of a machine share this clock
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
        """Send server-sent events, each in its own chunk (RFC 9112, section 7.1), or without chunks."""
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
        pass  # the tests close connections on purpose


def main(port: int, name: str) -> None:
    Handler.state = State(name)
    with Listener(("127.0.0.1", port), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()  # until the test closes the pipe or exits


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
