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

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic

NO_GPU = 5
"""The exit status if torch has no usable GPU."""
HALF, SINGLE = 2.0**-11, 2.0**-24
"""Half a unit in the last place of float16 and float32: the largest relative error of one rounding."""
WARM_UP, TIMED = 3, 15
"""The number of runs before the timing, and of timed runs."""


Values = Any
"""A tensor, or a sequence of them."""


@dataclass(frozen=True)
class Operation:
    """A call of torch, its inputs, and the bound of its error."""

    name: str
    call: Callable[..., Values]
    """The function; its inputs have the tested type on the tested device, or float64 on the CPU."""
    inputs: Callable[[Random], Sequence[Any]]
    """Makes the inputs on the CPU, in the tested type."""
    bound: float
    why: str
    """The reason for the bound."""
    measure: str = "row"
    """``row``: the largest relative error of a row (the last axis) in the 2-norm. ``each``: the largest absolute error
    of a number. ``equal``: 0 if all numbers are equal, else infinite."""
    right: Callable[..., Values] | None = None
    """Computes the exact result from the inputs in float64; by default this is ``call`` itself."""
    needs: str = ""
    """A required backend of attention that not every device has: ``mem-efficient``, ``flash``."""


@dataclass(frozen=True)
class OperationResult:
    """The result of one operation."""

    operation: str
    error: float | None = None
    """The error, by the operation's measure; ``None`` if there is no result."""
    bound: float | None = None
    microseconds: float | None = None
    """The median time, by CUDA events; by the clock on a CPU."""
    verdict: str = "failed"
    """``right``, ``wrong``, ``failed`` (it could not run), or ``left out`` (this device does not support it)."""
    reason: str = ""
    """The reason for the failure or omission; otherwise the reason for the bound."""
    bits: str = ""
    """A digest of the result's bytes."""
    repeats: bool = False
    """True if a second call had the same bits."""

    @property
    def fine(self) -> bool:
        """True if the row is right or left out."""
        return self.verdict in {"right", "left out"}


class Random:
    """Makes inputs from a seed, on the CPU, so that they are the same on every machine."""

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
        """Return numbers that all differ, so that their order is unique."""
        made = self.torch.randperm(math.prod(shape), generator=self.generator)
        return (made.reshape(shape) - math.prod(shape) // 2).float() / 8


def run(operation: Operation, device: str) -> OperationResult:
    """Run one operation on a device and compare the result with the CPU."""
    if why := _missing(operation, device):
        return OperationResult(operation.name, verdict="left out", reason=why)
    try:
        inputs = operation.inputs(Random(operation.name))
        on_device = [tensor.to(device) for tensor in inputs]
        results = [_on_cpu(tensor) for tensor in _listed(operation.call(*on_device))]
        repeated = [_on_cpu(tensor) for tensor in _listed(operation.call(*on_device))]
        took = _microseconds(lambda: operation.call(*on_device), device)
        exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        right = _listed((operation.right or operation.call)(*exact))
        largest = max(error(result, true, operation.measure) for result, true in zip(results, right, strict=True))
    except Exception as problem:  # any error is this row's; the other rows still run
        words = str(problem).strip().splitlines() or [type(problem).__name__]
        return OperationResult(operation.name, bound=operation.bound, reason=words[0][:300])
    verdict = "right" if largest <= operation.bound else "wrong"
    bits = [hashlib.sha256(b"".join(map(_bytes, tensors))).hexdigest()[:16] for tensors in (results, repeated)]
    return OperationResult(
        operation.name, largest, operation.bound, took, verdict, operation.why, bits[0], bits[0] == bits[1]
    )


def error(made: Any, right: Any, measure: str) -> float:
    """Return the error of a result; infinite if its shape differs or a number is NaN."""
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
    """Return the reason why a device lacks the backend; empty if it has it."""
    import torch

    if operation.needs == "mem-efficient" and device == "cpu":
        return "mem-efficient attention is for GPUs"
    if operation.needs == "flash" and device != "cpu" and torch.cuda.get_device_capability() < (8, 0):
        return "flash attention needs compute capability 8.0"
    return ""


def _listed(values: Values) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _on_cpu(tensor: Any) -> Any:
    return tensor.detach().cpu()


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _microseconds(call: Callable[[], Any], device: str) -> float:
    """Return the median time of several calls, after a warm-up."""
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
    """Disable shorter internal types such as TF32, and make torch deterministic where it can be."""
    import torch

    warnings.filterwarnings("ignore", "Please use the new API settings")  # PyTorch 2.8 does not have it
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
