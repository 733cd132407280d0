"""Limits of time, speed and size for the servers of the shared cache, which nobody has to trust."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import requests
from requests.adapters import BaseAdapter

from voltforge.errors import VoltforgeError
from voltforge.sources.index import Indexes, Patience
from voltforge.system import files

ANSWER = 30.0
"""The time limit of an answer in seconds: its head, or all of a small file.

The timeouts of requests restart with each byte, so a server that sends a byte now and then would never time out.
"""
WINDOW = 30.0
"""The period over which the speed of a download is measured, in seconds."""
SLOWEST = 50_000
"""The lowest accepted download speed in bytes per second. At this speed a wheel of 200 MB takes over an hour."""
REDIRECTS = 5
"""The most redirects of an answer. 30 slow ones, the limit of requests, would take minutes."""
LARGEST_WHEEL = 10_000_000_000
"""The largest wheel that is downloaded, in bytes. The largest known wheel has under 5 GB."""
Result = TypeVar("Result")


class CacheError(VoltforgeError):
    """The shared cache has no usable address, refused a wheel, or sent an unusable answer."""


def with_timeout(seconds: float, work: Callable[[], Result]) -> Result:
    """Return the result of ``work``, run in a thread that is abandoned after ``seconds``.

    Raises:
        requests.Timeout: it takes longer.
    """
    done: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise requests.Timeout from error


@dataclass
class DownloadSpeed:
    """The speed and size limits of one download."""

    total: int = 0
    count: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        """Count received bytes.

        Raises:
            CacheError: the download is too slow, or larger than any wheel.
        """
        self.total += count
        self.count += count
        passed = time.monotonic() - self.start
        if self.total > LARGEST_WHEEL:
            raise CacheError(f"the shared cache sends more than {files.size(LARGEST_WHEEL)} for one wheel")
        if passed >= WINDOW:
            if self.count < SLOWEST * passed:
                raise CacheError(f"the shared cache is too slow: {files.size(self.count / passed)} per second")
            self.count, self.start = 0, time.monotonic()


class LimitedAdapter(BaseAdapter):
    """An adapter that limits the time of the requests sent by another adapter."""

    def __init__(self, adapter: BaseAdapter, pace: DownloadSpeed) -> None:
        super().__init__()
        self.adapter = adapter
        self.pace = pace

    def send(self, request: requests.PreparedRequest, *args: Any, **more: Any) -> requests.Response:
        """Send a request; its head must arrive in time, and its body is measured.

        Raises:
            requests.Timeout: the head takes longer than :data:`ANSWER`.
        """
        response = with_timeout(ANSWER, lambda: self.adapter.send(request, *args, **more))
        raw: Any = response.raw
        raw.read1 = partial(self._measured_read, raw.read1)
        return response

    def _measured_read(self, read1: Callable[..., bytes], *args: Any, **more: Any) -> bytes:
        block = b""
        try:
            block = read1(*args, **more)
            return block
        finally:
            self.pace.add(len(block))

    def close(self) -> None:
        """Close the other adapter."""
        self.adapter.close()


@dataclass(frozen=True)
class LimitedIndexes(Indexes):
    """The same certificates and proxies, with time limits for an untrusted server."""

    def session(self, patience: Patience | None = None) -> requests.Session:
        """Return a session whose requests together have one limit of size and speed."""
        session = super().session(patience)
        session.max_redirects = REDIRECTS
        pace = DownloadSpeed()
        for scheme, adapter in list(session.adapters.items()):
            session.mount(scheme, LimitedAdapter(adapter, pace))
        return session
