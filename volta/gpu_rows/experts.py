"""Rows of moe_align_block_size, moe_sum and moe_wna16_gemm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import NULL, Image, Launch, Number, Pointer, Row, fresh
from volta.gpu_rows.builder import (
    HALF,
    SINGLE,
    Arguments,
    RowBuilder,
    boolean,
    ceil_div,
    generator,
    i32,
    i64,
    launch,
    random_halves,
    u16,
)
from volta.gpu_rows.gptq import packed

ALIGN = "csrc/moe/moe_align_sum_kernels.cu"
WNA16 = "csrc/moe/moe_wna16.cu"


@dataclass(frozen=True)
class _Alignment:
    """The results of moe_align_block_size and its launches."""

    launches: list[Launch]
    ids: Pointer
    experts: Pointer
    total: Pointer
    room: int
    """The number of ids that the buffer can hold."""


def _aligned(
    image: Image, memory: RowBuilder, chosen: NDArray[np.int32], experts: int, block: int, *, order: bool
) -> _Alignment:
    """Return moe_align_block_size and add its expected results.

    With ``order`` the order within an expert is compared, too, if it is deterministic.
    """
    flat = chosen.reshape(-1)
    count, room = flat.size, flat.size + experts * (block - 1)
    topk_ids, ids = memory.put(flat), memory.fresh(4 * room)
    owners, total = memory.fresh(4 * ceil_div(room, block)), memory.fresh(4)
    small = count < 1024 and experts <= 64
    if small:
        threads = max(experts, 32)
        shared = ((threads + 1) * experts + experts + 1) * 4
        arguments: Arguments = [topk_ids, ids, owners, total, i32(experts), i32(block), i64(count), i32(room)]
        pattern = "moe_align_block_size_small_batch_expert_kernelIiEE"
        launches = [launch(image, pattern, (1,), (threads,), arguments, shared)]
    else:
        padded, threads = ceil_div(experts, 32) * 32, 256
        sums = memory.fresh(4 * (experts + 1))
        arguments = [
            topk_ids, ids, owners, total, *map(i32, (experts, padded, 32, block)), i64(count), sums, i32(room),
        ]  # fmt: skip
        sorting: Arguments = [topk_ids, ids, sums, i64(count), i32(experts)]
        launches = [
            launch(image, "27moe_align_block_size_kernelIiEE", (1,), (1024,), arguments, padded * 4),
            launch(image, "count_and_sort_expert_tokens_kernelIiEE", (ceil_div(count, threads),), (threads,), sorting),
        ]
    right, right_owners = np.full(room, count, np.int32), np.zeros(ceil_div(room, block), np.int32)
    at = 0
    for expert in range(experts):
        members = np.flatnonzero(flat == expert)
        # A thread handles the ids at a stride of ``threads``, and the threads run in order.
        members = members[np.lexsort((members, members % threads))]
        right_owners[at // block : at // block + ceil_div(members.size, block)] = expert
        right[at : at + members.size] = members
        at += ceil_div(members.size, block) * block
    memory.expect(owners, right_owners, "equal")
    memory.expect(total, np.array([at], np.int32), "equal")
    if order and (small or np.bincount(flat).max() <= 1):
        memory.expect(ids, right, "equal")
    return _Alignment(launches, ids, owners, total, room)


def _choose(rng: np.random.Generator, tokens: int, experts: int, top: int) -> NDArray[np.int32]:
    """Return the experts of each token.

    If possible each expert is chosen once, so that the order is unique. Otherwise the first experts are chosen more
    often.
    """
    if tokens * top == experts:
        return rng.permutation(np.arange(experts, dtype=np.int32)).reshape(tokens, top)
    preference = rng.standard_normal((tokens, experts)) - np.arange(experts) / experts
    return np.argsort(-preference, axis=1)[:, :top].astype(np.int32)


def align_rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of moe_align_block_size and moe_sum."""
    image = images[ALIGN]
    shapes = (1, 8, 2, 16), (37, 8, 2, 16), (100, 64, 6, 32), (64, 512, 8, 16), (700, 8, 2, 64)
    for tokens, experts, top, block in shapes:
        memory = RowBuilder()
        chosen = _choose(generator(60, tokens), tokens, experts, top)
        alignment = _aligned(image, memory, chosen, experts, block, order=True)
        name = f"moe_align_block_size tokens={tokens} experts={experts} top={top} block={block}"
        yield memory.row(name, alignment.launches, 0.0)
    for kind in (np.float16, np.float32):
        for top in (2, 3, 4) if kind is np.float16 else (2,):
            yield _summed(image, kind, top)


