"""Fill with NaN what a kernel must not read, and what it must write."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

FLOAT8 = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}
STRAY = 2**31 - 1
"""A page number, a packed word, that no kernel should come across."""


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The same values with a row of NaN before them and one after them in memory."""
    whole = torch.full((len(values) + 2, *values.shape[1:]), torch.nan, dtype=values.dtype)
    whole[1:-1] = values
    return whole[1:-1]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh memory is full of NaN: what a kernel leaves out shows."""
    fresh = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        made = fresh(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with unittest.mock.patch.object(torch, "empty", poisoned):
        yield


@contextlib.contextmanager
def summed() -> Iterator[list[torch.Tensor]]:
    """Inside, each tensor whose parts are added up is added to the list: it is what the kernel has written to."""
    plain, seen = torch.Tensor.sum, []

    def noted(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(self)
        return plain(self, *args, **options)

    with unittest.mock.patch.object(torch.Tensor, "sum", noted):
        yield seen
