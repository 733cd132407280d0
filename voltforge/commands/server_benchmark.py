"""Measure a running server: throughput of many requests at once, latency of one, and decisions of one token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from voltforge.errors import VoltforgeError
from voltforge.system import console, files

EARLIER = "earlier project, CMP 100-210"
"""The source of the figures for comparison. Its model, prompts and number of cards are unknown."""
KEYS = ("VOLTFORGE_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the server's key; the first that is set is used."""
CONNECT, SILENCE = 10.0, 300.0
"""Seconds to wait for a connection, and for the next byte of an answer."""
GIVE_UP = 20
"""Failures in a row that end a measurement; more if more requests are made at once."""
BUSY = 0.8
"""The share of a core from which the client itself may limit the result."""
WARM_TOKENS = 8
"""New tokens of a warm-up request: a server compiles kernels at their first use."""
TICK = 0.5
"""Seconds between two updates of the progress row."""
WORDS = (
    "the a of and to in is that for it was on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
)
"""The words of the prompts: common words, one token each in most vocabularies."""


class ServeError(VoltforgeError):
    """A server cannot be measured, or failed while it was."""


@dataclass(frozen=True)
class Load:
    """The requests of one measurement."""

    name: str
    """Its name in the table."""
    concurrency: int
    """The largest number of requests at once."""
    requests: int
    """Requests in all."""
    earlier: float
    """The earlier project's figure, in ``unit``."""
    unit: str = "tok/s"
    """``tok/s``, or ``decisions/s``: requests that ended well."""
    new_tokens: int = 128
    """Tokens of each answer."""
    words: int = 140
    """Words of each prompt, about 150 tokens; the server's own count is printed with the result."""
    streamed: bool = True
    """True for a streamed answer."""

    def quick(self) -> Load:
        """Return the same load with one round of requests: a test that the server works, not a measurement."""
        return replace(self, requests=max(self.concurrency, 2))


LOADS = (
    Load("text, 40 at once", concurrency=40, requests=400, earlier=580),
    Load("text, 60 at once", concurrency=60, requests=480, earlier=1170),
    Load("one alone", concurrency=1, requests=10, earlier=105),
    Load("decisions, 200 at once", concurrency=200, requests=2000, earlier=200, unit="decisions/s", new_tokens=1,
         streamed=False),
)  # fmt: skip
"""The loads for which the earlier project published figures."""


@dataclass(frozen=True)
class BenchmarkedServer:
    """An OpenAI-compatible server and a model on it."""

    url: str
    """Its address, without ``/v1``."""
    model: str
    key: str = field(default="", repr=False)
    """The bearer token (RFC 6750); empty for none. It is never written to a file."""
    version: str = ""
    """The server's version from ``/version``, as vLLM has it; empty if unknown."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request. Times are seconds since it was sent."""

    whole: float
    """Until the answer was complete, or had failed."""
    first: float | None = None
    """Until the first token; ``None`` where the answer was not streamed, or none came."""
    tokens: int = 0
    counted: str = "usage"
    """The source of the token count: ``usage`` of the server, or ``chunks`` counted here."""
    prompt: int | None = None
    """Tokens of the prompt, where the server says."""
    error: str = ""
    """The kind of failure; empty where there was none."""
    detail: str = ""
    """The message of the failure."""


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the measured times, in seconds (nearest rank)."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Percentiles | None:
        """Return the percentiles of ``times``, in any order; ``None`` if there are none."""
        ranked = sorted(times)
        return cls(*(ranked[math.ceil(len(ranked) * of / 100) - 1] for of in (50, 90, 99))) if ranked else None

    def __str__(self) -> str:
        return "/".join(f"{1000 * value:.0f}" for value in (self.p50, self.p90, self.p99))


