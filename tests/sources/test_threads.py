"""Some things at once: never too many, each as soon as it is ready, and all of them over when one is told to stop."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.sources.threads import Halt, _HaltedError, run_in_threads


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("together")]


@given(st.lists(st.integers(), max_size=12), st.integers(1, 5))
def test_every_item_is_returned_once_with_its_own_result(items, at_once):
    assert sorted(run_in_threads(lambda item: item * 2, items, at_once, Halt())) == sorted(
        (item, item * 2) for item in items
    )


def test_exactly_the_given_number_of_threads_work_at_once():
    at_work, most, lock, all_there = 0, 0, threading.Lock(), threading.Barrier(3)

    def work(_: int) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        all_there.wait(20)  # breaks unless three are at work
        with lock:
            at_work -= 1

    assert len(list(run_in_threads(work, range(9), 3, Halt()))) == 9
    assert most == 3


def test_a_finished_result_is_returned_while_others_are_computed():
    go_on = threading.Event()
    coming = run_in_threads(lambda item: item == "quick" or go_on.wait(20), ["slow", "quick"], 2, Halt())
    assert next(coming) == ("quick", True)
    go_on.set()
    assert list(coming) == [("slow", True)]


def test_a_single_item_needs_no_thread():
    assert list(run_in_threads(lambda _: threading.current_thread(), [1], 4, Halt())) == [
        (1, threading.current_thread())
    ]


def test_the_error_of_one_item_is_raised_and_ends_the_others():
    halt = Halt()

    def work(item: int) -> None:
        if item == 0:
            raise ZeroDivisionError
        halt.pause(1000)

    with pytest.raises(ZeroDivisionError):
        list(run_in_threads(work, range(5), 3, halt))
    assert ours() == []


def test_no_item_is_started_after_the_caller_stops():
    begun, halt = [], Halt()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            halt.pause(1000)
        return item

    with contextlib.closing(run_in_threads(work, range(9), 2, halt)) as coming:
        assert next(coming) == (0, 0)
    assert ours() == []
    assert len(begun) <= 3


def test_a_woken_wait_ends_and_a_late_one_does_not_start():
    halt, woken = Halt(), threading.Event()
    with halt.waking(woken.set):
        halt.set()
        assert woken.is_set()
    with pytest.raises(_HaltedError), halt.waking(woken.clear):
        raise AssertionError
    with pytest.raises(_HaltedError):
        halt.pause(1000)


def test_an_uninterrupted_pause_has_its_full_length():
    start = time.monotonic()
    Halt().pause(0.05)
    assert time.monotonic() - start >= 0.05
