"""Rows of rotary_embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from volta.gpu.rows import Image, Row
from volta.gpu_rows.builder import (
    HALF,
    Arguments,
    RowBuilder,
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
        for head_size, rotated in ((128, 128), (96, 64)):
            yield _rotary(images[SOURCE], neox, head_size, rotated)


def _rotary(image: Image, neox: bool, head_size: int, rotated: int) -> Row:
    """Return the row of rotary_embedding for query and key that are views of one projection."""
    memory, rng = RowBuilder(), generator(20, neox, head_size)
    tokens, heads, shared_heads, positions = 9, 6, 2, 64
    width = (heads + 2 * shared_heads) * head_size
    x = random_halves(rng, tokens, width)
    places = rng.integers(0, positions, tokens)
    angle = np.arange(positions)[:, None] / 10000.0 ** (np.arange(0, rotated, 2) / rotated)
    cache = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float16)
    cos, sin = np.split(cache.astype(np.float64)[places][:, None, :], 2, axis=2)
    right = x.astype(np.float64).reshape(tokens, -1, head_size)
    rotating = right[:, : heads + shared_heads, :rotated]
    half = rotated // 2
    first, second = (np.s_[..., :half], np.s_[..., half:]) if neox else (np.s_[..., ::2], np.s_[..., 1::2])
    x1, x2 = rotating[first].copy(), rotating[second].copy()
    rotating[first], rotating[second] = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    target = memory.rows(x.reshape(tokens, -1, head_size))
    arguments: Arguments = [
        memory.put(places.astype(np.int64)), target, beyond(target, 2 * heads * head_size), memory.put(cache),
        i32(rotated), i64(width), i64(width), i64(head_size), i32(heads), i32(shared_heads), i32(head_size),
    ]  # fmt: skip
    block = min(heads * rotated // 2, 512)
    pattern = f"rotary_embedding_kernelIN3c104HalfELb{int(neox)}EE"
    kernel = launch(image, pattern, (tokens,), (block,), arguments)
    memory.expect(target, right, "row")
    name = f"rotary_embedding float16 {'neox' if neox else 'gptj'} head={head_size} turned={rotated}"
    # Both products and their sum are rounded. For a pair of length 1 the sum of the products is up to sqrt(2).
    return memory.row(name, [kernel], (1 + np.sqrt(2)) * HALF)