@dataclass(frozen=True)
class Measurement:
    """The outcomes of one load. Tokens and times are those of successful requests."""

    load: Load
    outcomes: tuple[Outcome, ...]
    seconds: float
    """From the first request to the last answer."""
    busy: float
    """The share of one core that the client used."""

    @property
    def good(self) -> list[Outcome]:
        """The successful requests."""
        return [outcome for outcome in self.outcomes if not outcome.error]

    @property
    def errors(self) -> dict[str, int]:
        """The number of failures by kind, the most frequent first."""
        return dict(Counter(outcome.error for outcome in self.outcomes if outcome.error).most_common())

    @property
    def unasked(self) -> int:
        """The number of requests that were not made after too many failures."""
        return self.load.requests - len(self.outcomes)

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return sum(outcome.tokens for outcome in self.good)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests together, over the whole time."""
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Successful requests per second, over the whole time."""
        return len(self.good) / self.seconds

    @property
    def figure(self) -> float:
        """The figure that is compared with the earlier project's."""
        return self.tokens_per_second if self.load.unit == "tok/s" else self.requests_per_second

    @property
    def first(self) -> Percentiles | None:
        """Time to the first token."""
        return Percentiles.of([outcome.first for outcome in self.good if outcome.first is not None])

    @property
    def whole(self) -> Percentiles | None:
        """Time to the whole answer."""
        return Percentiles.of([outcome.whole for outcome in self.good])

    @property
    def counted(self) -> str:
        """``usage`` if the server counted the tokens of every answer, else ``chunks``."""
        return "chunks" if any(outcome.counted == "chunks" for outcome in self.good) else "usage"

    @property
    def prompt(self) -> float | None:
        """Tokens of a prompt, on average, where the server says."""
        known = [outcome.prompt for outcome in self.good if outcome.prompt is not None]
        return sum(known) / len(known) if known else None

    def facts(self) -> dict[str, Any]:
        """Return all values for JSON; times are seconds."""
        return {
            **asdict(self.load), "asked": len(self.outcomes), "ended_well": len(self.good), "errors": self.errors,
            "seconds": self.seconds, "tokens": self.tokens, "tokens_counted_by": self.counted,
            "tokens_of_a_prompt": self.prompt, "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second, "client_share_of_a_core": self.busy,
            "first_token": asdict(self.first) if self.first else None,
            "whole": asdict(self.whole) if self.whole else None,
        }  # fmt: skip


# --- the benchmark ---


def check(url: str, out: Path, *, model: str = "", loads: Sequence[Load] = LOADS) -> list[Measurement]:
    """Measure the server at ``url``; print a table, and write ``serve.json`` and ``serve.png`` to the folder ``out``.

    Results from before a failure or Ctrl-C are printed and written too.

    Raises:
        ServeError: it cannot be measured, or requests failed.
    """
    server = find(url, model, key_of(os.environ))
    console.step(f"measure {server.url}: {server.model}" + (f", {server.version}" if server.version else ""))
    measurements: list[Measurement] = []
    try:
        for load in loads:
            measurements.append(measure(server, load))
    finally:
        if measurements:
            report(measurements)
            keep(server, measurements, out)
    if failed := [measurement for measurement in measurements if measurement.errors]:
        failures = "; ".join(f"{measurement.load.name}: {_failures(measurement)}" for measurement in failed)
        raise ServeError(f"requests to {server.url} failed: {failures}", hint="the server's own log says why")
    return measurements


def key_of(variables: Mapping[str, str]) -> str:
    """The server's key from the environment; empty if none is set."""
    return next((variables[name] for name in KEYS if variables.get(name)), "")


# --- asking the server ---


def find(url: str, model: str = "", key: str = "") -> BenchmarkedServer:
    """The server at ``url`` (``/v1`` and ``http://`` may be left out), with ``model`` or the first one that it has.

    Raises:
        ServeError: it cannot be reached, wants another key, is no such server, or has no such model.
    """
    address = _address(url)
    status, text = asyncio.run(_get(f"{address}/v1/models", key))
    if problem := _refusal(address, status, key):
        raise problem
    try:
        names = [str(entry["id"]) for entry in json.loads(text)["data"]]
    except (ValueError, TypeError, KeyError):
        names = []
    if status != 200 or not names:
        what = f"{address} is not an OpenAI-compatible server: /v1/models gave status {status} and no list of models"
        raise ServeError(what, hint="url=http://HOST:PORT of vLLM, or of the nginx before it")
    if model and model not in names:
        raise ServeError(f"{address} has no model {model}", hint=f"its models: {', '.join(names)}")
    version = ""
    with contextlib.suppress(ServeError, ValueError, TypeError, KeyError):
        version = f"vllm {json.loads(asyncio.run(_get(f'{address}/version', key))[1])['version']}"
    return BenchmarkedServer(address, model or names[0], key, version)


