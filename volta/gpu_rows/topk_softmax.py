"""Rows of topk_softmax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from volta.gpu.rows import NULL, Image, Row
from volta.gpu_rows.builder import (
    SINGLE,
    Arguments,
    RowBuilder,
    boolean,
    ceil_div,
    generator,
    i32,
    launch,
)

SOURCE = "csrc/moe/topk_softmax_kernels.cu"


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of topk_softmax."""
    for kind in (np.float32, np.float16):
        for experts, top, tokens in ((8, 2, 37), (64, 6, 37), (60, 4, 7)):
            yield _softmax(images[SOURCE], kind, experts, top, tokens, renormalize=experts != 64)


def _softmax(image: Image, kind: type[np.floating], experts: int, top: int, tokens: int, *, renormalize: bool) -> Row:
    """Return the row of topkGatingSoftmaxKernelLauncher: one kernel for a power of two experts, otherwise two."""
    memory, item = RowBuilder(), np.dtype(kind).itemsize
    # The numbers of a row differ, so that their order is unique.
    steps = np.linspace(-4, 4, experts).astype(kind)
    logits = generator(50, experts).permuted(np.tile(steps, (tokens, 1)), axis=1)
    weights = np.exp(logits.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = np.argsort(-weights, axis=1)[:, :top]
    right = np.take_along_axis(weights, chosen, axis=1)
    right = right / right.sum(axis=1, keepdims=True) if renormalize else right
    result, ids, places = (memory.fresh(4 * tokens * top) for _ in range(3))
    gates = memory.put(logits)
    letter = "f" if kind is np.float32 else "6__half"
    if experts & (experts - 1) == 0:
        loaded = min(16, item * experts)  # bytes of one load
        each = max(1, experts // (loaded // item * 32)) * (loaded // item)  # experts of one thread
        blocks = ceil_div(ceil_div(tokens, 32 * each // experts), 4)
        arguments: Arguments = [
            gates, NULL, result, i32(tokens), ids, places, i32(top), i32(0), i32(experts), boolean(renormalize),
        ]  # fmt: skip
        pattern = f"topkGatingSoftmaxILi{each}ELi{experts}ELi4ELi{loaded}ELi32Ei{letter}EE"
        launches = [launch(image, pattern, (blocks,), (32, 4), arguments)]
    else:
        between = memory.fresh(4 * tokens * experts)
        soft: Arguments = [gates, NULL, between, i32(experts)]
        arguments = [
            between, NULL, result, ids, places, *map(i32, (experts, top, 0, experts)), boolean(renormalize),
        ]  # fmt: skip
        launches = [
            launch(image, f"moeSoftmaxILi256E{letter}EE", (tokens,), (256,), soft),
            launch(image, "moeTopKILi256EiEE", (tokens,), (256,), arguments),
        ]
    memory.expect(result, right, "each", "<f4")
    memory.expect(ids, chosen.astype(np.int32), "equal")
    memory.expect(places, (np.arange(top) * tokens + np.arange(tokens)[:, None]).astype(np.int32), "equal")
    # expf has an error of four units, and its argument, a difference of up to 8, adds 8. The sum of all has the same
    # errors and a few of its own. A quotient and two products follow.
    return memory.row(f"topk_softmax {np.dtype(kind).name} experts={experts} top={top}", launches, 32 * SINGLE)
