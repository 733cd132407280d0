"""Run one operation of PyTorch and compare its answer with float64."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with this

NO_GPU = 5
"""The exit status where torch has no GPU to use."""
HALF, SINGLE = 2.0**-11, 2.0**-24
"""Half a unit in the last place of float16 and of float32: the most that one rounding changes, relatively."""
WARM_UP, TIMED = 3, 15
"""How often an operation runs before it is timed, and how often it is timed."""


Values = Any
"""A tensor, or a sequence of them."""


@dataclass(frozen=True)
class Operation:
    """A call of torch, what it is given, and how far its answer may be off."""

    name: str
    call: Callable[..., Values]
    """Given the inputs, in the type that is tested or in float64, on the device that is tested or on the CPU."""
    inputs: Callable[[Random], Sequence[Any]]
    """Made on the CPU, in the type that is tested."""
    bound: float
    why: str
    """Where the bound comes from."""
    measure: str = "row"
    """``row``: the largest relative error of a row (the last axis) in the 2-norm. ``each``: the largest absolute one of
    a number. ``equal``: 0 if all numbers are equal, else infinite."""
    right: Callable[..., Values] | None = None
    """What it must give, from the inputs in float64, where that is not the call's own answer to them."""
    needs: str = ""
    """A backend of attention that not every device has: ``mem-efficient``, ``flash``."""


@dataclass(frozen=True)
class Row:
    """What came of one operation."""

    operation: str
    error: float | None = None
    """As the operation measures it; ``None`` where there is no answer."""
    bound: float | None = None
    microseconds: float | None = None
    """The median, by CUDA's events; by the clock on a CPU."""
    verdict: str = "failed"
    """``right``, ``wrong``, ``failed`` (it could not run), or ``left out`` (this device has nothing of the kind)."""
    said: str = ""
    """Why it failed or was left out; else where the bound comes from."""
    bits: str = ""
    """A digest of the answer's bytes."""
    repeats: bool = False
    """Whether a second call gave the same bits."""

    @property
    def fine(self) -> bool:
        """Whether this row stands against nothing."""
        return self.verdict in {"right", "left out"}


class Random:
    """Inputs from a seed: the same on every machine, for they are made on the CPU."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch = torch
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
        made = self.torch.randn(shape, generator=self.generator, dtype=self.torch.float64) * scale
        return made.to(getattr(self.torch, dtype))

    def half(self, *shape: int, scale: float = 1.0) -> Any:
        return self.normal(*shape, dtype="float16", scale=scale)

    def uniform(self, low: float, high: float, *shape: int) -> Any:
        made = self.torch.rand(shape, generator=self.generator, dtype=self.torch.float64)
        return (made * (high - low) + low).float()

    def below(self, high: int, *shape: int) -> Any:
        return self.torch.randint(high, shape, generator=self.generator)

    def distinct(self, *shape: int) -> Any:
        """Numbers no two of which are equal, so that their order is one."""
        made = self.torch.randperm(math.prod(shape), generator=self.generator)
        return (made.reshape(shape) - math.prod(shape) // 2).float() / 8


def run(operation: Operation, device: str) -> Row:
    """One operation on a device, held against the CPU."""
    if why := _missing(operation, device):
        return Row(operation.name, verdict="left out", said=why)
    try:
        inputs = operation.inputs(Random(operation.name))
        there = [one.to(device) for one in inputs]
        made = [_kept(one) for one in _listed(operation.call(*there))]
        again = [_kept(one) for one in _listed(operation.call(*there))]
        took = _microseconds(lambda: operation.call(*there), device)
        exact = [one.double() if one.is_floating_point() else one for one in inputs]
        right = _listed((operation.right or operation.call)(*exact))
        found = max(error(one, other, operation.measure) for one, other in zip(made, right, strict=True))
    except Exception as problem:  # whatever it is: it is this row's, and the others still run
        words = str(problem).strip().splitlines() or [type(problem).__name__]
        return Row(operation.name, bound=operation.bound, said=words[0][:300])
    verdict = "right" if found <= operation.bound else "wrong"
    bits = [hashlib.sha256(b"".join(map(_bytes, some))).hexdigest()[:16] for some in (made, again)]
    return Row(operation.name, found, operation.bound, took, verdict, operation.why, bits[0], bits[0] == bits[1])


def error(made: Any, right: Any, measure: str) -> float:
    """How far an answer is off; infinite where its shape is another or a number is missing."""
    import torch

    made, right = made.detach().cpu(), right.detach().cpu()
    if made.shape != right.shape:
        return math.inf
    if measure == "equal":
        return 0.0 if torch.equal(made.double(), right.double()) else math.inf
    made, right = made.double(), right.double()
    if measure == "row":
        norm = torch.linalg.vector_norm(right, dim=-1)
        off = torch.linalg.vector_norm(made - right, dim=-1) / torch.where(norm == 0, 1, norm)
    else:
        off = (made - right).abs()
    return math.inf if bool(off.isnan().any()) else float(off.max())


def _missing(operation: Operation, device: str) -> str:
    """Why a device has no such backend; empty where it has."""
    import torch

    if operation.needs == "mem-efficient" and device == "cpu":
        return "mem-efficient attention is for GPUs"
    if operation.needs == "flash" and device != "cpu" and torch.cuda.get_device_capability() < (8, 0):
        return "flash attention needs compute capability 8.0"
    return ""


def _listed(values: Values) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _kept(tensor: Any) -> Any:
    return tensor.detach().cpu()


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _microseconds(call: Callable[[], Any], device: str) -> float:
    """The median of some calls, after some that are not counted."""
    import torch

    if device == "cpu":
        took = []
        for _ in range(3):
            begun = time.perf_counter()
            call()
            took.append((time.perf_counter() - begun) * 1e6)
        return statistics.median(took)
    for _ in range(WARM_UP):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)


def strict() -> None:
    """No shorter types within, and the same bits each time where torch can."""
    import torch

    warnings.filterwarnings("ignore", "Please use the new API settings")  # which PyTorch 2.8 does not have
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