def _address(url: str) -> str:
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port
        sound = False
    if not sound:
        raise ServeError(f"{url!r} is not the address of a server", hint="url=http://127.0.0.1:8000")
    return full.rstrip("/").removesuffix("/v1")


async def _get(url: str, key: str) -> tuple[int, str]:
    try:
        async with _session(key) as session, session.get(url, timeout=aiohttp.ClientTimeout(total=CONNECT)) as answer:
            return answer.status, await answer.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError, OSError, ValueError) as error:
        kind, detail = _kind(error)
        what = f"{url.rpartition('/v1/')[0] or url} cannot be reached: {detail or kind}"
        raise ServeError(
            what, hint="check that the server runs at this address; a large model takes minutes to load"
        ) from error


def _session(key: str) -> aiohttp.ClientSession:
    """Return a session without a limit of connections and without a proxy."""
    patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=patience, headers=headers)


def _refusal(address: str, status: int, key: str) -> ServeError | None:
    """Return the error for a status that concerns the server as a whole, else None."""
    if status in (401, 403):
        what = f"{address} does not accept the key" if key else f"{address} wants a key"
        return ServeError(
            f"{what} (status {status})", hint=f"{KEYS[0]}=… with the key that the server was started with"
        )
    if status in (502, 503, 504):
        return ServeError(
            f"{address} is not ready (status {status})", hint="wait until the model is loaded, then repeat"
        )
    return None


# --- one measurement ---


def measure(server: BenchmarkedServer, load: Load, *, warm: bool = True) -> Measurement:
    """Measure one load after a short warm-up round, and show the progress.

    Raises:
        ServeError: every request of the warm-up failed.
    """
    texts = prompts(load)
    with console.progress(load.name) as tell:
        if warm:
            tell("warming up")
            short = replace(
                load, requests=min(load.concurrency, load.requests), new_tokens=min(load.new_tokens, WARM_TOKENS)
            )
            _answered(server, asyncio.run(_Run(server, short, prompts(short)).go()))
        return asyncio.run(_Run(server, load, texts).go(tell))


def prompts(load: Load) -> Iterator[str]:
    """Yield random prompts, because a prompt with a known prefix is answered from the prefix cache."""
    source, words = random.Random(), WORDS.split()
    return (" ".join(source.choices(words, k=load.words)) for _ in range(load.requests))


def _answered(server: BenchmarkedServer, measured: Measurement) -> None:
    if measured.good:
        return
    failed = measured.outcomes[0]
    with contextlib.suppress(ValueError):
        if problem := _refusal(server.url, int(failed.error.removeprefix("status ")), server.key):
            raise problem
    detail = f": {failed.detail}" if failed.detail else ""
    raise ServeError(
        f"{server.url} answers no request ({measured.load.name}): {failed.error}{detail}",
        hint="the server's own log says why",
    )


class _Run:
    """One running load, with a worker for each request at once."""

    def __init__(self, server: BenchmarkedServer, load: Load, texts: Iterator[str]) -> None:
        self.server, self.load, self.texts = server, load, texts
        self.outcomes: list[Outcome] = []
        self.tokens = self.failures = self.failures_in_a_row = 0

    async def go(self, tell: Callable[[str], None] | None = None) -> Measurement:
        """Make every request, unless the server fails them all."""
        start, used = time.perf_counter(), time.process_time()
        async with _session(self.server.key) as session:
            teller = asyncio.create_task(self._tell(tell, start)) if tell else None
            try:
                await asyncio.gather(*(self._work(session) for _ in range(self.load.concurrency)))
            finally:
                if teller:
                    teller.cancel()
        seconds = time.perf_counter() - start
        return Measurement(self.load, tuple(self.outcomes), seconds, (time.process_time() - used) / seconds)

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while self.failures_in_a_row < max(GIVE_UP, self.load.concurrency):
            text = next(self.texts, None)
            if text is None:
                return
            outcome = await _request(session, self.server, self.load, text)
            self.outcomes.append(outcome)
            self.tokens += outcome.tokens
            self.failures += bool(outcome.error)
            self.failures_in_a_row = self.failures_in_a_row + 1 if outcome.error else 0

    async def _tell(self, tell: Callable[[str], None], start: float) -> None:
        while True:
            await asyncio.sleep(TICK)
            rate = self.tokens / (time.perf_counter() - start)
            failed = f", {self.failures} failed" if self.failures else ""
            tell(f"{len(self.outcomes)} of {self.load.requests}, {rate:.0f} tok/s{failed}")


