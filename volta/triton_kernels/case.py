"""Define a case: one call of a vLLM function that launches Triton kernels.

A case has a name, its tensors (seeded; on any device) and its call, each separate. So ``volta.triton_kernels.measure``
compiles a case without launching it, and the same case can be launched on a GPU or interpreted on the CPU. vLLM is
imported when a case is called, never here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Tensors:
    """Makes tensors: random with a seed, uninitialized without one, which is enough to compile."""

    device: str = "cpu"
    seed: int | None = None
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self.generator.manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Return normally distributed numbers with standard deviation ``scale``."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (scale * torch.randn(shape, generator=self.generator)).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Return uniformly distributed integers from ``low`` to below ``high``."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        values = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64)
        return values.to(dtype).to(self.device)

    def exactly(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Return a tensor of these values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of a vLLM function."""

    kernels: ClassVar[tuple[str, ...]]
    """The names in the source of the kernels that the call may launch."""
    label: ClassVar[str]

    @property
    def name(self) -> str:
        """The label and each field that differs from its default: ``attention-2d dtype=fp16 head_size=128 …``."""
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        return " ".join([self.label, *(f"{field.name}={value}" for field, value in values if value != field.default)])

    @abstractmethod
    def tensors(self, make: Tensors) -> dict[str, Any]:
        """Return the arguments of the call."""

    @abstractmethod
    def call(self, **arguments: Any) -> Any:
        """Call vLLM's function with the arguments and return its result."""


def cdiv(number: int, by: int) -> int:
    """Return the quotient, rounded up."""
    return -(number // -by)
