"""Real HTTP servers on loopback, for files and for package indexes, that fail on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """A fault in the answer to one request."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Header fields to send instead of, or beside, the true ones; an empty one is omitted."""
    body: bytes | None = None
    """The data to send instead of the file."""
    cut: int | None = None
    """The number of body bytes to send before the connection is dropped."""
    stall: bool = False
    """True to fall silent after ``cut`` bytes, with the connection open."""
    hold: threading.Event | None = None
    """An event to wait for before the body is sent."""
    whole: bool = False
    """True to answer a range request with 200 and the whole file, as a server without ranges does."""


@dataclass
class Server:
    """A server of ``files`` by path, with ranges (RFC 9110, section 14), that records its requests."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """Faults by path, one for each coming request."""
    asked: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    """Path and header fields of each request, in order."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first byte and number of bytes of each body, in order."""
    password: str = ""
    """The password that the user ``me`` must send (RFC 7617), if any."""
    closing: threading.Event = field(default_factory=threading.Event)

    def paths(self) -> list[str]:
        """The requested paths, in order."""
        return [path for path, _ in self.asked]

    def project(self, name: str, *names: str, hashes: bool = True, base: str = "/files/") -> str:
        """List the files below ``/files/`` as a project of the simple index (PEP 503) at ``/simple/``, and return its
        URL.
        """
        lines = []
        for file in names:
            mark = f"#sha256={hashlib.sha256(self.files['/files/' + file]).hexdigest()}" if hashes else ""
            lines.append(f'<a href="{base}{file}{mark}">{file}</a>')
        page = "\n".join(["<!DOCTYPE html><html><body>", *lines, "</body></html>"])
        self.files[f"/simple/{name}/"] = page.encode()
        self.types[f"/simple/{name}/"] = "text/html"
        return f"{self.url}/simple/"


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run a server on a free port of the loopback interface; it ends with all its threads when the block ends."""
    server = Server()

    class Handler(_Handler):
        state = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = False  # so that closing waits for each of them
        listener.handle_error = lambda *_: None  # type: ignore[method-assign] # clients hang up here, on purpose
        if tls:
            listener.socket = tls.wrap_socket(listener.socket, server_side=True)
        server.url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            listener.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append((path, dict(self.headers)))
        waiting = self.state.faults.get(path)
        fault = waiting.pop(0) if waiting else Fault()
        known = base64.b64encode(f"me:{self.state.password}".encode()).decode()
        if self.state.password and self.headers.get("Authorization") != f"Basic {known}":
            self._answer(401, {"WWW-Authenticate": 'Basic realm="test"'}, b"", fault)
        elif fault.status is not None and fault.status != 206:
            self._answer(fault.status, {}, fault.body or b"", fault)
        elif path not in self.state.files:
            self._answer(404, {}, b"", fault)
        else:
            self._file(path, self.state.files[path], fault)

    def _file(self, path: str, data: bytes, fault: Fault) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()[:12]}"'
        headers = {"ETag": etag, "Content-Type": self.state.types.get(path, "application/octet-stream")}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", self.headers.get("Range", ""))
        if wanted and not fault.whole and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[1] or max(0, len(data) - int(wanted[3] or 0)))
            end = min(int(wanted[2] or len(data)), len(data) - 1)
            if start >= len(data):
                self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"", fault)
                return
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._answer(206, headers, data[start : end + 1], fault, start)
        else:
            self._answer(fault.status or 200, headers, data if fault.body is None else fault.body, fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault, start: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), **fault.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body if fault.cut is None else body[: fault.cut]
        self.state.sent.append((self.path, start, len(part)))
        if fault.hold:
            fault.hold.wait(30)
        self.wfile.write(part)
        if fault.stall:
            self.wfile.flush()
            self.state.closing.wait(30)
