"""Define a case: one call of a vLLM function that launches Triton kernels.

A case has a name, its tensors (seeded; on any device) and its call, all apart: ``volta.triton_kernels.measure``
compiles it without launching, and the same case can be launched on a GPU or interpreted on the CPU. vLLM is imported
when a case is called, never here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Tensors:
    """Makes tensors: random ones from a seed, or without one of whatever the memory holds, for a compile."""

    device: str = "cpu"
    seed: int | None = None
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self.generator.manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (scale * torch.randn(shape, generator=self.generator)).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Equally distributed, ``high`` not among them."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        made = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64)
        return made.to(dtype).to(self.device)

    def exactly(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """These values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of one of vLLM's functions."""

    kernels: ClassVar[tuple[str, ...]]
    """The names of the kernels that it may launch, as the source has them."""
    label: ClassVar[str]

    @property
    def name(self) -> str:
        """``attention-2d dtype=fp16 head_size=128 …``: each field that is not as it usually is."""
        told = [(one, getattr(self, one.name)) for one in fields(self)]
        return " ".join([self.label, *(f"{one.name}={value}" for one, value in told if value != one.default)])

    @abstractmethod
    def tensors(self, made: Tensors) -> dict[str, Any]:
        """Its arguments."""

    @abstractmethod
    def call(self, **arguments: Any) -> Any:
        """Call vLLM's function with them; gives its result."""


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(number // -by)