# --- one request ---


async def _request(session: aiohttp.ClientSession, server: BenchmarkedServer, load: Load, text: str) -> Outcome:
    """Ask for one completion (OpenAI's ``POST /v1/completions``); never raises for what the server does."""
    body: dict[str, Any] = {"model": server.model, "prompt": text, "max_tokens": load.new_tokens, "temperature": 0}
    body["ignore_eos"] = True  # an option of vLLM: all answers have the same length
    if load.streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    reader = _Reader(time.perf_counter())
    try:
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return reader.failed(f"status {answer.status}", _message(await answer.text(errors="replace")))
            if not load.streamed:
                return reader.plain(await answer.json(content_type=None))
            async for line in answer.content:
                reader.line(line)
            return reader.ended()
    except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError, OSError, ValueError, _StreamError) as error:
        return reader.failed(*_kind(error))


class _StreamError(Exception):
    """An error that the server sends in a stream."""


class _Reader:
    """Takes in one answer: a JSON body, or server-sent events whose data are JSON and, at last, ``[DONE]``."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.first: float | None = None
        self.chunks = 0
        self.usage: Mapping[str, Any] = {}
        self.done = False

    def line(self, line: bytes) -> None:
        """Take in one line of the stream. Raises _StreamError or ValueError for one that should not be there."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return
        event = _object(json.loads(data))
        if "error" in event:
            raise _StreamError(_message(data.decode(errors="replace")))
        self.usage = event.get("usage") or self.usage
        if event.get("choices"):
            self.chunks += 1
            if self.first is None:
                self.first = self._now()

    def ended(self) -> Outcome:
        """Return the outcome of a stream that the server closed."""
        if not self.done:
            return self.failed("ended early", f"the stream ended after {self.chunks} chunks, without [DONE]")
        return self._good()

    def plain(self, body: Any) -> Outcome:
        """Return the outcome of an answer that was not streamed."""
        answer = _object(body)
        self.usage, self.chunks = answer.get("usage") or {}, len(answer.get("choices") or ())
        return self._good()

    def failed(self, kind: str, detail: str = "") -> Outcome:
        """Return the outcome of a failed request."""
        return Outcome(self._now(), self.first, error=kind, detail=detail)

    def _good(self) -> Outcome:
        tokens, prompt = self.usage.get("completion_tokens"), self.usage.get("prompt_tokens")
        counted = "chunks" if tokens is None else "usage"
        tokens = self.chunks if tokens is None else int(tokens)
        if not tokens:
            return self.failed("empty", "the answer has no token")
        return Outcome(self._now(), self.first, tokens, counted, None if prompt is None else int(prompt))

    def _now(self) -> float:
        return time.perf_counter() - self.start


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.80} where an object should be")
    return value


def _kind(error: Exception) -> tuple[str, str]:
    """Return the kind of failure of an exception, and its message."""
    if isinstance(error, _StreamError):
        return "error in the stream", str(error)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # one and the same from Python 3.11 on
        return "timeout", f"silent for {CONNECT:.0f} s at the start, or {SILENCE:.0f} s later"
    if isinstance(error, aiohttp.ClientConnectorError):
        number, words = error.os_error.errno or 0, error.os_error.strerror
        return "no connection", os.strerror(number) if number > 0 else words or str(error.os_error)
    if isinstance(error, ValueError):
        return "not understood", str(error)
    return "ended early", "the connection broke"


