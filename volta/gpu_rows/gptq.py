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
    Memory,
    beyond,
    ceil_div,
    generator,
    i32,
    launch,
    random_halves,
    truth,
)

SOURCE = "csrc/quantization/gptq/q_gemm.cu"
ROWS = (1, 2, 3, 4, 5, 8, 13, 24, 33, 50, 64)
"""Rows of a GPTQ product: one kernel for each count up to 8, then eights with a rest."""
LIMIT = {4: 50, 8: 24}
"""More rows than these vLLM gives to cuBLAS (MAX_Q_GEMM_ROWS, MAX_Q_GEMM_ROWS_8BIT), after unpacking the weights."""


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


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of gptq_shuffle and gptq_gemm."""
    image = images[SOURCE]
    for bits in (4, 8):
        # 416 inputs end within a block of 128, 648 outputs within one of 512; a group is shorter than a block.
        some = layer(generator(bits), 416, 648, bits, 32)
        mixed = layer(generator(bits, 1), 416, 648, bits, 32, act_order=True)
        for count in ROWS:
            a = _inputs(count, bits, 2, count)
            if count <= LIMIT[bits]:
                yield _product(image, f"gptq_gemm bits={bits} rows={count}", some, a)
        yield _product(image, f"gptq_gemm bits={bits} rows=13 act-order", mixed, _inputs(13, bits, 3))
        yield _product(image, f"gptq_gemm bits={bits} rows=5 v2 zeros", some, _inputs(5, bits, 4), v2=True)
        for outlier in (8192.0, LARGEST):
            for count in (1, 8):
                a = _inputs(count, bits, 5)
                a[0, [59, 208]] = outlier, -outlier  # as a model's first token has them (vllm#10656)
                yield _product(image, f"gptq_gemm bits={bits} rows={count} outlier={outlier:g}", some, a)
        for count in (3, 8):
            name = f"gptq_gemm bits={bits} rows={count} act-order without exllama"
            yield _alternative(image, name, mixed, _inputs(count, bits, 6))
        yield _unpacked(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS", some)
        yield _unpacked(image, f"gptq_gemm bits={bits} rows=64 weights for cuBLAS act-order", mixed)


def _inputs(rows: int, *seed: int) -> NDArray[np.float16]:
    return random_halves(generator(*seed), rows, 416)


def _shuffled(image: Image, memory: Memory, some: Layer) -> tuple[list[Launch], Pointer, Pointer | Number]:
    """gptq_shuffle (shuffle_exllama_weight): the launches, the weights as they leave them, the order of the inputs."""
    bits, (inputs, outputs) = some.bits, some.values.shape
    words, order = memory.put(columns(some)), some.order
    permutation: Pointer | Number = NULL
    launches = []
    if order is not None:
        permutation, raw = memory.put(order), words
        words = memory.fresh(inputs * outputs * bits // 8)  # which vLLM copies over the first and goes on there
        grid = (ceil_div(outputs, 32), inputs // 32 * bits)
        name = f"make_sequential_{bits}bit_kernel"
        launches.append(launch(image, name, grid, (32,), [raw, words, permutation, i32(outputs)]))
    arguments: Arguments = [words, i32(inputs), i32(outputs)]
    launches.append(launch(image, f"shuffle_{bits}bit_kernel", (ceil_div(outputs, 32),), (32,), arguments))
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
        grid = ceil_div(outputs, 512), ceil_div(height, each), ceil_div(inputs, 128)
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
    grid = ceil_div(outputs, 128), ceil_div(count, 8), ceil_div(inputs, 128)
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
    grid = ceil_div(outputs, 512), ceil_div(inputs, 128)
    launches.append(launch(image, f"reconstruct_exllama_{bits}bit_kernel", grid, (128,), arguments))
    # The value less its zero is exact, and its product with the scale is rounded once: there is one right answer.
    memory.expect(result, some.weights.astype(np.float16), "equal")
    return memory.row(name, launches, 0.0)
