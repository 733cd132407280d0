"""vLLM's own CUDA kernels as rows: launched as its host code does, and held to float64; numpy is all it needs.

A row's geometry follows the host functions of vLLM 0.12.0 that are named beside it. Each array lies between two guards
that hold NaN; those beside what is written must be there afterwards.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import NULL, Array, Image, Launch, Number, Pointer, Result, Row, fresh

GPTQ = "csrc/quantization/gptq/q_gemm.cu"
NORM = "csrc/layernorm_kernels.cu"
ROTARY = "csrc/pos_encoding_kernels.cu"
ACTIVATION = "csrc/activation_kernels.cu"
CACHE = "csrc/cache_kernels.cu"
SOFTMAX = "csrc/moe/topk_softmax_kernels.cu"
ALIGN = "csrc/moe/moe_align_sum_kernels.cu"
EXPERTS = "csrc/moe/moe_wna16.cu"

HALF = 2.0**-11
"""The largest relative error of one rounding to float16."""
SINGLE = 2.0**-24
"""The same of float32."""
Arguments = list[Pointer | Number]
GUARD = 256
"""Bytes before and behind each array; cudaMalloc aligns to as many."""
LARGEST = 65504.0
"""The largest float16."""
ROWS = (1, 2, 3, 4, 5, 8, 13, 24, 33, 50, 64)
"""Rows of a GPTQ product: one kernel for each count up to 8, then eights with a rest."""
LIMIT = {4: 50, 8: 24}
"""More rows than these vLLM gives to cuBLAS (MAX_Q_GEMM_ROWS, MAX_Q_GEMM_ROWS_8BIT), after unpacking the weights."""
SIZES = {"i32": "32", "u32": "32", "f32": "32", "i64": "64", "u64": "64", "f64": "64", "f16": "16", "bool": "8"}
"""Bits of each kind of number as a parameter of a kernel."""

_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)")


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Every row, from each source's image by the source's path; a source that is not there has no rows.

    Raises:
        ValueError: an image has not the kernel that vLLM launches, or takes other arguments.
    """
    for source, make in MAKERS.items():
        if source in images and (source != EXPERTS or ALIGN in images):
            yield from make(images)


# What a row is put together from.


