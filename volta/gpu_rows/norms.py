"""Rows of rms_norm and fused_add_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from volta.gpu.rows import Array, Image, Row
from volta.gpu_rows.builder import (
    HALF,
    SINGLE,
    Arguments,
    RowBuilder,
    f32,
    generator,
    i32,
    i64,
    launch,
    random_halves,
)

SOURCE = "csrc/layernorm_kernels.cu"


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of rms_norm and fused_add_rms_norm."""
    image = images[SOURCE]
    # Vectors of 8, 2 and 1 numbers; rows with gaps; smaller blocks, which vLLM uses from 256 tokens on.
    for tokens, hidden, gap in ((7, 1160, 0), (7, 1034, 0), (5, 4096, 64), (256, 259, 0)):
        name = f"rms_norm float16 tokens={tokens} hidden={hidden}{' strided' if gap else ''}"
        yield _norm(image, name, np.float16, (tokens, hidden), gap)
    yield _norm(image, "rms_norm float16 tokens=6 heads=5 head=128", np.float16, (6, 5, 128), 384)
    yield _norm(image, "rms_norm float32 tokens=7 hidden=1160", np.float32, (7, 1160), 0)
    for tokens, hidden, gap in ((7, 1160, 0), (7, 1034, 0), (5, 4096, 64), (256, 264, 0)):
        yield _fused(image, tokens, hidden, gap)


def _spread(rng: np.random.Generator, kind: type[np.floating], count: int, width: int, gap: int) -> Array:
    """Return rows of random numbers with ``gap`` NaNs after each."""
    whole = np.full((count, width + gap), np.nan, kind)
    whole[:, :width] = rng.standard_normal((count, width)) * rng.uniform(0.2, 4, (count, 1))
    return whole


def _norm(image: Image, name: str, kind: type[np.floating], shape: tuple[int, ...], gap: int) -> Row:
    memory, rng = RowBuilder(), generator(10, *shape)
    hidden, item = shape[-1], np.dtype(kind).itemsize
    count = int(np.prod(shape[:-1]))
    weight = rng.uniform(0.5, 1.5, hidden).astype(kind)
    x = _spread(rng, kind, shape[0], int(np.prod(shape[1:])), gap)
    values = x[:, : x.shape[1] - gap].reshape(-1, hidden).astype(np.float64)
    right = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    result = memory.fresh(count * hidden * item)
    # The strides of dimensions -2, -3 and -4, then the sizes of dimensions -2 and -3.
    strides = [x.shape[1], 0, 0, 0, 0] if len(shape) == 2 else [hidden, x.shape[1], 0, shape[1], 0]
    vector = int(np.gcd(16 // item, hidden))
    block = min(hidden // vector, 1024 if count < 256 else 256)
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    arguments: Arguments = [
        result, memory.put(x), *map(i64, strides), memory.put(weight), f32(1e-6), i32(count), i32(hidden),
    ]  # fmt: skip
    kernel = launch(image, f"15rms_norm_kernelI{letter}Li{vector}ELi{len(shape)}EE", (count,), (block,), arguments)
    memory.expect(result, right, "each", np.dtype(kind).str)
    # Two roundings, before and after the product with the weight of up to 1.5, which enlarges the first below the
    # smallest normal number. In float32, each addition of a thread is rounded, and rsqrtf has an error of two units.
    return memory.row(name, [kernel], 3 * HALF if kind is np.float16 else 32 * SINGLE)


def _fused(image: Image, tokens: int, hidden: int, gap: int) -> Row:
    memory, rng = RowBuilder(), generator(11, tokens, hidden)
    x = _spread(rng, np.float16, tokens, hidden, gap)
    before, weight = random_halves(rng, tokens, hidden), rng.uniform(0.5, 1.5, hidden).astype(np.float16)
    after = x[:, :hidden] + before  # rounded once, as by numpy
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
    return memory.row(name, [kernel], 3 * HALF)  # the bound of rms_norm; the sum is exact
