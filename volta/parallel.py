"""Work on all cores, by processes that are forked when vLLM is imported already: that alone takes ten seconds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item], jobs: int | None = None) -> Iterator[Result]:
    """The results in the order of the items; a worker is given several at a time."""
    count = jobs or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, items, chunksize=max(1, min(4, len(items) // count)))
