"""Measure the error of a result, or note the expected result where kernels are compiled and not run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volta.numerics.mode import COMPILE


class KernelError(Exception):
    """A kernel wrote outside its output, or did not write all of it."""


@dataclass(frozen=True)
class Expected:
    """The contents that memory must have after the launches of a case that is compiled and not run."""

    output: torch.Tensor
    """The tensor that the kernels write."""
    exact: torch.Tensor
    measure: str
    """See :class:`volta.gpu.rows.Result`."""
    summed: bool = False
    """True if the sum of the tensor along its first axis is compared."""


EXPECTED: list[Expected] = []
"""The expected results of the current case."""


def expect(output: torch.Tensor, exact: torch.Tensor, measure: str, *, summed: bool = False) -> float:
    """Note an expected result; return the error 0, because nothing was computed."""
    EXPECTED.append(Expected(output, exact, measure, summed))
    return 0.0


def relative(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest relative error of a row in the 2-norm; infinite if a number is NaN."""
    if COMPILE:
        return expect(output, exact, "row")
    off = (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return torch.inf if off.isnan().any() else float(off.max())


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of the numbers, in which NaN is equal to itself."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.uint8)
