"""Rows of reshape_and_cache, reshape_and_cache_flash and cp_gather_cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import Array, Image, Pointer, Row, fresh
from volta.gpu_rows.builder import (
    Arguments,
    Memory,
    beyond,
    generator,
    i32,
    i64,
    launch,
    random_halves,
)

SOURCE = "csrc/cache_kernels.cu"
SCALES = 1.0, 0.5
"""Of keys and values in an fp8 cache: powers of two, so that dividing is exact."""


def e5m2(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The nearest numbers of e5m2, the even one of two, and never infinite (__NV_SATFINITE)."""
    x = values.astype(np.float64)
    step = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 2)
    near = np.clip(np.rint(x / step) * step, -57344, 57344).astype(np.float16)
    return np.asarray(near.view(np.uint16) >> 8, np.uint8)


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of the kernels that write to the KV cache or read from it."""
    image = images[SOURCE]
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
        rng, tokens = generator(40, heads, block), 11
        whole = random_halves(rng, tokens, 3 * heads * size_) * np.float16(3)
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
    memory, rng = Memory(), generator(41)
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
