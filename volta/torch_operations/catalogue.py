"""List the operations of PyTorch that are compared, each with the bound of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from volta.torch_operations.operation import HALF, SINGLE, Operation, Random, Values


def operations() -> list[Operation]:
    """Return all operations. They look up torch's functions when they are called, so that tests can replace these."""
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

    why = "scores below 8 are rounded to float16, 4 roundings of their exponentials; weights and sums are rounded, too"
    for backend in backends:
        for causal in (False, True):
            name = f"attention, {backend}{', causal' if causal else ''}, float16"
            needs = "" if backend == "math" else backend
            yield Operation(name, attend(backend, causal), inputs, 8 * HALF, why, needs=needs)


def _rows() -> Iterator[Operation]:
    import torch
    from torch.nn import functional

    sums = "an addition for each number of the row, and exp of at most 2 units in the last place"
    twice = "computed in float32 and rounded to float16; the scale is rounded before"
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
    once = "computed in float32, rounded to float16"
    yield Operation("gelu, float16", lambda x: functional.gelu(x), lambda r: [r.half(64, 512)], 2 * HALF, once)
    yield Operation("silu, float16", lambda x: functional.silu(x), lambda r: [r.half(64, 512)], 2 * HALF, once)
    two = "CUDA's functions have errors of 2 units in the last place, 4 roundings; 2 more for the composed function"
    yield Operation("exp, sin, erf, rsqrt, float32",
                    lambda x: torch.stack([x.exp(), x.sin(), x.erf(), (x * x + 1).rsqrt()]),
                    lambda r: [r.normal(64, 512)], 6 * SINGLE, two)  # fmt: skip


def _orders() -> Iterator[Operation]:
    import torch

    def exact(name: str, call: Callable[..., Values], inputs: Callable[[Random], Sequence[Any]]) -> Operation:
        return Operation(name, call, inputs, 0, "exact: there is no arithmetic", "equal")

    def pair(result: Any) -> list[Any]:
        return [result[0], result[1]]

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
        return count * SINGLE, f"one rounding for each of {count:,} numbers of one sign, in any order"

    yield Operation("scatter_add, int64", lambda x, i: torch.zeros(256, 8, dtype=x.dtype, device=x.device)
                    .scatter_add(0, i, x), lambda r: (r.below(1000, 4096, 8), r.below(256, 4096, 8)),
                    0, "integer sums are exact", "equal")  # fmt: skip
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
    return 2 * bound[0], f"{bound[1]}, and as many for the combination"


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
                    "two rounded coordinates below 32, between neighbours of different signs")  # fmt: skip
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
        """Check that a seed repeats its numbers and another seed does not, and return statistics of the numbers."""

        def call(like: Any) -> Any:
            def numbers(seed: int) -> Any:
                return draw(torch.Generator(device=like.device).manual_seed(seed), like.device)

            first, again, other = numbers(7), numbers(7), numbers(8)
            checks = [torch.equal(first, again), not torch.equal(first, other)]
            about = first.double()
            if moments:
                about = torch.stack([about.mean(), about.var()])
            return torch.cat([torch.tensor(checks, device=like.device).double(), about])

        return call

    def random(name: str, draw: Callable[[Any, Any], Any], right: Sequence[float], deviation: float, what: str,
               moments: bool = True) -> Operation:  # fmt: skip
        why = f"six standard deviations of {what} of {count:,} numbers"
        return Operation(name, drawn(draw, moments), lambda r: [torch.zeros(1)], 6 * deviation / math.sqrt(count), why,
                         "each", right=lambda _: torch.tensor([1, 1, *right], dtype=torch.float64))  # fmt: skip

    # The moments' variances are 1/12 and 1/180 for uniform numbers from 0 to 1, 1 and 2 for normal numbers.
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