@dataclass
class Memory:
    """The buffers of a row, while it is made."""

    buffers: list[Array] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def put(self, values: Array, guard: int = GUARD) -> Pointer:
        """Put an array between guards; gives its address."""
        beside = fresh(guard)
        self.buffers.append(np.concatenate([beside, _bytes(values), beside]))
        return Pointer(len(self.buffers) - 1, guard)

    def rows(self, values: Array) -> Pointer:
        """The same for rows that are compared one by one: the guards are whole rows too."""
        return self.put(values, int(np.lcm(values.shape[-1] * values.itemsize, GUARD)))

    def fresh(self, size: int) -> Pointer:
        """Room for what a kernel must write, of ``size`` bytes."""
        return self.put(fresh(size))

    def expect(self, at: Pointer, right: Array, measure: str, dtype: str = "<f2") -> None:
        """Say what the whole array at an address must be in the end; the guards must be as they were.

        For ``equal`` it is of the memory's own type; else NaN is where nobody may write.
        """
        before = self.buffers[at.buffer]
        if measure == "equal":
            kind, inner, guard = "|u1", _bytes(right), fresh(at.offset)
        else:
            kind = dtype
            # A float16 is compared with a float32, which is off by a fraction of what the bound allows.
            inner = right.astype(np.float32 if dtype == "<f2" else np.float64)
            inner = inner.reshape(-1, right.shape[-1]) if measure == "row" else inner.reshape(-1)
            guard = np.full(at.offset // np.dtype(kind).itemsize, np.nan, inner.dtype)
            guard = guard.reshape(-1, *inner.shape[1:])
        whole = np.concatenate([guard, inner, guard])
        if whole.size * np.dtype(kind).itemsize != before.nbytes:
            raise ValueError(f"{right.shape} is not what buffer {at.buffer} holds")
        self.results.append(Result(at.buffer, whole, kind, measure=measure))

    def row(self, name: str, launches: Sequence[Launch], bound: float) -> Row:
        """The finished row."""
        kernels = ", ".join(dict.fromkeys(_plain(one.symbol) for one in launches))
        return Row(name, kernels, self.buffers, list(launches), self.results, bound)


def i32(value: int) -> Number:
    """An ``int``."""
    return Number("i32", int(value))


def i64(value: int) -> Number:
    """An ``int64_t`` or ``size_t``."""
    return Number("i64", int(value))


def u16(value: int) -> Number:
    """A ``uint16_t``: rows know no such kind, but a float16 has as many bits, and up to 31743 they are a number."""
    if not 0 <= value < 0x7C00:
        raise ValueError(f"{value} does not fit")
    return Number("f16", float(np.uint16(value).view(np.float16)))


def f32(value: float) -> Number:
    """A ``float``."""
    return Number("f32", float(value))


def truth(value: bool) -> Number:
    """A ``bool``."""
    return Number("bool", bool(value))


def beyond(at: Pointer, size: int) -> Pointer:
    """The address ``size`` bytes behind another."""
    return Pointer(at.buffer, at.offset + size)


def launch(
    image: Image,
    pattern: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Arguments,
    shared: int = 0,
) -> Launch:
    """One launch of the one kernel whose mangled name holds ``pattern``.

    Raises:
        ValueError: there is not one, or it takes other arguments.
    """
    known = parameters(image.ptx)
    names = [name for name in known if re.search(pattern, name)]
    if len(names) != 1:
        raise ValueError(f"{len(names)} kernels are called {pattern}, not one: {', '.join(names[:3])}")
    given = [size(one) for one in arguments]
    asked = known[names[0]]
    if given != [bits for _, bits in asked]:
        raise ValueError(f"{names[0]} takes {asked}, not {given}")
    return Launch(image, names[0], _three(grid), _three(block), list(arguments), shared)


@functools.lru_cache(maxsize=32)
def parameters(ptx: str) -> dict[str, list[tuple[str, str]]]:
    """What each kernel of a PTX takes, in its order: the letter of each type (``u``, ``f``) and its bits."""
    return {name: _PARAMETER.findall(text) for name, text in _ENTRY.findall(ptx)}


def size(argument: Pointer | Number) -> str:
    """The bits of an argument, as PTX writes them."""
    return "64" if isinstance(argument, Pointer) else SIZES[argument.kind]


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _three(counts: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*counts, 1, 1)[:3]
    return int(x), int(y), int(z)


def _plain(symbol: str) -> str:
    """The function's own name in a mangled one: the last of its nested names."""
    at, found = 2, symbol
    at += symbol.startswith("_ZN")
    while match := re.match(r"\d+", symbol[at:]):
        begin = at + match.end()
        found = symbol[begin : begin + int(match[0])]
        at = begin + int(match[0])
    return found


def _up(count: int, step: int) -> int:
    """How many steps hold ``count``."""
    return -(-count // step)


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([0x70, *seed])


def _halves(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    return rng.standard_normal(shape).astype(np.float16)


# GPTQ: gptq_shuffle and gptq_gemm.


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer, as a checkpoint has it."""

    values: NDArray[np.int64]
    """The weights before scaling: inputs x outputs, 0 to 2^bits - 1."""
    zeros: NDArray[np.int64]
    """Groups x outputs; what is subtracted from the values."""
    scales: NDArray[np.float16]
    """Groups x outputs."""
    bits: int
    groups: NDArray[np.int64]
    """The group of each input."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """Inputs x outputs, exact."""
        return (self.values - self.zeros[self.groups]) * self.scales.astype(np.float64)[self.groups]

    @property
    def order(self) -> NDArray[np.int32] | None:
        """The inputs by their groups, as vLLM sorts them after loading; ``None`` where they are sorted."""
        if (np.diff(self.groups) >= 0).all():
            return None
        return np.argsort(self.groups, kind="stable").astype(np.int32)


def layer(rng: np.random.Generator, inputs: int, outputs: int, bits: int, group: int, act_order: bool = False) -> Layer:
    """A random layer; with ``act_order`` its inputs belong to the groups in no order."""
    count = inputs // group
    groups = np.arange(inputs) // group
    return Layer(
        values=rng.integers(0, 1 << bits, (inputs, outputs)),
        zeros=rng.integers(1, 1 << bits, (count, outputs)),  # which both formats of checkpoints can say
        scales=rng.uniform(0.5, 1.5, (count, outputs)).astype(np.float16) / np.float16(8 << bits),
        bits=bits,
        groups=rng.permutation(groups) if act_order else groups,
    )


def packed(values: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Rows of small numbers as rows of 32-bit words, the first number lowest."""
    per = 32 // bits
    wide = values.reshape(values.shape[0], -1, per).astype(np.uint64) << (np.arange(per, dtype=np.uint64) * bits)
    return np.asarray(wide.sum(axis=2), np.uint32)


def columns(some: Layer) -> NDArray[np.uint32]:
    """The weights as a checkpoint stores them: packed along the inputs."""
    return np.ascontiguousarray(packed(some.values.T, some.bits).T)


def _gptq(images: Mapping[str, Image]) -> Iterator[Row]:
    image = images[GPTQ]
    for bits in (4, 8):
        # 416 inputs end within a block of 128, 648 outputs within one of 512; a group is shorter than a block.
        some = layer(_rng(bits), 416, 648, bits, 32)
        mixed = layer(_rng(bits, 1), 416, 648, bits, 32, act_order=True)
        for count in ROWS:
            a = _halves(_rng(bits, 2, count), count, 416)
            if count <= LIMIT[bits]:
                yield _product(image, f"gptq_gemm bits={bits} rows={count}", some, a)
        yield _product(image, f"gptq_gemm bits={bits} rows=13 act-order", mixed, _halves(_rng(bits, 3), 13, 416))
        yield _product(image, f"gptq_gemm bits={bits} rows=5 v2 zeros", some, _halves(_rng(bits, 4), 5, 416), v2=True)
        for outlier in (8192.0, LARGEST):
            for count in (1, 8):
                a = _halves(_rng(bits, 5), count, 416)
                a[0, [59, 208]] = outlier, -outlier  # as a model's first token has them (vllm#10656)
                yield _product(image, f"gptq_gemm bits={bits} rows={count} outlier={outlier:g}", some, a)
        for count in (3, 8):
            name = f"gptq_gemm bits={bits} rows={count} act-order without exllama"
            yield _alternative(image, name, mixed, _halves(_rng(bits, 6), count, 416))
        yield _unpacked(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS", some)
        yield _unpacked(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS act-order", mixed)


def _shuffled(image: Image, memory: Memory, some: Layer) -> tuple[list[Launch], Pointer, Pointer | Number]:
    """gptq_shuffle (shuffle_exllama_weight): the launches, the weights as they leave them, the order of the inputs."""
    bits, (inputs, outputs) = some.bits, some.values.shape
    words, order = memory.put(columns(some)), some.order
    permutation: Pointer | Number = NULL
    launches = []
    if order is not None:
        permutation, raw = memory.put(order), words
        words = memory.fresh(inputs * outputs * bits // 8)  # which vLLM copies over the first and goes on there
        grid = (_up(outputs, 32), inputs // 32 * bits)
        name = f"make_sequential_{bits}bit_kernel"
        launches.append(launch(image, name, grid, (32,), [raw, words, permutation, i32(outputs)]))
    arguments: Arguments = [words, i32(inputs), i32(outputs)]
    launches.append(launch(image, f"shuffle_{bits}bit_kernel", (_up(outputs, 32),), (32,), arguments))
    return launches, words, permutation


def _product(image: Image, name: str, some: Layer, a: NDArray[np.float16], v2: bool = False) -> Row:
    """gptq_gemm as gemm_half_q_half_cuda launches it with ``use_exllama``."""
    memory, bits = Memory(), some.bits
    launches, words, order = _shuffled(image, memory, some)
    (count, inputs), outputs = a.shape, some.values.shape[1]
    scales, zeros = memory.put(some.scales), memory.put(packed(some.zeros - (not v2), bits))
    left = memory.put(a)
    # Zeros, for vLLM's own cudaMemsetAsync: every block along the inputs adds to them.
    result = memory.rows(np.zeros((count, outputs), np.float16))

    def part(begin: int, height: int, each: int) -> Launch:
        grid = _up(outputs, 512), _up(height, each), _up(inputs, 128)
        return launch(
            image, f"gemm_half_q_half_gptq_{bits}bit_kernelILb1ELi{each}EE", grid, (128,),
            [beyond(left, 2 * begin * inputs), words, zeros, scales, beyond(result, 2 * begin * outputs), i32(height),
             i32(outputs), i32(inputs), i32(len(some.scales)), truth(v2), order],
        )  # fmt: skip

    whole = count // 8 * 8
    launches += [part(0, whole, 8)] if whole else []
    launches += [part(whole, count - whole, count - whole)] if count > whole else []
    memory.expect(result, a.astype(np.float64) @ some.weights, "row")
    # Sums in float16: of four products (4 bits) or over a block of 128 inputs (8 bits), then one addition for each of
    # four blocks. Over a row of 648 their errors are as good as independent: the same text run on the CPU is off by
    # 1.2 and 1.7 roundings.
    return memory.row(name, launches, {4: 3, 8: 4}[bits] * HALF)


def _alternative(image: Image, name: str, some: Layer, a: NDArray[np.float16]) -> Row:
    """gptq_gemm without ``use_exllama`` (gemm_half_q_half_alt), as layers with act-order that are split have it."""
    memory, bits = Memory(), some.bits
    (count, inputs), outputs = a.shape, some.values.shape[1]
    words, zeros = memory.put(columns(some)), memory.put(packed(some.zeros - 1, bits))
    result = memory.rows(np.zeros((count, outputs), np.float16))
    arguments: Arguments = [
        memory.put(a), words, result, memory.put(some.scales), zeros, memory.put(some.groups.astype(np.int32)),
        i32(count), i32(inputs // 32 * bits), i32(outputs), truth(False),
    ]  # fmt: skip
    grid = _up(outputs, 128), _up(count, 8), _up(inputs, 128)
    memory.expect(result, a.astype(np.float64) @ some.weights, "row")
    # Scaled weights are rounded twice: the scale times the zero first, which is up to 2^bits/2 times as large as they
    # are on average; then sums over a block in float16, 16 (4 bits) or 32 (8 bits) additions.
    # The same text run on the CPU is off by 2.3 roundings.
    kernel = launch(image, f"gemm_half_q_half_alt_{bits}bit_kernel", grid, (128,), arguments)
    return memory.row(name, [kernel], 5 * HALF)


def _unpacked(image: Image, name: str, some: Layer) -> Row:
    """What gptq_gemm gives to cuBLAS for more rows (reconstruct_exllama)."""
    memory, bits = Memory(), some.bits
    launches, words, order = _shuffled(image, memory, some)
    inputs, outputs = some.values.shape
    zeros, scales = memory.put(packed(some.zeros - 1, bits)), memory.put(some.scales)
    result = memory.fresh(2 * inputs * outputs)
    arguments: Arguments = [
        words, order, zeros, scales, i32(inputs), i32(outputs), i32(len(some.scales)), truth(False), result,
    ]  # fmt: skip
    grid = _up(outputs, 512), _up(inputs, 128)
    launches.append(launch(image, f"reconstruct_exllama_{bits}bit_kernel", grid, (128,), arguments))
    # The value less its zero is exact, and its product with the scale is rounded once: there is one right answer.
    memory.expect(result, some.weights.astype(np.float16), "equal")
    return memory.row(name, launches, 0.0)


# rms_norm and fused_add_rms_norm.


def _norms(images: Mapping[str, Image]) -> Iterator[Row]:
    image = images[NORM]
    # Vectors of 8, of 2 and of 1 number, rows with gaps, and the smaller blocks from 256 tokens on.
    for tokens, hidden, gap in ((7, 1160, 0), (7, 1034, 0), (5, 4096, 64), (256, 259, 0)):
        name = f"rms_norm float16 tokens={tokens} hidden={hidden}{' strided' if gap else ''}"
        yield _norm(image, name, np.float16, (tokens, hidden), gap)
    yield _norm(image, "rms_norm float16 tokens=6 heads=5 head=128", np.float16, (6, 5, 128), 384)
    yield _norm(image, "rms_norm float32 tokens=7 hidden=1160", np.float32, (7, 1160), 0)
    for tokens, hidden, gap in ((7, 1160, 0), (7, 1034, 0), (5, 4096, 64), (256, 264, 0)):
        yield _fused(image, tokens, hidden, gap)


def _spread(rng: np.random.Generator, kind: type[np.floating], rows_: int, width: int, gap: int) -> Array:
    """Rows of numbers with NaN between them."""
    whole = np.full((rows_, width + gap), np.nan, kind)
    whole[:, :width] = rng.standard_normal((rows_, width)) * rng.uniform(0.2, 4, (rows_, 1))
    return whole


def _norm(image: Image, name: str, kind: type[np.floating], shape: tuple[int, ...], gap: int) -> Row:
    memory, rng = Memory(), _rng(10, *shape)
    hidden, item = shape[-1], np.dtype(kind).itemsize
    count = int(np.prod(shape[:-1]))
    weight = rng.uniform(0.5, 1.5, hidden).astype(kind)
    x = _spread(rng, kind, shape[0], int(np.prod(shape[1:])), gap)
    values = x[:, : x.shape[1] - gap].reshape(-1, hidden).astype(np.float64)
    right = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    result = memory.fresh(count * hidden * item)
    # Strides of the last dimension but one and of the two before; sizes of the last but one and the one before.
    strides = [x.shape[1], 0, 0, 0, 0] if len(shape) == 2 else [hidden, x.shape[1], 0, shape[1], 0]
    vector = int(np.gcd(16 // item, hidden))
    block = min(hidden // vector, 1024 if count < 256 else 256)
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    arguments: Arguments = [
        result, memory.put(x), *map(i64, strides), memory.put(weight), f32(1e-6), i32(count), i32(hidden),
    ]  # fmt: skip
    kernel = launch(image, f"15rms_norm_kernelI{letter}Li{vector}ELi{len(shape)}EE", (count,), (block,), arguments)
    memory.expect(result, right, "each", np.dtype(kind).str)
    # Two roundings, before and after the weight, which is up to 1.5 times more below the smallest normal number;
    # in float32 the mean of the squares has a rounding for each number that a thread adds, and rsqrtf two units.
    return memory.row(name, [kernel], 3 * HALF if kind is np.float16 else 32 * SINGLE)


def _fused(image: Image, tokens: int, hidden: int, gap: int) -> Row:
    memory, rng = Memory(), _rng(11, tokens, hidden)
    x = _spread(rng, np.float16, tokens, hidden, gap)
    before, weight = _halves(rng, tokens, hidden), rng.uniform(0.5, 1.5, hidden).astype(np.float16)
    after = x[:, :hidden] + before  # one rounding, as numpy does it
    values = after.astype(np.float64)
    right = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    inputs, residual = memory.put(x), memory.put(before)
    width = 8 if hidden % 8 == 0 and (hidden + gap) % 8 == 0 else 0
    arguments: Arguments = [
        inputs, i64(hidden + gap), residual, memory.put(weight), f32(1e-6), i32(tokens), i32(hidden),
    ]  # fmt: skip
    block = min(hidden, 1024 if tokens < 256 else 256)
    pattern = f"fused_add_rms_norm_kernelIN3c104HalfELi{width}EE"
    kernel = launch(image, pattern, (tokens,), (block,), arguments)
    memory.expect(residual, after, "equal")
    spread = np.full(x.shape, np.nan)
    spread[:, :hidden] = right
    memory.expect(inputs, spread, "each")
    name = f"fused_add_rms_norm float16 tokens={tokens} hidden={hidden}{' strided' if gap else ''}"
    return memory.row(name, [kernel], 3 * HALF)  # as rms_norm; the sum itself is the right one


# rotary_embedding.


def _rotaries(images: Mapping[str, Image]) -> Iterator[Row]:
    for neox in (True, False):
        for size_, turned in ((128, 128), (96, 64)):
            yield _rotary(images[ROTARY], neox, size_, turned)


def _rotary(image: Image, neox: bool, size_: int, turned: int) -> Row:
    """Query and key within the rows of one projection, as its split leaves them."""
    memory, rng = Memory(), _rng(20, neox, size_)
    tokens, heads, shared_heads, positions = 9, 6, 2, 64
    width = (heads + 2 * shared_heads) * size_
    x = _halves(rng, tokens, width)
    places = rng.integers(0, positions, tokens)
    angle = np.arange(positions)[:, None] / 10000.0 ** (np.arange(0, turned, 2) / turned)
    cache = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float16)
    cos, sin = np.split(cache.astype(np.float64)[places][:, None, :], 2, axis=2)
    right = x.astype(np.float64).reshape(tokens, -1, size_)
    turning = right[:, : heads + shared_heads, :turned]
    half = turned // 2
    first, second = (np.s_[..., :half], np.s_[..., half:]) if neox else (np.s_[..., ::2], np.s_[..., 1::2])
    one, two = turning[first].copy(), turning[second].copy()
    turning[first], turning[second] = one * cos - two * sin, two * cos + one * sin
    here = memory.rows(x.reshape(tokens, -1, size_))
    arguments: Arguments = [
        memory.put(places.astype(np.int64)), here, beyond(here, 2 * heads * size_), memory.put(cache), i32(turned),
        i64(width), i64(width), i64(size_), i32(heads), i32(shared_heads), i32(size_),
    ]  # fmt: skip
    block = min(heads * turned // 2, 512)
    pattern = f"rotary_embedding_kernelIN3c104HalfELb{int(neox)}EE"
    kernel = launch(image, pattern, (tokens,), (block,), arguments)
    memory.expect(here, right, "row")
    name = f"rotary_embedding float16 {'neox' if neox else 'gptj'} head={size_} turned={turned}"
    # Both products and their sum are rounded: for a pair of length 1 the products are up to sqrt(2) in all.
    return memory.row(name, [kernel], (1 + np.sqrt(2)) * HALF)


# silu_and_mul, gelu_and_mul and their like.


def _activations(images: Mapping[str, Image]) -> Iterator[Row]:
    image = images[ACTIVATION]
    for kernel, operation, first in (
        ("11silu_kernel", "silu_and_mul", True),
        ("11silu_kernel", "mul_and_silu", False),
        ("11gelu_kernel", "gelu_and_mul", True),
        ("16gelu_tanh_kernel", "gelu_tanh_and_mul", True),
    ):
        for kind in (np.float16, np.float32) if operation == "silu_and_mul" else (np.float16,):
            for tokens, width in ((3, 1500), (33, 344)):
                yield _gated(image, kernel, operation, first, kind, tokens, width)


def _gated(
    image: Image, kernel: str, operation: str, first: bool, kind: type[np.floating], tokens: int, width: int
) -> Row:
    memory, item = Memory(), np.dtype(kind).itemsize
    # From -3 on, so that 1 + erf(x / sqrt(2)) does not cancel in float32.
    x = np.maximum(_rng(30, tokens).normal(0, 2, (tokens, 2 * width)), -3).astype(kind)
    one, two = np.split(x.astype(np.float64), 2, axis=1)
    turned, other = (one, two) if first else (two, one)
    result = memory.fresh(tokens * width * item)
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    # The function is a template argument: its name stands in the kernel's.
    pattern = rf"18act_and_mul_kernelI{letter}.*{kernel}.*Lb{int(first)}EE"
    started = launch(image, pattern, (tokens,), (min(width, 1024),), [result, memory.put(x), i32(width)])
    memory.expect(result, ACTIVATIONS[kernel](turned) * other, "each", np.dtype(kind).str)
    # The function's result and the product are rounded; the former more coarsely below the smallest normal number.
    bound = 4 * HALF if kind is np.float16 else 16 * SINGLE
    return memory.row(f"{operation} {np.dtype(kind).name} tokens={tokens} width={width}", [started], bound)


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error function to 15 digits, from -4 to 10: its series about 0, which numpy does not have."""
    total, term = np.zeros_like(x), x.copy()
    for n in range(200):
        total += term / (2 * n + 1)
        term = -term * x * x / (n + 1)
    return np.where(np.abs(x) > 4, np.sign(x), 2 / np.sqrt(np.pi) * total)


ACTIVATIONS = {
    "11silu_kernel": lambda x: x / (1 + np.exp(-x)),
    "11gelu_kernel": lambda x: x * 0.5 * (1 + _erf(x / np.sqrt(2))),
    "16gelu_tanh_kernel": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
"""The functions in float64, by the kernels' mangled names."""


# reshape_and_cache, reshape_and_cache_flash and cp_gather_cache.


def e5m2(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The nearest numbers of e5m2, the even one of two, and never infinite (__NV_SATFINITE)."""
    x = values.astype(np.float64)
    step = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 2)
    near = np.clip(np.rint(x / step) * step, -57344, 57344).astype(np.float16)
    return np.asarray(near.view(np.uint16) >> 8, np.uint8)


def _caches(images: Mapping[str, Image]) -> Iterator[Row]:
    image = images[CACHE]
    for kind in ("float16", "fp8_e5m2"):
        for heads, size_, block in ((2, 128, 16), (5, 64, 8)):
            yield _paged(image, kind, heads, size_, block)
            yield _flash(image, kind, heads, size_, block, "NHD")
        yield _flash(image, kind, 5, 64, 8, "HND")
    yield _gathered(image)


@dataclass(frozen=True)
class _Tokens:
    """Keys and values of a batch, within the rows of one projection, and where they go."""

    key: NDArray[np.float16]
    value: NDArray[np.float16]
    stride: int
    slots: NDArray[np.int64]
    rows: NDArray[np.float16]

    @classmethod
    def some(cls, heads: int, size_: int, block: int) -> _Tokens:
        rng, tokens = _rng(40, heads, block), 11
        whole = _halves(rng, tokens, 3 * heads * size_) * np.float16(3)
        # Numbers at both ends of e5m2: beyond its largest, a tie, and below its smallest.
        whole[0, heads * size_ : heads * size_ + 8] = [65504, -65504, 61440, 1.125, 1.375, 2e-5, 7e-6, -6e-8]
        _, key, value = np.split(whole, 3, axis=1)
        slots = rng.permutation(6 * block)[:tokens]
        slots[4] = -1  # a token that only fills the batch up
        shape = tokens, heads, size_
        return cls(key.reshape(shape), value.reshape(shape), 3 * heads * size_, slots, whole)

    def put(self, memory: Memory) -> list[Pointer]:
        here, width = memory.put(self.rows), self.stride // 3
        return [beyond(here, 2 * width), beyond(here, 4 * width)]


SCALES = 1.0, 0.5
"""Of keys and values in an fp8 cache: powers of two, so that dividing is exact."""


def _scales(memory: Memory) -> list[Pointer]:
    return [memory.put(np.array([scale], np.float32)) for scale in SCALES]


def _kinds(kind: str) -> tuple[str, int]:
    """How a cache's template arguments are mangled, and the bytes of a number."""
    return ("tt", 2) if kind == "float16" else ("th", 1)


def _converted(some: _Tokens, kind: str) -> tuple[Array, Array]:
    if kind == "float16":
        return some.key, some.value
    return e5m2(some.key.astype(np.float64) / SCALES[0]), e5m2(some.value.astype(np.float64) / SCALES[1])


def _pattern(name: str, kind: str) -> str:
    letters = _kinds(kind)[0]
    return f"{len(name)}{name}I{letters}LNS_18Fp8KVCacheDataTypeE{0 if kind == 'float16' else 2}EE"


def _paged(image: Image, kind: str, heads: int, size_: int, block: int) -> Row:
    """reshape_and_cache: keys in pieces of 16 bytes, values with the places of a block next to each other."""
    memory, some, item = Memory(), _Tokens.some(heads, size_, block), _kinds(kind)[1]
    x, tokens = 16 // item, len(some.slots)
    keys = fresh(6 * heads * size_ * block * item).view(f"<u{item}").reshape(6, heads, size_ // x, block, x)
    values = fresh(keys.nbytes).view(f"<u{item}").reshape(6, heads, size_, block)
    sources = some.put(memory)
    places = memory.put(keys), memory.put(values)
    for slot, key, value in zip(some.slots, *_converted(some, kind), strict=True):
        if slot >= 0:
            keys[slot // block, :, :, slot % block] = key.view(keys.dtype).reshape(heads, size_ // x, x)
            values[slot // block, :, :, slot % block] = value.view(values.dtype)
    arguments: Arguments = [
        *sources, *places, memory.put(some.slots), i32(some.stride), i32(some.stride), i32(heads), i32(size_),
        i32(block), i32(x), *_scales(memory),
    ]  # fmt: skip
    threads = min(heads * size_ // x, 512)
    kernel = launch(image, _pattern("reshape_and_cache_kernel", kind), (tokens,), (threads,), arguments)
    for place, right in zip(places, (keys, values), strict=True):
        memory.expect(place, right, "equal")
    name = f"reshape_and_cache {kind} heads={heads} head={size_} block={block}"
    return memory.row(name, [kernel], 0.0)  # it copies, or rounds in one right way


def _flash(image: Image, kind: str, heads: int, size_: int, block: int, layout: str) -> Row:
    """reshape_and_cache_flash, with blocks that have a gap behind them."""
    memory, some, item = Memory(), _Tokens.some(heads, size_, block), _kinds(kind)[1]
    tokens, gap = len(some.slots), 64
    page, head = (heads * size_, size_) if layout == "NHD" else (size_, block * size_)
    whole = block * heads * size_ + gap
    sources, rights, places = some.put(memory), [], []
    for converted in _converted(some, kind):
        right = fresh(6 * whole * item).view(f"<u{item}").reshape(6, whole)
        places.append(memory.put(right))
        for slot, row in zip(some.slots, converted, strict=True):
            for number in range(heads if slot >= 0 else 0):
                begin = slot % block * page + number * head
                right[slot // block, begin : begin + size_] = row[number].view(right.dtype)
        rights.append(right)
    arguments: Arguments = [
        *sources, *places, memory.put(some.slots), i64(whole), i64(page), i64(head), i64(some.stride),
        i64(some.stride), i32(heads), i32(size_), i32(block), *_scales(memory),
    ]  # fmt: skip
    threads = min(heads * size_, 512)
    kernel = launch(image, _pattern("reshape_and_cache_flash_kernel", kind), (tokens,), (threads,), arguments)
    for place, right in zip(places, rights, strict=True):
        memory.expect(place, right, "equal")
    name = f"reshape_and_cache_flash {kind} {layout} heads={heads} head={size_} block={block}"
    return memory.row(name, [kernel], 0.0)  # it copies, or rounds in one right way


def _gathered(image: Image) -> Row:
    """cp_gather_cache, of entries of 16-bit numbers that the cache has in blocks."""
    memory, rng = Memory(), _rng(41)
    lengths, starts, block, entry, gap = [37, 1, 20], [5, 0, 11], 8, 1100, 24
    table = rng.permutation(24).astype(np.int32).reshape(3, 8)
    cache = np.full((24, block * entry + gap), 0xFFFF, np.uint16)
    cache[:, : block * entry] = rng.integers(0, 0xFFFF, (24, block * entry))
    entries = cache[:, : block * entry].reshape(24, block, entry)
    right = [
        entries[table[number, place // block], place % block]
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for place in range(start, start + length)
    ]
    result = memory.fresh(2 * len(right) * entry)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    arguments: Arguments = [
        memory.put(cache), result, memory.put(table), memory.put(ends), i32(block), i32(entry), i64(table.shape[1]),
        i64(cache.shape[1]), i64(entry), i64(entry), memory.put(np.array(starts, np.int32)),
    ]  # fmt: skip
    kernel = launch(image, "15cp_gather_cacheItEE", (3, 16), (1024,), arguments)
    memory.expect(result, np.stack(right), "equal")
    return memory.row("cp_gather_cache 16 bits sequences=3", [kernel], 0.0)  # it copies


# topk_softmax.


def _softmaxes(images: Mapping[str, Image]) -> Iterator[Row]:
    for kind in (np.float32, np.float16):
        for experts, top, tokens in ((8, 2, 37), (64, 6, 37), (60, 4, 7)):
            yield _softmax(images[SOFTMAX], kind, experts, top, tokens, renormalize=experts != 64)


def _softmax(image: Image, kind: type[np.floating], experts: int, top: int, tokens: int, *, renormalize: bool) -> Row:
    """topkGatingSoftmaxKernelLauncher: one kernel for a power of two, two for the rest."""
    memory, item = Memory(), np.dtype(kind).itemsize
    # No two of a row are the same, so that there is one order.
    steps = np.linspace(-4, 4, experts).astype(kind)
    logits = _rng(50, experts).permuted(np.tile(steps, (tokens, 1)), axis=1)
    weights = np.exp(logits.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = np.argsort(-weights, axis=1)[:, :top]
    right = np.take_along_axis(weights, chosen, axis=1)
    right = right / right.sum(axis=1, keepdims=True) if renormalize else right
    result, ids, places = (memory.fresh(4 * tokens * top) for _ in range(3))
    gates = memory.put(logits)
    letter = "f" if kind is np.float32 else "6__half"
    if experts & (experts - 1) == 0:
        loaded = min(16, item * experts)  # bytes at once
        each = max(1, experts // (loaded // item * 32)) * (loaded // item)  # experts of a thread
        blocks = _up(_up(tokens, 32 * each // experts), 4)
        arguments: Arguments = [
            gates, NULL, result, i32(tokens), ids, places, i32(top), i32(0), i32(experts), truth(renormalize),
        ]  # fmt: skip
        pattern = f"topkGatingSoftmaxILi{each}ELi{experts}ELi4ELi{loaded}ELi32Ei{letter}EE"
        launches = [launch(image, pattern, (blocks,), (32, 4), arguments)]
    else:
        between = memory.fresh(4 * tokens * experts)
        soft: Arguments = [gates, NULL, between, i32(experts)]
        arguments = [
            between, NULL, result, ids, places, *map(i32, (experts, top, 0, experts)), truth(renormalize),
        ]  # fmt: skip
        launches = [
            launch(image, f"moeSoftmaxILi256E{letter}EE", (tokens,), (256,), soft),
            launch(image, "moeTopKILi256EiEE", (tokens,), (256,), arguments),
        ]
    memory.expect(result, right, "each", "<f4")
    memory.expect(ids, chosen.astype(np.int32), "equal")
    memory.expect(places, (np.arange(top) * tokens + np.arange(tokens)[:, None]).astype(np.int32), "equal")
    # expf is off by four units and takes a difference up to 8, whose rounding is 8 more; so is the sum of all, which
    # has a few of its own, and the rest is a quotient and two products.
    return memory.row(f"topk_softmax {np.dtype(kind).name} experts={experts} top={top}", launches, 32 * SINGLE)


# moe_align_block_size, moe_sum and moe_wna16_gemm.


@dataclass(frozen=True)
class _Sorted:
    """What moe_align_block_size leaves, and the launches that make it."""

    launches: list[Launch]
    ids: Pointer
    experts: Pointer
    total: Pointer
    room: int
    """Places for ids."""


def _aligned(
    image: Image, memory: Memory, chosen: NDArray[np.int32], experts: int, block: int, *, order: bool
) -> _Sorted:
    """moe_align_block_size, whose results must be right; with ``order`` also that within an expert, if it is set."""
    flat = chosen.reshape(-1)
    count, room = flat.size, flat.size + experts * (block - 1)
    given, ids = memory.put(flat), memory.fresh(4 * room)
    homes, total = memory.fresh(4 * _up(room, block)), memory.fresh(4)
    small = count < 1024 and experts <= 64
    if small:
        threads = max(experts, 32)
        shared = ((threads + 1) * experts + experts + 1) * 4
        arguments: Arguments = [given, ids, homes, total, i32(experts), i32(block), i64(count), i32(room)]
        pattern = "moe_align_block_size_small_batch_expert_kernelIiEE"
        launches = [launch(image, pattern, (1,), (threads,), arguments, shared)]
    else:
        padded, threads = _up(experts, 32) * 32, 256
        sums = memory.fresh(4 * (experts + 1))
        arguments = [
            given, ids, homes, total, *map(i32, (experts, padded, 32, block)), i64(count), sums, i32(room),
        ]  # fmt: skip
        sorting: Arguments = [given, ids, sums, i64(count), i32(experts)]
        launches = [
            launch(image, "27moe_align_block_size_kernelIiEE", (1,), (1024,), arguments, padded * 4),
            launch(image, "count_and_sort_expert_tokens_kernelIiEE", (_up(count, threads),), (threads,), sorting),
        ]
    right, own = np.full(room, count, np.int32), np.zeros(_up(room, block), np.int32)
    at = 0
    for expert in range(experts):
        mine = np.flatnonzero(flat == expert)
        # A thread takes every so manyeth, and threads come one after another.
        mine = mine[np.lexsort((mine, mine % threads))]
        own[at // block : at // block + _up(mine.size, block)] = expert
        right[at : at + mine.size] = mine
        at += _up(mine.size, block) * block
    memory.expect(homes, own, "equal")
    memory.expect(total, np.array([at], np.int32), "equal")
    if order and (small or np.bincount(flat).max() <= 1):
        memory.expect(ids, right, "equal")
    return _Sorted(launches, ids, homes, total, room)


def _choose(rng: np.random.Generator, tokens: int, experts: int, top: int) -> NDArray[np.int32]:
    """Experts for each token: each expert once if that can be, for one order of tokens, else the first more often."""
    if tokens * top == experts:
        return rng.permutation(np.arange(experts, dtype=np.int32)).reshape(tokens, top)
    liking = rng.standard_normal((tokens, experts)) - np.arange(experts) / experts
    return np.argsort(-liking, axis=1)[:, :top].astype(np.int32)


def _aligning(images: Mapping[str, Image]) -> Iterator[Row]:
    image = images[ALIGN]
    shapes = (1, 8, 2, 16), (37, 8, 2, 16), (100, 64, 6, 32), (64, 512, 8, 16), (700, 8, 2, 64)
    for tokens, experts, top, block in shapes:
        memory = Memory()
        chosen = _choose(_rng(60, tokens), tokens, experts, top)
        made = _aligned(image, memory, chosen, experts, block, order=True)
        name = f"moe_align_block_size tokens={tokens} experts={experts} top={top} block={block}"
        yield memory.row(name, made.launches, 0.0)
    for kind in (np.float16, np.float32):
        for top in (2, 3, 4) if kind is np.float16 else (2,):
            yield _summed(image, kind, top)


def _summed(image: Image, kind: type[np.floating], top: int) -> Row:
    """moe_sum."""
    memory, tokens, width = Memory(), 9, 1100
    x = _rng(61, top).standard_normal((tokens, top, width)).astype(kind)
    result = memory.rows(fresh(tokens * width * x.itemsize).view(kind).reshape(tokens, width))
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    arguments: Arguments = [result, memory.put(x), i32(width)]
    kernel = launch(image, f"moe_sum_kernelI{letter}Li{top}EE", (tokens,), (min(width, 1024),), arguments)
    memory.expect(result, x.astype(np.float64).sum(axis=1), "row", x.dtype.str)
    # One rounding for each addition but the first, of sums that are no larger than the whole, on average.
    name = f"moe_sum {np.dtype(kind).name} top={top}"
    return memory.row(name, [kernel], (top - 1) * (HALF if kind is np.float16 else SINGLE))


def _experts(images: Mapping[str, Image]) -> Iterator[Row]:
    for bits in (4, 8):
        for group, tokens, zeros, weighted in ((128, 1, False, False), (64, 37, True, True), (32, 5, True, False)):
            yield _expert(images, bits, group, tokens, zeros=zeros, weighted=weighted)
        # So many that the sorting has two kernels and no order of its own: the product must not mind.
        yield _expert(images, bits, 64, 520, zeros=True, weighted=True)


def _expert(images: Mapping[str, Image], bits: int, group: int, tokens: int, *, zeros: bool, weighted: bool) -> Row:
    """moe_align_block_size, then moe_wna16_gemm with the blocks of get_moe_wna16_block_config."""
    memory, rng = Memory(), _rng(70, bits, group, tokens)
    inputs, outputs, experts, top, high, wide, deep = 256, 144, 8, 2, 16, 128, 128
    chosen = _choose(rng, tokens, experts, top)
    made = _aligned(images[ALIGN], memory, chosen, experts, high, order=False)
    values = rng.integers(0, 1 << bits, (experts, outputs, inputs))
    scales = (rng.uniform(0.5, 1.5, (experts, outputs, inputs // group)) / (8 << bits)).astype(np.float16)
    offsets = np.full(scales.shape, 1 << (bits - 1))
    if zeros:
        offsets = rng.integers(0, 1 << bits, scales.shape)
    weights = (values - offsets.repeat(group, axis=2)) * scales.astype(np.float64).repeat(group, axis=2)
    x = _halves(rng, tokens, inputs)
    share = rng.uniform(0.1, 0.9, (tokens, top)).astype(np.float32)
    right = np.einsum("tk,tjnk->tjn", x.astype(np.float64), weights[chosen])
    right = right * share[..., None].astype(np.float64) if weighted else right
    words = packed(values.reshape(experts * outputs, inputs), bits)
    result = memory.rows(np.zeros((tokens * top, outputs), np.float16))  # vLLM's own output.zero_()
    room = min(made.room, tokens * high * top) if tokens <= high else made.room
    grid = _up(room, high), _up(outputs, wide), _up(inputs, deep)
    offset = memory.put(_zeros(offsets, bits)) if zeros else NULL
    arguments: Arguments = [
        memory.put(x), result, memory.put(words), memory.put(scales), offset,
        memory.put(share) if weighted else NULL, made.ids, made.experts, made.total, u16(experts), u16(group), u16(top),
        *(Number("u32", each) for each in (tokens, outputs, inputs)), u16(high), u16(wide), u16(deep), truth(zeros),
        truth(weighted),
    ]  # fmt: skip
    pattern = f"moe_wna16_gemm_kernelI6__halfLi{bits}ELi{deep // group}EE"
    product = launch(images[EXPERTS], pattern, grid, (wide,), arguments, high * deep * 2)
    memory.expect(result, right, "row")
    name = f"moe_wna16_gemm bits={bits} group={group} tokens={tokens}{' zeros' if zeros else ''}"
    # The scaled weight is rounded, and so are sums of four products (4 bits) or two (8 bits); then one addition for
    # each of two blocks. Over a row their errors are as good as independent.
    return memory.row(f"{name}{' weighted' if weighted else ''}", [*made.launches, product], 3 * HALF)


def _zeros(offsets: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Zeros as the kernel takes them: two outputs of 4 bits in a byte, the even one lower."""
    if bits == 8:
        return offsets.astype(np.uint8)
    return (offsets[:, ::2] | offsets[:, 1::2] << 4).astype(np.uint8)


MAKERS = {
    GPTQ: _gptq,
    NORM: _norms,
    ROTARY: _rotaries,
    ACTIVATION: _activations,
    CACHE: _caches,
    SOFTMAX: _softmaxes,
    ALIGN: _aligning,
    EXPERTS: _experts,
}
"""What makes the rows of each source."""
