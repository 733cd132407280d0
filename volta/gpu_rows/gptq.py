"""Rows of GPTQ: gptq_shuffle and gptq_gemm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import NULL, Image, Launch, Number, Pointer, Row
from volta.gpu_rows.builder import (
    HALF,
    LARGEST,
    Arguments,
    RowBuilder,
    beyond,
    boolean,
    ceil_div,
    generator,
    i32,
    launch,
    random_halves,
)

SOURCE = "csrc/quantization/gptq/q_gemm.cu"
ROWS = (1, 2, 3, 4, 5, 8, 13, 24, 33, 50, 64)
"""The numbers of rows of a GPTQ product. There is a kernel for each number up to 8; more rows are split into eights."""
LIMIT = {4: 50, 8: 24}
"""With more rows vLLM unpacks the weights and calls cuBLAS (MAX_Q_GEMM_ROWS, MAX_Q_GEMM_ROWS_8BIT)."""


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer, as in a checkpoint."""

    values: NDArray[np.int64]
    """The quantized weights: inputs x outputs, 0 to 2^bits - 1."""
    zeros: NDArray[np.int64]
    """The zero points, which are subtracted from the values: groups x outputs."""
    scales: NDArray[np.float16]
    """The scales: groups x outputs."""
    bits: int
    groups: NDArray[np.int64]
    """The group of each input."""

    @property
    def exact(self) -> NDArray[np.float64]:
        """The exact weights: inputs x outputs."""
        return (self.values - self.zeros[self.groups]) * self.scales.astype(np.float64)[self.groups]

    @property
    def order(self) -> NDArray[np.int32] | None:
        """The order in which vLLM sorts the inputs by group after loading; ``None`` if they are sorted already."""
        if (np.diff(self.groups) >= 0).all():
            return None
        return np.argsort(self.groups, kind="stable").astype(np.int32)


def layer(rng: np.random.Generator, inputs: int, outputs: int, bits: int, group: int, act_order: bool = False) -> Layer:
    """Return a random layer; with ``act_order`` the groups of its inputs are in random order."""
    count = inputs // group
    groups = np.arange(inputs) // group
    return Layer(
        values=rng.integers(0, 1 << bits, (inputs, outputs)),
        zeros=rng.integers(1, 1 << bits, (count, outputs)),  # the range that both checkpoint formats can store
        scales=rng.uniform(0.5, 1.5, (count, outputs)).astype(np.float16) / np.float16(8 << bits),
        bits=bits,
        groups=rng.permutation(groups) if act_order else groups,
    )


