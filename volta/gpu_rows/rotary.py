"""Rows of rotary_embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from volta.gpu.rows import Image, Row
from volta.gpu_rows.builder import (
    HALF,
    Arguments,
    Memory,
    beyond,
    generator,
    i32,
    i64,
    launch,
    random_halves,
)

SOURCE = "csrc/pos_encoding_kernels.cu"


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of rotary_embedding."""
    for neox in (True, False):
        for size_, turned in ((128, 128), (96, 64)):
            yield _rotary(images[SOURCE], neox, size_, turned)


def _rotary(image: Image, neox: bool, size_: int, turned: int) -> Row:
    """Query and key within the rows of one projection, as its split leaves them."""
    memory, rng = Memory(), generator(20, neox, size_)
    tokens, heads, shared_heads, positions = 9, 6, 2, 64
    width = (heads + 2 * shared_heads) * size_
    x = random_halves(rng, tokens, width)
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
