"""Rows of silu_and_mul, gelu_and_mul and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import Image, Row
from volta.gpu_rows.builder import (
    HALF,
    SINGLE,
    RowBuilder,
    generator,
    i32,
    launch,
)

SOURCE = "csrc/activation_kernels.cu"


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield the rows of silu_and_mul, mul_and_silu, gelu_and_mul and gelu_tanh_and_mul."""
    image = images[SOURCE]
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
    memory, item = RowBuilder(), np.dtype(kind).itemsize
    # At least -3, so that 1 + erf(x / sqrt(2)) does not cancel in float32.
    x = np.maximum(generator(30, tokens).normal(0, 2, (tokens, 2 * width)), -3).astype(kind)
    left, right = np.split(x.astype(np.float64), 2, axis=1)
    gate, other = (left, right) if first else (right, left)
    result = memory.fresh(tokens * width * item)
    letter = "N3c104HalfE" if kind is np.float16 else "f"
    # The function is a template argument, so its name is part of the kernel's name.
    pattern = rf"18act_and_mul_kernelI{letter}.*{kernel}.*Lb{int(first)}EE"
    kernel_launch = launch(image, pattern, (tokens,), (min(width, 1024),), [result, memory.put(x), i32(width)])
    memory.expect(result, ACTIVATIONS[kernel](gate) * other, "each", np.dtype(kind).str)
    # The function's result and the product are rounded, the result more coarsely below the smallest normal number.
    bound = 4 * HALF if kind is np.float16 else 16 * SINGLE
    return memory.row(f"{operation} {np.dtype(kind).name} tokens={tokens} width={width}", [kernel_launch], bound)


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the error function to 15 digits for numbers from -4 to 10, by its series about 0. numpy has none."""
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
"""The functions in float64, by their mangled names."""
