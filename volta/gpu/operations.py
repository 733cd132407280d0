"""PyTorch's operations on this machine's GPU, each held against the CPU in float64; torch and numpy are all it needs.

`python -m volta.gpu.operations` prints one row for each operation: how far off it is, how far it may be, how long it
takes. An operation that fails is a row too, with what it said, and the others still run. The exit status is 0 if all
are right, 1 if not, 5 if there is no GPU that torch can use.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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


# The operations ---------------------------------------------------------------------------------------------------


def operations() -> list[Operation]:
    """All of them. The functions are looked up when they are called."""
    return [*_products(), *_attention(), *_rows(), *_orders(), *_sums(), *_images(), *_matrices(), *_others()]


def _products() -> Iterator[Operation]:
    import torch
    from torch.nn import functional

    half = "float32 sums, rounded to float16 once, and once more for a sum in parts"
    single = "one rounding of float32 for each of the products that are added; TF32 is ten times above it"
    yield Operation("matmul, float16", lambda a, b: a @ b, lambda r: (r.half(256, 512), r.half(512, 384)),
                    2 * HALF, half)  # fmt: skip
    yield Operation("matmul, float32", lambda a, b: a @ b, lambda r: (r.normal(256, 512), r.normal(512, 384)),
                    512 * SINGLE, single)  # fmt: skip
    yield Operation("bmm, float16", lambda a, b: torch.bmm(a, b), lambda r: (r.half(6, 96, 256), r.half(6, 256, 80)),
                    2 * HALF, half)  # fmt: skip
    yield Operation("bmm, float32", lambda a, b: torch.bmm(a, b),
                    lambda r: (r.normal(6, 96, 256), r.normal(6, 256, 80)), 256 * SINGLE, single)  # fmt: skip
    yield Operation("matrix times vector, float16", lambda a, b: a @ b, lambda r: (r.half(1, 512), r.half(512, 1024)),
                    2 * HALF, half)  # fmt: skip
    yield Operation("linear with bias, float16", lambda x, w, b: functional.linear(x, w, b),
                    lambda r: (r.half(128, 512), r.half(384, 512, scale=0.05), r.half(384)),
                    3 * HALF, f"{half}, and once for the bias")  # fmt: skip


def _attention() -> Iterator[Operation]:
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"math": SDPBackend.MATH, "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
                "flash": SDPBackend.FLASH_ATTENTION}  # fmt: skip

    def attend(backend: str, causal: bool) -> Callable[..., Values]:
        def call(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(backends["math" if q.dtype == torch.float64 else backend]):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    def inputs(r: Random) -> Sequence[Any]:
        return [r.half(2, 4, 160, 64) for _ in range(3)]

    why = "scores below 8 rounded to float16 change what is raised by 4 roundings; then weights and sums are rounded"
    for backend in backends:
        for causal in (False, True):
            name = f"attention, {backend}{', causal' if causal else ''}, float16"
            needs = "" if backend == "math" else backend
            yield Operation(name, attend(backend, causal), inputs, 8 * HALF, why, needs=needs)


def _rows() -> Iterator[Operation]:
    import torch
    from torch.nn import functional

    sums = "an addition for each number of the row, and exp of at most 2 units in the last place"
    twice = "float32 within, rounded to float16, and the scale before it"
    yield Operation("softmax, float16", lambda x: torch.softmax(x, -1), lambda r: [r.half(64, 1000)],
                    2 * HALF, twice)  # fmt: skip
    yield Operation("softmax, float32", lambda x: torch.softmax(x, -1), lambda r: [r.normal(64, 1000)],
                    1012 * SINGLE, sums)  # fmt: skip
    yield Operation("log_softmax, float32", lambda x: torch.log_softmax(x, -1), lambda r: [r.normal(64, 1000)],
                    1012 * SINGLE, sums)  # fmt: skip
    yield Operation("logsumexp, float32", lambda x: torch.logsumexp(x, -1), lambda r: [r.normal(64, 1000)],
                    1012 * SINGLE, sums)  # fmt: skip
    yield Operation("layer_norm, float16", lambda x, w, b: functional.layer_norm(x, (512,), w, b),
                    lambda r: (r.half(64, 512), r.half(512), r.half(512)), 2 * HALF, twice)  # fmt: skip
    yield Operation("batch_norm while training, float32",
                    lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
                    lambda r: (r.normal(8, 16, 20, 20), r.uniform(0.5, 2, 16), r.normal(16)),
                    3200 * SINGLE, "an addition for each of a channel's 3,200 numbers")  # fmt: skip
    yield Operation("group_norm, float32", lambda x, w, b: functional.group_norm(x, 4, w, b),
                    lambda r: (r.normal(4, 16, 20, 20), r.uniform(0.5, 2, 16), r.normal(16)),
                    1600 * SINGLE, "an addition for each of a group's 1,600 numbers")  # fmt: skip
    once = "float32 within, rounded to float16"
    yield Operation("gelu, float16", lambda x: functional.gelu(x), lambda r: [r.half(64, 512)], 2 * HALF, once)
    yield Operation("silu, float16", lambda x: functional.silu(x), lambda r: [r.half(64, 512)], 2 * HALF, once)
    two = "CUDA's functions are within 2 units in the last place, 4 roundings; half again for the double ones"
    yield Operation("exp, sin, erf, rsqrt, float32",
                    lambda x: torch.stack([x.exp(), x.sin(), x.erf(), (x * x + 1).rsqrt()]),
                    lambda r: [r.normal(64, 512)], 6 * SINGLE, two)  # fmt: skip


def _orders() -> Iterator[Operation]:
    import torch

    def exact(name: str, call: Callable[..., Values], inputs: Callable[[Random], Sequence[Any]]) -> Operation:
        return Operation(name, call, inputs, 0, "nothing is computed", "equal")

    def pair(found: Any) -> list[Any]:
        return [found[0], found[1]]

    yield exact("sort", lambda x: pair(torch.sort(x, descending=True)), lambda r: [r.distinct(16, 3000)])
    yield exact("sort, long rows", lambda x: pair(torch.sort(x, stable=True)), lambda r: [r.below(99, 1, 200_000)])
    yield exact("topk", lambda x: pair(torch.topk(x, 50)), lambda r: [r.distinct(16, 3000)])
    yield exact("argsort", lambda x: torch.argsort(x, -1), lambda r: [r.distinct(16, 3000)])
    yield exact("max and argmax", lambda x: [*pair(x.max(-1)), x.argmax()], lambda r: [r.distinct(16, 3000)])
    yield exact("index", lambda x, i, j: x[i, j], lambda r: (r.normal(50, 60), r.below(50, 999), r.below(60, 999)))
    yield exact("index_select", lambda x, i: torch.index_select(x, 0, i), lambda r: (r.half(50, 64), r.below(50, 99)))
    yield exact("gather", lambda x, i: torch.gather(x, 1, i), lambda r: (r.normal(20, 90), r.below(90, 20, 300)))
    yield exact("masked_select and nonzero", lambda x: [x[x > 0], (x > 1).nonzero()], lambda r: [r.normal(64, 500)])
    yield exact("embedding", lambda i, w: torch.nn.functional.embedding(i, w),
                lambda r: (r.below(500, 8, 32), r.half(500, 128)))  # fmt: skip
    yield exact("where", lambda x, y: torch.where(x > y, x, y), lambda r: (r.normal(64, 500), r.normal(64, 500)))
    yield exact("unique", lambda x: pair(torch.unique(x, return_counts=True)), lambda r: [r.below(700, 20_000)])
    yield exact("bincount", lambda x: torch.bincount(x, minlength=300), lambda r: [r.below(256, 20_000)])
    yield exact("copies between types, transposed",
                lambda x: [x.half(), x.bfloat16(), x.double(), (x * 100).int(), x.bool(), x.t().contiguous()],
                lambda r: [r.normal(65, 130, scale=3)])  # fmt: skip
    yield exact("cat, roll, flip, repeat", lambda x: torch.cat([x.roll(3, 1), x.flip(0), x.repeat(2, 1)]),
                lambda r: [r.half(33, 70)])  # fmt: skip


def _sums() -> Iterator[Operation]:
    import torch

    def many(count: int) -> tuple[float, str]:
        return count * SINGLE, f"one rounding for each of {count:,} numbers of one sign, in whatever order"

    yield Operation("scatter_add, int64", lambda x, i: torch.zeros(256, 8, dtype=x.dtype, device=x.device)
                    .scatter_add(0, i, x), lambda r: (r.below(1000, 4096, 8), r.below(256, 4096, 8)),
                    0, "whole numbers add up exactly", "equal")  # fmt: skip
    yield Operation("scatter_add, float32", lambda x, i: torch.zeros(256, 8, dtype=x.dtype, device=x.device)
                    .scatter_add(0, i, x), lambda r: (r.uniform(0, 1, 4096, 8), r.below(256, 4096, 8)),
                    64 * SINGLE, "fewer than 64 numbers of one sign for each place")  # fmt: skip
    yield Operation("cumsum, float32", lambda x: torch.cumsum(x, -1), lambda r: [r.uniform(0, 1, 8, 2000)],
                    *many(2000))  # fmt: skip
    yield Operation("cumprod, float32", lambda x: torch.cumprod(x, -1), lambda r: [r.uniform(0.95, 1.05, 8, 500)],
                    *many(500))  # fmt: skip
    yield Operation("sum, mean, prod, float32", lambda x: torch.stack([x.sum(-1), x.mean(-1), (x / 4 + 0.9).prod(-1)]),
                    lambda r: [r.uniform(0.2, 0.8, 16, 1000)], *_two(many(1000)))  # fmt: skip
    yield Operation("sum over rows, float16", lambda x: x.sum(0), lambda r: [r.uniform(0, 1, 500, 64).half()],
                    HALF + 500 * SINGLE, "float32 sums, rounded to float16")  # fmt: skip
    yield Operation("var, float32", lambda x: x.var(-1), lambda r: [r.normal(64, 1024)],
                    *_two(many(1024)))  # fmt: skip


def _two(bound: tuple[float, str]) -> tuple[float, str]:
    return 2 * bound[0], f"{bound[1]}, and as many again for what is added"


def _images() -> Iterator[Operation]:
    import torch
    from torch.nn import functional

    def single(count: int) -> tuple[float, str]:
        why = "one rounding of float32 for each product, eight times that for Winograd's transforms; TF32 is above it"
        return 8 * count * SINGLE, why

    half = 4 * HALF, "float32 sums rounded to float16, and the roundings of Winograd's transforms"
    yield Operation("conv1d, float32", lambda x, w, b: functional.conv1d(x, w, b, padding=1),
                    lambda r: (r.normal(4, 16, 200), r.normal(24, 16, 3), r.normal(24)), *single(48))  # fmt: skip
    yield Operation("conv2d, float32", lambda x, w, b: functional.conv2d(x, w, b, padding=1),
                    lambda r: (r.normal(2, 16, 28, 28), r.normal(32, 16, 3, 3), r.normal(32)),
                    *single(144))  # fmt: skip
    yield Operation("conv2d, float16", lambda x, w: functional.conv2d(x, w, stride=2),
                    lambda r: (r.half(2, 16, 28, 28), r.half(32, 16, 3, 3, scale=0.1)), *half)  # fmt: skip
    yield Operation("conv2d by channel, float32", lambda x, w: functional.conv2d(x, w, groups=16),
                    lambda r: (r.normal(2, 16, 28, 28), r.normal(16, 1, 3, 3)), *single(9))  # fmt: skip
    yield Operation("conv_transpose2d, float32", lambda x, w: functional.conv_transpose2d(x, w, stride=2),
                    lambda r: (r.normal(2, 16, 14, 14), r.normal(16, 8, 4, 4)), *single(64))  # fmt: skip
    yield Operation("interpolate, bilinear, float32",
                    lambda x: functional.interpolate(x, size=(45, 50), mode="bilinear", align_corners=False),
                    lambda r: [r.normal(2, 3, 32, 32)], 8 * 32 * SINGLE,
                    "two places below 32, each rounded, between neighbours of two signs")  # fmt: skip
    yield Operation("max_pool2d and avg_pool2d, float32",
                    lambda x: torch.stack([functional.max_pool2d(x, 2), functional.avg_pool2d(x, 2)]),
                    lambda r: [r.uniform(0, 1, 2, 8, 32, 32)], 4 * SINGLE, "four numbers of one sign")  # fmt: skip


def _matrices() -> Iterator[Operation]:
    import torch

    why = "backward stable: a few roundings for each row, times a condition number below 4"

    def well(r: Random) -> Any:
        return r.normal(64, 64, scale=0.03) + torch.eye(64)

    def positive(r: Random) -> Any:
        made = r.normal(64, 64, scale=0.1)
        return made @ made.T + torch.eye(64)

    def qr(a: Any) -> list[Any]:
        q, upper = torch.linalg.qr(a)
        return [q @ upper, q.mT @ q]

    yield Operation("linalg.solve, float32", lambda a, b: torch.linalg.solve(a, b),
                    lambda r: (well(r), r.normal(64, 8)), 4 * 64 * SINGLE, why)  # fmt: skip
    yield Operation("linalg.cholesky, float32", lambda a: torch.linalg.cholesky(a), lambda r: [positive(r)],
                    4 * 64 * SINGLE, why)  # fmt: skip
    yield Operation("linalg.qr, float32", qr, lambda r: [r.normal(96, 64)], 4 * 96 * SINGLE,
                    "QR is the matrix again and Q's columns are orthonormal, within a few roundings for each row",
                    right=lambda a: [a, torch.eye(64, dtype=a.dtype)])  # fmt: skip
    yield Operation("linalg.eigvalsh, float32", lambda a: torch.linalg.eigvalsh(a), lambda r: [positive(r)],
                    4 * 64 * SINGLE, why)  # fmt: skip
    yield Operation("fft.rfft and back, float32", lambda x: [torch.view_as_real(torch.fft.rfft(x)).flatten(-2),
                    torch.fft.irfft(torch.fft.rfft(x))], lambda r: [r.normal(8, 4096)],
                    4 * 24 * SINGLE, "a few roundings for each of twice 12 steps")  # fmt: skip


def _others() -> Iterator[Operation]:
    import torch
    from torch.nn import functional

    def gradients(x: Any, w: Any, v: Any) -> list[Any]:
        w, v = w.clone().requires_grad_(), v.clone().requires_grad_()
        loss = functional.cross_entropy(torch.tanh(x @ w) @ v, torch.arange(len(x), device=x.device) % 10)
        return list(torch.autograd.grad(loss, [w, v]))

    yield Operation("gradients of two layers, float32", gradients,
                    lambda r: (r.normal(64, 128), r.normal(128, 96, scale=0.1), r.normal(96, 10, scale=0.1)),
                    512 * SINGLE, "sums of 64, 96 and 128 products, four times in a chain")  # fmt: skip

    count = 1 << 20

    def drawn(draw: Callable[[Any, Any], Any], moments: bool = True) -> Callable[[Any], Any]:
        """Whether a seed gives the same numbers twice, whether another gives others; and what they are like."""

        def call(like: Any) -> Any:
            def numbers(seed: int) -> Any:
                return draw(torch.Generator(device=like.device).manual_seed(seed), like.device)

            first, again, other = numbers(7), numbers(7), numbers(8)
            said = [torch.equal(first, again), not torch.equal(first, other)]
            about = first.double()
            if moments:
                about = torch.stack([about.mean(), about.var()])
            return torch.cat([torch.tensor(said, device=like.device).double(), about])

        return call

    def random(name: str, draw: Callable[[Any, Any], Any], right: Sequence[float], deviation: float, what: str,
               moments: bool = True) -> Operation:  # fmt: skip
        why = f"six standard deviations of {what} of {count:,} numbers"
        return Operation(name, drawn(draw, moments), lambda r: [torch.zeros(1)], 6 * deviation / math.sqrt(count), why,
                         "each", right=lambda _: torch.tensor([1, 1, *right], dtype=torch.float64))  # fmt: skip

    # Of sums of the moments' own variances: 1/12 and 1/180 for numbers between 0 and 1, 1 and 2 for normal ones.
    yield random("rand, seeded", lambda g, d: torch.rand(count, generator=g, device=d), (0.5, 1 / 12),
                 math.sqrt(1 / 12), "the mean")  # fmt: skip
    yield random("randn, seeded", lambda g, d: torch.randn(count, generator=g, device=d), (0, 1), math.sqrt(2),
                 "the variance")  # fmt: skip
    odds = [0.02, 0.08, 0.1, 0.05, 0.25, 0.2, 0.3]

    def shares(generator: Any, device: Any) -> Any:
        chosen = torch.multinomial(torch.tensor(odds, device=device), count, True, generator=generator)
        return torch.bincount(chosen, minlength=len(odds)) / count

    yield random("multinomial, seeded", shares, odds, 0.5, "the share of one of two", moments=False)
    yield Operation("randperm, seeded", lambda x: torch.randperm(
                    5000, generator=torch.Generator(device=x.device).manual_seed(7), device=x.device).sort()[0],
                    lambda r: [torch.zeros(1)], 0, "each number once", "equal",
                    right=lambda _: torch.arange(5000))  # fmt: skip


# Running them -----------------------------------------------------------------------------------------------------


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


def absent() -> str:
    """Why there is no GPU to use, in a sentence; empty where there is one."""
    try:
        import torch
    except ImportError as problem:
        return f"This Python has no torch to run operations with ({problem}): install the wheel, or use its Python."
    if not torch.version.cuda:
        return f"This PyTorch, {torch.__version__}, was built without CUDA: install one that was."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        told = " ".join(str(heard[0].message).split())[:200] if heard else f"CUDA {torch.version.cuda} finds none"
        return (
            f"PyTorch {torch.__version__} finds no GPU that it can use ({told}): look whether nvidia-smi lists one, "
            f"whether its driver can do CUDA {torch.version.cuda}, and whether CUDA_VISIBLE_DEVICES hides it."
        )
    return ""


def machine(device: str) -> dict[str, Any]:
    """What it runs on."""
    import torch

    said: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "CPU"}
    said["place"] = str(Path(torch.__file__).parent)
    with contextlib.suppress(AttributeError):  # a torch without CUDA has no such function
        said["archs"] = torch._C._cuda_getArchFlags()
    if device != "cpu":
        said["device"] = torch.cuda.get_device_name()
        said["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        said["driver"] = driver()
        said["cudnn"] = torch.backends.cudnn.version()
    return said


def driver() -> str:
    """The version of NVIDIA's driver, by NVML; empty where that cannot be asked."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        fine = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    except (OSError, AttributeError):
        return ""
    return text.value.decode() if fine else ""


