"""Fill memory with NaN that a kernel must not read, or that it must write."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

FLOAT8 = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}
STRAY = 2**31 - 1
"""A page number or packed word that no kernel must read."""


def guarded(values: torch.Tensor) -> torch.Tensor:
    """Return the values, with a row of NaN before them and after them in memory."""
    whole = torch.full((len(values) + 2, *values.shape[1:]), torch.nan, dtype=values.dtype)
    whole[1:-1] = values
    return whole[1:-1]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block, fill new memory with NaN, so that a number that a kernel does not write is found."""
    fresh = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        output = fresh(*size, **options)
        return output.fill_(torch.nan) if output.is_floating_point() else output

    with unittest.mock.patch.object(torch, "empty", poisoned):
        yield


@contextlib.contextmanager
def summed() -> Iterator[list[torch.Tensor]]:
    """Inside the block, add each tensor to the list that torch sums: it is the tensor that the kernel wrote."""
    original, seen = torch.Tensor.sum, []

    def recording(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(self)
        return original(self, *args, **options)

    with unittest.mock.patch.object(torch.Tensor, "sum", recording):
        yield seen
