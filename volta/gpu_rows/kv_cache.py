"""Rows of reshape_and_cache, reshape_and_cache_flash and cp_gather_cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import Array, Image, Pointer, Row, fresh
from volta.gpu_rows.builder import (
    Arguments,
    RowBuilder,
    beyond,
    generator,
    i32,
    i64,
    launch,
    random_halves,
)

SOURCE = "csrc/cache_kernels.cu"
SCALES = 1.0, 0.5
"""The scales of keys and values in an fp8 cache: powers of two, so that the division is exact."""


def e5m2(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Round to e5m2: ties to even, and the largest finite number instead of infinity (__NV_SATFINITE)."""
    x = values.astype(np.float64)
    step = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 2)
    near = np.clip(np.rint(x / step) * step, -57344, 57344).astype(np.float16)
    return np.asarray(near.view(np.uint16) >> 8, np.uint8)


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of the kernels that write to the KV cache or read from it."""
    image = images[SOURCE]
    for kind in ("float16", "fp8_e5m2"):
        for heads, head_size, block in ((2, 128, 16), (5, 64, 8)):
            yield _paged(image, kind, heads, head_size, block)
            yield _flash(image, kind, heads, head_size, block, "NHD")
        yield _flash(image, kind, 5, 64, 8, "HND")
    yield _gather(image)


@dataclass(frozen=True)
class _Tokens:
    """Keys and values of a batch, which are views of one projection, and their slots."""

    key: NDArray[np.float16]
    value: NDArray[np.float16]
    stride: int
    slots: NDArray[np.int64]
    rows: NDArray[np.float16]

    @classmethod
    def random(cls, heads: int, head_size: int, block: int) -> _Tokens:
        rng, tokens = generator(40, heads, block), 11
        whole = random_halves(rng, tokens, 3 * heads * head_size) * np.float16(3)
        # Limits of e5m2: numbers beyond the largest, ties, and numbers below the smallest.
        whole[0, heads * head_size : heads * head_size + 8] = [65504, -65504, 61440, 1.125, 1.375, 2e-5, 7e-6, -6e-8]
        _, key, value = np.split(whole, 3, axis=1)
        slots = rng.permutation(6 * block)[:tokens]
        slots[4] = -1  # a token that pads the batch
        shape = tokens, heads, head_size
        return cls(key.reshape(shape), value.reshape(shape), 3 * heads * head_size, slots, whole)

    def put(self, memory: RowBuilder) -> list[Pointer]:
        start, width = memory.put(self.rows), self.stride // 3
        return [beyond(start, 2 * width), beyond(start, 4 * width)]


def _scales(memory: RowBuilder) -> list[Pointer]:
    return [memory.put(np.array([scale], np.float32)) for scale in SCALES]


def _mangled(kind: str) -> tuple[str, int]:
    """Return the mangled template arguments of a cache's kernels, and the bytes of a number."""
    return ("tt", 2) if kind == "float16" else ("th", 1)


def _converted(batch: _Tokens, kind: str) -> tuple[Array, Array]:
    if kind == "float16":
        return batch.key, batch.value
    return e5m2(batch.key.astype(np.float64) / SCALES[0]), e5m2(batch.value.astype(np.float64) / SCALES[1])


def _pattern(name: str, kind: str) -> str:
    letters = _mangled(kind)[0]
    return f"{len(name)}{name}I{letters}LNS_18Fp8KVCacheDataTypeE{0 if kind == 'float16' else 2}EE"


def _paged(image: Image, kind: str, heads: int, head_size: int, block: int) -> Row:
    """Return the row of reshape_and_cache: keys in pieces of 16 bytes, values with a block's slots contiguous."""
    memory, batch, item = RowBuilder(), _Tokens.random(heads, head_size, block), _mangled(kind)[1]
    x, tokens = 16 // item, len(batch.slots)
    keys = fresh(6 * heads * head_size * block * item).view(f"<u{item}").reshape(6, heads, head_size // x, block, x)
    values = fresh(keys.nbytes).view(f"<u{item}").reshape(6, heads, head_size, block)
    sources = batch.put(memory)
    places = memory.put(keys), memory.put(values)
    for slot, key, value in zip(batch.slots, *_converted(batch, kind), strict=True):
        if slot >= 0:
            keys[slot // block, :, :, slot % block] = key.view(keys.dtype).reshape(heads, head_size // x, x)
            values[slot // block, :, :, slot % block] = value.view(values.dtype)
    arguments: Arguments = [
        *sources, *places, memory.put(batch.slots), i32(batch.stride), i32(batch.stride), i32(heads), i32(head_size),
        i32(block), i32(x), *_scales(memory),
    ]  # fmt: skip
    threads = min(heads * head_size // x, 512)
    kernel = launch(image, _pattern("reshape_and_cache_kernel", kind), (tokens,), (threads,), arguments)
    for place, right in zip(places, (keys, values), strict=True):
        memory.expect(place, right, "equal")
    name = f"reshape_and_cache {kind} heads={heads} head={head_size} block={block}"
    return memory.row(name, [kernel], 0.0)  # it copies, or rounds once


def _flash(image: Image, kind: str, heads: int, head_size: int, block: int, layout: str) -> Row:
    """Return the row of reshape_and_cache_flash, with a gap after each block."""
    memory, batch, item = RowBuilder(), _Tokens.random(heads, head_size, block), _mangled(kind)[1]
    tokens, gap = len(batch.slots), 64
    page, head = (heads * head_size, head_size) if layout == "NHD" else (head_size, block * head_size)
    whole = block * heads * head_size + gap
    sources, rights, places = batch.put(memory), [], []
    for converted in _converted(batch, kind):
        right = fresh(6 * whole * item).view(f"<u{item}").reshape(6, whole)
        places.append(memory.put(right))
        for slot, row in zip(batch.slots, converted, strict=True):
            for number in range(heads if slot >= 0 else 0):
                begin = slot % block * page + number * head
                right[slot // block, begin : begin + head_size] = row[number].view(right.dtype)
        rights.append(right)
    arguments: Arguments = [
        *sources, *places, memory.put(batch.slots), i64(whole), i64(page), i64(head), i64(batch.stride),
        i64(batch.stride), i32(heads), i32(head_size), i32(block), *_scales(memory),
    ]  # fmt: skip
    threads = min(heads * head_size, 512)
    kernel = launch(image, _pattern("reshape_and_cache_flash_kernel", kind), (tokens,), (threads,), arguments)
    for place, right in zip(places, rights, strict=True):
        memory.expect(place, right, "equal")
    name = f"reshape_and_cache_flash {kind} {layout} heads={heads} head={head_size} block={block}"
    return memory.row(name, [kernel], 0.0)  # it copies, or rounds once


def _gather(image: Image) -> Row:
    """Return the row of cp_gather_cache, with entries of 16-bit numbers."""
    memory, rng = RowBuilder(), generator(41)
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
