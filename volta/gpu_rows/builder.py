"""Build one row of CUDA kernels: its memory, its launches, and the expected contents of memory afterwards.

Each array lies between two guards of NaN. The guards must be unchanged after the launches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from volta.gpu.rows import Array, Image, Launch, Number, Pointer, Result, Row, fresh

HALF = 2.0**-11
"""The largest relative error of one rounding to float16."""
SINGLE = 2.0**-24
"""The largest relative error of one rounding to float32."""
Arguments = list[Pointer | Number]
GUARD = 256
"""Bytes of the guard before and after each array; cudaMalloc aligns to the same number."""
LARGEST = 65504.0
"""The largest finite float16."""
SIZES = {"i32": "32", "u32": "32", "f32": "32", "i64": "64", "u64": "64", "f64": "64", "f16": "16", "bool": "8"}
"""Bits of each kind of kernel parameter, as text as in PTX."""


_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)")


@dataclass
class RowBuilder:
    """The buffers and expected results of a row that is being built."""

    buffers: list[Array] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def put(self, values: Array, guard: int = GUARD) -> Pointer:
        """Add a buffer with an array between guards; return the array's address."""
        nan = fresh(guard)
        self.buffers.append(np.concatenate([nan, _bytes(values), nan]))
        return Pointer(len(self.buffers) - 1, guard)

    def rows(self, values: Array) -> Pointer:
        """Add a buffer that is compared row by row: its guards are whole rows."""
        return self.put(values, int(np.lcm(values.shape[-1] * values.itemsize, GUARD)))

    def fresh(self, size: int) -> Pointer:
        """Add a buffer of ``size`` bytes that a kernel must write."""
        return self.put(fresh(size))

    def expect(self, at: Pointer, right: Array, measure: str, dtype: str = "<f2") -> None:
        """Add an expected result: the array at an address, with unchanged guards.

        With ``measure="equal"`` the array has the type of the memory. Otherwise NaN marks places that must stay NaN.
        """
        before = self.buffers[at.buffer]
        if measure == "equal":
            kind, inner, guard = "|u1", _bytes(right), fresh(at.offset)
        else:
            kind = dtype
            # For float16, a float32 reference is enough: its error is a fraction of the bound.
            inner = right.astype(np.float32 if dtype == "<f2" else np.float64)
            inner = inner.reshape(-1, right.shape[-1]) if measure == "row" else inner.reshape(-1)
            guard = np.full(at.offset // np.dtype(kind).itemsize, np.nan, inner.dtype)
            guard = guard.reshape(-1, *inner.shape[1:])
        whole = np.concatenate([guard, inner, guard])
        if whole.size * np.dtype(kind).itemsize != before.nbytes:
            raise ValueError(f"an array of shape {right.shape} does not fit buffer {at.buffer}")
        self.results.append(Result(at.buffer, whole, kind, measure=measure))

    def row(self, name: str, launches: Sequence[Launch], bound: float) -> Row:
        """Return the row."""
        kernels = ", ".join(dict.fromkeys(_function_name(launch.symbol) for launch in launches))
        return Row(name, kernels, self.buffers, list(launches), self.results, bound)


def i32(value: int) -> Number:
    """Return an ``int`` argument."""
    return Number("i32", int(value))


def i64(value: int) -> Number:
    """Return an ``int64_t`` or ``size_t`` argument."""
    return Number("i64", int(value))


def u16(value: int) -> Number:
    """Return a ``uint16_t`` argument, as the float16 with the same bits, because rows have no such kind.

    Raises:
        ValueError: the bits are no finite float16: the value is above 31743.
    """
    if not 0 <= value < 0x7C00:
        raise ValueError(f"{value} has no finite float16 with the same bits")
    return Number("f16", float(np.uint16(value).view(np.float16)))


def f32(value: float) -> Number:
    """Return a ``float`` argument."""
    return Number("f32", float(value))


def boolean(value: bool) -> Number:
    """Return a ``bool`` argument."""
    return Number("bool", bool(value))


def beyond(at: Pointer, size: int) -> Pointer:
    """Return the address ``size`` bytes after ``at``."""
    return Pointer(at.buffer, at.offset + size)


def launch(
    image: Image,
    pattern: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Arguments,
    shared: int = 0,
) -> Launch:
    """Return a launch of the kernel whose mangled name matches ``pattern``.

    Raises:
        ValueError: no kernel or several match, or the kernel has other parameters.
    """
    known = parameters(image.ptx)
    names = [name for name in known if re.search(pattern, name)]
    if len(names) != 1:
        raise ValueError(f"{len(names)} kernels match {pattern}, expected 1: {', '.join(names[:3])}")
    sizes = [size(argument) for argument in arguments]
    declared = known[names[0]]
    if sizes != [bits for _, bits in declared]:
        raise ValueError(f"{names[0]} has parameters {declared}, not of {sizes} bits")
    return Launch(image, names[0], _three(grid), _three(block), list(arguments), shared)


@functools.lru_cache(maxsize=32)
def parameters(ptx: str) -> dict[str, list[tuple[str, str]]]:
    """Return the parameters of each kernel in a PTX: the letter of the type (``u``, ``f``) and its bits."""
    return {name: _PARAMETER.findall(text) for name, text in _ENTRY.findall(ptx)}


def size(argument: Pointer | Number) -> str:
    """Return the bits of an argument, as text as in PTX."""
    return "64" if isinstance(argument, Pointer) else SIZES[argument.kind]


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _three(counts: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*counts, 1, 1)[:3]
    return int(x), int(y), int(z)


def _function_name(symbol: str) -> str:
    """Return the function's name from a mangled name: the last of the nested names."""
    at, name = 2, symbol
    at += symbol.startswith("_ZN")
    while match := re.match(r"\d+", symbol[at:]):
        begin = at + match.end()
        name = symbol[begin : begin + int(match[0])]
        at = begin + int(match[0])
    return name


def ceil_div(count: int, step: int) -> int:
    """Return ``count / step``, rounded up."""
    return -(-count // step)


def generator(*seed: int) -> np.random.Generator:
    """Return a random generator with this seed."""
    return np.random.default_rng([0x70, *seed])


def random_halves(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    """Return normally distributed float16 numbers."""
    return rng.standard_normal(shape).astype(np.float16)
