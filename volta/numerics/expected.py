"""Note what a case expects in memory, where its launches are only recorded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volta.numerics.mode import COMPILE


class KernelError(Exception):
    """A kernel wrote what is not its own or left out what is, or its code for sm_70 is not what was expected."""


@dataclass(frozen=True)
class Expected:
    """What must be in memory after the launches of a case, where they are only recorded."""

    made: torch.Tensor
    """Where."""
    right: torch.Tensor
    measure: str
    """As :class:`volta.gpu.rows.Result` has it."""
    summed: bool = False
    """Whether the parts along the first axis are added up before."""


EXPECTED: list[Expected] = []
"""Those of the case at hand."""


def expect(made: torch.Tensor, right: torch.Tensor, measure: str, *, summed: bool = False) -> float:
    """Note what a case expects; no error, for nothing was computed."""
    EXPECTED.append(Expected(made, right, measure, summed))
    return 0.0


def relative(made: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of a row, in the 2-norm; infinite where a number is missing."""
    if COMPILE:
        return expect(made, right, "row")
    off = (made.double() - right).norm(dim=-1) / right.norm(dim=-1)
    return torch.inf if off.isnan().any() else float(off.max())


def bits(values: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself by its bits only."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.uint8)