def packed(values: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Pack rows of small numbers into 32-bit words, the first number in the lowest bits."""
    per = 32 // bits
    wide = values.reshape(values.shape[0], -1, per).astype(np.uint64) << (np.arange(per, dtype=np.uint64) * bits)
    return np.asarray(wide.sum(axis=2), np.uint32)


def columns(weights: Layer) -> NDArray[np.uint32]:
    """Return the weights as a checkpoint stores them: packed along the inputs."""
    return np.ascontiguousarray(packed(weights.values.T, weights.bits).T)


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of gptq_shuffle and gptq_gemm."""
    image = images[SOURCE]
    for bits in (4, 8):
        # 416 and 648 are no multiples of the blocks of 128 inputs and 512 outputs; a group is shorter than a block.
        plain = layer(generator(bits), 416, 648, bits, 32)
        act_order = layer(generator(bits, 1), 416, 648, bits, 32, act_order=True)
        for count in ROWS:
            a = _inputs(count, bits, 2, count)
            if count <= LIMIT[bits]:
                yield _product(image, f"gptq_gemm bits={bits} rows={count}", plain, a)
        yield _product(image, f"gptq_gemm bits={bits} rows=13 act-order", act_order, _inputs(13, bits, 3))
        yield _product(image, f"gptq_gemm bits={bits} rows=5 v2 zeros", plain, _inputs(5, bits, 4), v2=True)
        for outlier in (8192.0, LARGEST):
            for count in (1, 8):
                a = _inputs(count, bits, 5)
                a[0, [59, 208]] = outlier, -outlier  # as in the first token of a model (vllm#10656)
                yield _product(image, f"gptq_gemm bits={bits} rows={count} outlier={outlier:g}", plain, a)
        for count in (3, 8):
            name = f"gptq_gemm bits={bits} rows={count} act-order without exllama"
            yield _product_without_exllama(image, name, act_order, _inputs(count, bits, 6))
        yield _unpacking(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS", plain)
        yield _unpacking(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS act-order", act_order)


def _inputs(rows: int, *seed: int) -> NDArray[np.float16]:
    return random_halves(generator(*seed), rows, 416)


def _shuffled(image: Image, memory: RowBuilder, weights: Layer) -> tuple[list[Launch], Pointer, Pointer | Number]:
    """Return gptq_shuffle (shuffle_exllama_weight): the launches, the shuffled weights, the order of the inputs."""
    bits, (inputs, outputs) = weights.bits, weights.values.shape
    words, order = memory.put(columns(weights)), weights.order
    permutation: Pointer | Number = NULL
    launches = []
    if order is not None:
        permutation, raw = memory.put(order), words
        words = memory.fresh(inputs * outputs * bits // 8)  # vLLM copies this over the first buffer
        grid = (ceil_div(outputs, 32), inputs // 32 * bits)
        name = f"make_sequential_{bits}bit_kernel"
        launches.append(launch(image, name, grid, (32,), [raw, words, permutation, i32(outputs)]))
    arguments: Arguments = [words, i32(inputs), i32(outputs)]
    launches.append(launch(image, f"shuffle_{bits}bit_kernel", (ceil_div(outputs, 32),), (32,), arguments))
    return launches, words, permutation


def _product(image: Image, name: str, weights: Layer, a: NDArray[np.float16], v2: bool = False) -> Row:
    """Return the row of gptq_gemm, launched as in gemm_half_q_half_cuda with ``use_exllama``."""
    memory, bits = RowBuilder(), weights.bits
    launches, words, order = _shuffled(image, memory, weights)
    (count, inputs), outputs = a.shape, weights.values.shape[1]
    scales, zeros = memory.put(weights.scales), memory.put(packed(weights.zeros - (not v2), bits))
    left = memory.put(a)
    # Zeros, as after vLLM's cudaMemsetAsync: every block along the inputs adds to the result.
    result = memory.rows(np.zeros((count, outputs), np.float16))

    def part(begin: int, height: int, each: int) -> Launch:
        grid = ceil_div(outputs, 512), ceil_div(height, each), ceil_div(inputs, 128)
        return launch(
            image, f"gemm_half_q_half_gptq_{bits}bit_kernelILb1ELi{each}EE", grid, (128,),
            [beyond(left, 2 * begin * inputs), words, zeros, scales, beyond(result, 2 * begin * outputs), i32(height),
             i32(outputs), i32(inputs), i32(len(weights.scales)), boolean(v2), order],
        )  # fmt: skip

    whole = count // 8 * 8
    launches += [part(0, whole, 8)] if whole else []
    launches += [part(whole, count - whole, count - whole)] if count > whole else []
    memory.expect(result, a.astype(np.float64) @ weights.exact, "row")
    # The kernels sum in float16: four products (4 bits) or a block of 128 inputs (8 bits), then four blocks. Over a row
    # of 648 the errors are nearly independent. The same source run on the CPU has errors of 1.2 and 1.7 roundings.
    return memory.row(name, launches, {4: 3, 8: 4}[bits] * HALF)


def _product_without_exllama(image: Image, name: str, weights: Layer, a: NDArray[np.float16]) -> Row:
    """Return the row of gptq_gemm without ``use_exllama`` (gemm_half_q_half_alt), for split layers with act-order."""
    memory, bits = RowBuilder(), weights.bits
    (count, inputs), outputs = a.shape, weights.values.shape[1]
    words, zeros = memory.put(columns(weights)), memory.put(packed(weights.zeros - 1, bits))
    result = memory.rows(np.zeros((count, outputs), np.float16))
    arguments: Arguments = [
        memory.put(a), words, result, memory.put(weights.scales), zeros, memory.put(weights.groups.astype(np.int32)),
        i32(count), i32(inputs // 32 * bits), i32(outputs), boolean(False),
    ]  # fmt: skip
    grid = ceil_div(outputs, 128), ceil_div(count, 8), ceil_div(inputs, 128)
    memory.expect(result, a.astype(np.float64) @ weights.exact, "row")
    # Scaled weights are rounded twice. The first rounding is of scale times zero point, which is up to 2^bits/2 times
    # as large as an average weight. A block is summed in float16 with 16 (4 bits) or 32 (8 bits) additions. The same
    # source run on the CPU has an error of 2.3 roundings.
    kernel = launch(image, f"gemm_half_q_half_alt_{bits}bit_kernel", grid, (128,), arguments)
    return memory.row(name, [kernel], 5 * HALF)


def _unpacking(image: Image, name: str, weights: Layer) -> Row:
    """Return the row of reconstruct_exllama, which unpacks the weights for cuBLAS."""
    memory, bits = RowBuilder(), weights.bits
    launches, words, order = _shuffled(image, memory, weights)
    inputs, outputs = weights.values.shape
    zeros, scales = memory.put(packed(weights.zeros - 1, bits)), memory.put(weights.scales)
    result = memory.fresh(2 * inputs * outputs)
    arguments: Arguments = [
        words, order, zeros, scales, i32(inputs), i32(outputs), i32(len(weights.scales)), boolean(False), result,
    ]  # fmt: skip
    grid = ceil_div(outputs, 512), ceil_div(inputs, 128)
    launches.append(launch(image, f"reconstruct_exllama_{bits}bit_kernel", grid, (128,), arguments))
    # Value minus zero point is exact and its product with the scale is rounded once, so the bits must be equal.
    memory.expect(result, weights.exact.astype(np.float16), "equal")
    return memory.row(name, launches, 0.0)