def line(row: Row) -> str:
    """A row as a line of a table for people."""
    off, bound = ("" if one is None else f"{one:.1e}" for one in (row.error, row.bound))
    took = "" if row.microseconds is None else f"{row.microseconds:.1f}"
    said = "" if row.verdict == "right" else row.said
    return f"{row.operation:<42} {off:>8} {bound:>8} {took:>10}  {row.verdict} {said}".rstrip()


def main(words: Sequence[str] | None = None) -> int:
    """Run all of them."""
    parser = argparse.ArgumentParser(prog="volta.gpu.operations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in the same types, on the CPU")
    parser.add_argument("--only", default="", metavar="WORDS", help="only operations that have these words in the name")
    parser.add_argument("--json", action="store_true", help="one JSON value a line: what it runs on, then each row")
    said = parser.parse_args(words)
    if said.device == "cuda" and (why := absent()):
        print(why, file=sys.stderr)
        return NO_GPU
    strict()
    about = machine(said.device)
    print(json.dumps(about) if said.json else ", ".join(f"{name} {what}" for name, what in about.items()), flush=True)
    if not said.json:
        print(f"{'operation':<42} {'error':>8} {'bound':>8} {'us':>10}  verdict")
    rows = []
    for operation in operations():
        if said.only in operation.name:
            rows.append(run(operation, said.device))
            print(json.dumps(asdict(rows[-1])) if said.json else line(rows[-1]), flush=True)
    if not rows:
        parser.error(f"no operation has {said.only} in its name")
    bad = sum(not row.fine for row in rows)
    if not said.json:
        print(f"{len(rows) - bad} of {len(rows)} are right or left out" if bad else f"all {len(rows)} are right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
