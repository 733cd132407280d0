"""Some things at once: a bounded number of threads, whose results come as they are ready, and which end with Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

GRACE = 2.0
"""Seconds that threads have to end when the rest of their work is not wanted any more; they are left behind then."""


class _HaltedError(Exception):
    """The work is not wanted any more."""


class Halt:
    """Whether the work of some threads is still wanted, and what ends their waiting when it is not."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], Any]] = []

    def set(self) -> None:
        """End all that waits, now and from now on."""
        with self._lock:
            self._set.set()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(Exception):  # what it would wake has just ended by itself
                wake()

    def check(self) -> None:
        """Do nothing while the work is wanted.

        Raises:
            _HaltedError: it is not.
        """
        if self._set.is_set():
            raise _HaltedError

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the work is not wanted any more.

        Raises:
            _HaltedError: it is not.
        """
        self._set.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], Any]) -> Iterator[None]:
        """Around a wait that ``wake``, called from another thread, brings to its end.

        Raises:
            _HaltedError: the work is not wanted any more.
        """
        with self._lock:
            self.check()
            self._wakers.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)


def each(work: Callable[[T], R], items: Sequence[T], at_once: int, halt: Halt) -> Generator[tuple[T, R], None, None]:
    """Do ``work`` for every item in at most ``at_once`` threads; give each item with its result when it is ready.

    What a thread raises is raised here. However this ends, ``halt`` is set then, and the threads end within
    :data:`GRACE` or with the process. A single item needs no thread.
    """
    if len(items) == 1:
        yield items[0], work(items[0])
        return
    waiting, ready = deque(items), SimpleQueue[tuple[T, Callable[[], R]]]()

    def go() -> None:
        while True:
            try:
                halt.check()
                item = waiting.popleft()
            except (_HaltedError, IndexError):
                return
            try:
                ready.put((item, _giving(work(item))))
            except BaseException as error:
                ready.put((item, _raising(error)))

    # Daemons: one that waits for a server which says nothing must not hold up the end of the program.
    threads = [
        threading.Thread(target=copy_context().run, args=(go,), name=f"together {number}", daemon=True)
        for number in range(min(at_once, len(items)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in items:
            item, result = ready.get()
            yield item, result()
    finally:
        halt.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


def _giving(value: R) -> Callable[[], R]:
    return lambda: value


def _raising(error: BaseException) -> Callable[[], Any]:
    def again() -> None:
        raise error

    return again
