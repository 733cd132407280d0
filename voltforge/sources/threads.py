"""A bounded number of daemon threads, whose results come in order of completion and which stop on Ctrl-C."""

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
"""Seconds for the threads to end after a stop; later ones are left to the end of the process."""


class _HaltedError(Exception):
    """The work was stopped."""


class Halt:
    """A stop signal for the work of some threads, and the means to end their waits."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], Any]] = []

    def set(self) -> None:
        """End all waits, now and in future."""
        with self._lock:
            self._set.set()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(Exception):  # the wait has just ended by itself
                wake()

    def check(self) -> None:
        """Return if the work goes on.

        Raises:
            _HaltedError: the work was stopped.
        """
        if self._set.is_set():
            raise _HaltedError

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until the work is stopped.

        Raises:
            _HaltedError: the work was stopped.
        """
        self._set.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], Any]) -> Iterator[None]:
        """Guard a wait that ``wake``, called from another thread, ends.

        Raises:
            _HaltedError: the work was stopped.
        """
        with self._lock:
            self.check()
            self._wakers.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)


def run_in_threads(
    work: Callable[[T], R], items: Sequence[T], at_once: int, halt: Halt
) -> Generator[tuple[T, R], None, None]:
    """Call ``work`` for every item in at most ``at_once`` threads; yield each item with its result when it is ready.

    An error in a thread is raised here. However this ends, ``halt`` is set, and the threads end within :data:`GRACE` or
    with the process. A single item needs no thread. ``concurrent.futures`` does not fit: its threads are joined when
    the interpreter exits, so that a server which never answers would hold up the end of the program.
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

    # Daemon threads: one that waits for a silent server must not hold up the end of the program.
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