def _message(text: str) -> str:
    """Return the message in the body of an error: OpenAI's field, or the first line."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        body = json.loads(text)
        return str((body.get("error") or body).get("message") or body)[:300]
    return text.strip().partition("\n")[0][:300]


# --- output ---


def report(measurements: Sequence[Measurement]) -> None:
    """Print the results as a table, with notes on how they were measured."""
    columns = ("", "measured", EARLIER, "requests/s", "first token, ms: p50/p90/p99", "whole answer, ms", "failed")
    console.table("", columns, [_row(measurement) for measurement in measurements])
    for measurement in measurements:
        prompt = "an unknown number of" if measurement.prompt is None else f"{measurement.prompt:.0f}"
        how = "the server" if measurement.counted == "usage" else "us, as chunks: there may be several tokens in one"
        console.note(
            f"{measurement.load.name}: {len(measurement.good)} answers in {measurement.seconds:.1f} s "
            f"to prompts of {prompt} tokens; "
            f"{measurement.tokens} new tokens, counted by {how}; our client used {measurement.busy:.0%} of a core"
        )
        if measurement.busy > BUSY:
            console.warn(
                f"{measurement.load.name}: our client was busy all the time, the server may be faster than this"
            )
        for kind in measurement.errors:
            detail = next(each.detail for each in measurement.outcomes if each.error == kind)
            console.warn(f"{measurement.load.name}: {kind}" + (f": {detail}" if detail else ""))


def _row(measurement: Measurement) -> tuple[str, ...]:
    unit = measurement.load.unit
    return (
        measurement.load.name, f"{measurement.figure:.0f} {unit}", f"{measurement.load.earlier:.0f} {unit}",
        f"{measurement.requests_per_second:.1f}", str(measurement.first or "-"), str(measurement.whole or "-"),
        _failures(measurement) if measurement.errors else "0",
    )  # fmt: skip


def _failures(measurement: Measurement) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in measurement.errors.items())
    return f"{kinds}, of {len(measurement.outcomes)}" + (
        f"; {measurement.unasked} not asked any more" if measurement.unasked else ""
    )


def keep(server: BenchmarkedServer, measurements: Sequence[Measurement], out: Path) -> None:
    """Write ``serve.json`` and ``serve.png`` into the folder ``out``."""
    facts = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "url": server.url, "model": server.model,
        "server": server.version, "client": "voltforge.commands.server_benchmark", "earlier": EARLIER,
        "measurements": [measurement.facts() for measurement in measurements],
    }  # fmt: skip
    files.write_json(out / "serve.json", facts)
    plot(server, measurements, out / "serve.png")
    console.note(f"kept {out / 'serve.json'} and serve.png")


def plot(server: BenchmarkedServer, measurements: Sequence[Measurement], path: Path) -> None:
    """Draw throughput beside the earlier project's, and the latency percentiles, as a PNG at ``path``."""
    from matplotlib.figure import Figure  # a second to import, and only here

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{server.model}   {server.version}".strip())
    places = range(len(measurements))
    for shift, label, values in (
        (-0.2, "measured", [measurement.figure for measurement in measurements]),
        (0.2, EARLIER, [measurement.load.earlier for measurement in measurements]),
    ):
        bars = left.bar([place + shift for place in places], values, 0.4, label=label)
        left.bar_label(bars, fmt="%.0f")
    left.set_xticks(
        places, [f"{measurement.load.name}\n{measurement.load.unit}" for measurement in measurements], fontsize=8
    )
    left.set_title("throughput")
    left.legend(fontsize=8)
    bars_of = [(kind, name) for kind in ("first", "whole") for name in ("p50", "p90", "p99")]
    for number, (kind, name) in enumerate(bars_of):
        known = [
            (place, getattr(measurement, kind))
            for place, measurement in enumerate(measurements)
            if getattr(measurement, kind)
        ]
        if known:
            bars = right.bar(
                [place + (number - 2.5) * 0.15 for place, _ in known], [1000 * getattr(of, name) for _, of in known],
                0.15, color=f"C{number // 3}", alpha=1 - number % 3 * 0.3,
                label=f"{'first token' if kind == 'first' else 'whole answer'}, {name}",
            )  # fmt: skip
            right.bar_label(bars, fmt="%.0f", fontsize=7)
            right.set_yscale("log")
    right.set_xticks(places, [measurement.load.name for measurement in measurements], fontsize=8)
    right.set_xlim(-0.5, len(measurements) - 0.5)
    right.set_title("latency percentiles, ms")
    if any(measurement.good for measurement in measurements):
        right.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