def _summed(image: Image, kind: type[np.floating], top: int) -> Row:
    """Return the row of moe_sum."""
    memory, tokens, width = RowBuilder(), 9, 1100
    x = generator(61, top).standard_normal((tokens, top, width)).astype(kind)
    result = memory.rows(fresh(tokens * width * x.itemsize).view(kind).reshape(tokens, width))
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    arguments: Arguments = [result, memory.put(x), i32(width)]
    kernel = launch(image, f"moe_sum_kernelI{letter}Li{top}EE", (tokens,), (min(width, 1024),), arguments)
    memory.expect(result, x.astype(np.float64).sum(axis=1), "row", x.dtype.str)
    # Each addition but the first is rounded, and on average a partial sum is no larger than the total.
    name = f"moe_sum {np.dtype(kind).name} top={top}"
    return memory.row(name, [kernel], (top - 1) * (HALF if kind is np.float16 else SINGLE))


def wna16_rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of moe_wna16_gemm."""
    for bits in (4, 8):
        for group, tokens, zeros, weighted in ((128, 1, False, False), (64, 37, True, True), (32, 5, True, False)):
            yield _expert(images, bits, group, tokens, zeros=zeros, weighted=weighted)
        # With this many tokens the sorting has two kernels and no fixed order; the product does not depend on it.
        yield _expert(images, bits, 64, 520, zeros=True, weighted=True)


def _expert(images: Mapping[str, Image], bits: int, group: int, tokens: int, *, zeros: bool, weighted: bool) -> Row:
    """Return the row of moe_align_block_size and moe_wna16_gemm, with the blocks of get_moe_wna16_block_config."""
    memory, rng = RowBuilder(), generator(70, bits, group, tokens)
    inputs, outputs, experts, top, high, wide, deep = 256, 144, 8, 2, 16, 128, 128
    chosen = _choose(rng, tokens, experts, top)
    alignment = _aligned(images[ALIGN], memory, chosen, experts, high, order=False)
    values = rng.integers(0, 1 << bits, (experts, outputs, inputs))
    scales = (rng.uniform(0.5, 1.5, (experts, outputs, inputs // group)) / (8 << bits)).astype(np.float16)
    offsets = np.full(scales.shape, 1 << (bits - 1))
    if zeros:
        offsets = rng.integers(0, 1 << bits, scales.shape)
    weights = (values - offsets.repeat(group, axis=2)) * scales.astype(np.float64).repeat(group, axis=2)
    x = random_halves(rng, tokens, inputs)
    share = rng.uniform(0.1, 0.9, (tokens, top)).astype(np.float32)
    right = np.einsum("tk,tjnk->tjn", x.astype(np.float64), weights[chosen])
    right = right * share[..., None].astype(np.float64) if weighted else right
    words = packed(values.reshape(experts * outputs, inputs), bits)
    result = memory.rows(np.zeros((tokens * top, outputs), np.float16))  # as after vLLM's output.zero_()
    room = min(alignment.room, tokens * high * top) if tokens <= high else alignment.room
    grid = ceil_div(room, high), ceil_div(outputs, wide), ceil_div(inputs, deep)
    offset = memory.put(_packed_zeros(offsets, bits)) if zeros else NULL
    arguments: Arguments = [
        memory.put(x), result, memory.put(words), memory.put(scales), offset,
        memory.put(share) if weighted else NULL, alignment.ids, alignment.experts, alignment.total,
        u16(experts), u16(group), u16(top),
        *(Number("u32", each) for each in (tokens, outputs, inputs)), u16(high), u16(wide), u16(deep), boolean(zeros),
        boolean(weighted),
    ]  # fmt: skip
    pattern = f"moe_wna16_gemm_kernelI6__halfLi{bits}ELi{deep // group}EE"
    product = launch(images[WNA16], pattern, grid, (wide,), arguments, high * deep * 2)
    memory.expect(result, right, "row")
    name = f"moe_wna16_gemm bits={bits} group={group} tokens={tokens}{' zeros' if zeros else ''}"
    # The scaled weights are rounded, as are sums of four products (4 bits) or two (8 bits) and the sum of two blocks.
    # Over a row these errors are nearly independent.
    return memory.row(f"{name}{' weighted' if weighted else ''}", [*alignment.launches, product], 3 * HALF)


def _packed_zeros(offsets: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Return zero points as the kernel reads them: two outputs of 4 bits in a byte, the even one in the lower bits."""
    if bits == 8:
        return offsets.astype(np.uint8)
    return (offsets[:, ::2] | offsets[:, 1::2] << 4).astype(np.uint8)
