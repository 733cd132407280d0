"""Run a small OpenAI-compatible server on loopback that produces tokens at a set rate and fails on request.

HTTP and server-sent events are real; the model is the word ``token``. As a program, for load tests:
``python -m tests.support.openai_server --port 8000 --delay 0.02``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Server:
    """The settings of a server, and a record of its requests."""

    url: str = ""
    models: tuple[str, ...] = ("small",)
    key: str = ""
    """The bearer token that requests must have (RFC 6750); empty for none."""
    delay: float = 0.0
    """Seconds before each token."""
    usage: bool = True
    """True if answers contain the number of tokens."""
    bundle: int = 1
    """Tokens in each chunk."""
    status: int = 500
    """The HTTP status of a failure."""
    fail_every: int = 0
    """Every n-th completion gets ``status`` instead of an answer; 0 for none."""
    break_every: int = 0
    """Every n-th stream has its connection dropped half way; 0 for none."""
    stop_every: int = 0
    """Every n-th stream ends half way, without ``[DONE]``; 0 for none."""
    error_every: int = 0
    """Every n-th stream contains an error half way, as vLLM sends it; 0 for none."""
    empty: bool = False
    """True if answers contain no token."""
    die_after: int = 0
    """The number of completions after which every connection is dropped at once."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all requests for completions, in order."""
    keys: set[str] = field(default_factory=set)
    """The Authorization header of each request."""
    now: int = 0
    """The number of current completions."""
    most: int = 0
    """The largest number of simultaneous completions."""

    def measured(self, tokens: int) -> list[dict[str, Any]]:
        """Return the requests for this number of new tokens."""
        return [body for body in self.asked if body["max_tokens"] == tokens]


def application(server: Server) -> web.Application:
    """Return the server as an aiohttp application."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in server.models]})

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.test"})

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        server.asked.append(body)
        if server.die_after and len(server.asked) > server.die_after:
            return dropped(request)
        server.now += 1
        server.most = max(server.most, server.now)
        try:
            return await answered(server, request, body, len(server.asked))
        finally:
            server.now -= 1

    @web.middleware
    async def guarded(request: web.Request, handler: Any) -> web.StreamResponse:
        server.keys.add(request.headers.get("Authorization", ""))
        if server.key and request.headers.get("Authorization") != f"Bearer {server.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    made = web.Application(middlewares=[guarded])
    made.add_routes([web.get("/v1/models", models), web.get("/version", version)])
    made.add_routes([web.post("/v1/completions", completions)])
    return made


async def answered(server: Server, request: web.Request, body: dict[str, Any], number: int) -> web.StreamResponse:
    """Answer a request for a completion, or fail as set."""

    def turn(every: int) -> bool:
        return bool(every) and number % every == 0

    if body["model"] not in server.models:
        return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
    if turn(server.fail_every):
        return web.json_response({"error": {"message": "told to fail"}}, status=server.status)
    wanted = 0 if server.empty else body["max_tokens"]
    usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": wanted} if server.usage else None
    if not body.get("stream"):
        await asyncio.sleep(server.delay * wanted)
        choices = [{"text": " token" * wanted, "index": 0, "finish_reason": "length"}]
        return web.json_response({"choices": choices, "usage": usage})
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    for first in range(0, wanted, server.bundle):
        count = min(server.bundle, wanted - first)
        await asyncio.sleep(server.delay * count)
        half = first >= wanted // 2
        if half and turn(server.break_every):
            return dropped(request)
        if half and turn(server.stop_every):
            return stream
        if half and turn(server.error_every):
            await event(stream, {"error": {"message": "told to break off"}})
            break
        await event(stream, {"choices": [{"text": " token" * count, "index": 0}], "usage": None})
    if usage and body.get("stream_options", {}).get("include_usage"):
        await event(stream, {"choices": [], "usage": usage})
    await stream.write(b"data: [DONE]\n\n")
    return stream


async def event(stream: web.StreamResponse, data: dict[str, Any]) -> None:
    """Send one event (HTML standard, section 9.2)."""
    await stream.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def dropped(request: web.Request) -> web.StreamResponse:
    """Drop the connection."""
    if request.transport:
        request.transport.abort()
    return web.Response()


@contextlib.contextmanager
def serving(**behaviour: Any) -> Iterator[Server]:
    """Run a server on a free port of the loopback interface, in a thread that ends with the block."""
    server, loop, runners = Server(**behaviour), asyncio.new_event_loop(), []
    ready = threading.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(started(server, 0))
        runners.append(runner)
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def started(server: Server, port: int) -> web.AppRunner:
    """Start to listen."""
    runner = web.AppRunner(application(server), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each token")
    parser.add_argument("--seconds", type=float, default=600, help="how long to serve")
    parser.add_argument("--stop-every", type=int, default=0)
    parser.add_argument("--fail-every", type=int, default=0)
    words = parser.parse_args()
    server = Server(delay=words.delay, stop_every=words.stop_every, fail_every=words.fail_every)
    runner = await started(server, words.port)
    print(server.url, flush=True)
    await asyncio.sleep(words.seconds)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
