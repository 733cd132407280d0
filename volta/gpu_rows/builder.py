"""Build one row of CUDA kernels: its memory, its launches, and what must be in memory afterwards.

Each array lies between two guards that hold NaN; those beside what is written must be there afterwards.
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
"""The same of float32."""
Arguments = list[Pointer | Number]
GUARD = 256
"""Bytes before and behind each array; cudaMalloc aligns to as many."""
LARGEST = 65504.0
"""The largest float16."""
SIZES = {"i32": "32", "u32": "32", "f32": "32", "i64": "64", "u64": "64", "f64": "64", "f16": "16", "bool": "8"}
"""Bits of each kind of number as a parameter of a kernel."""


_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)")


@dataclass
class Memory:
    """The buffers of a row, while it is made."""

    buffers: list[Array] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def put(self, values: Array, guard: int = GUARD) -> Pointer:
        """Put an array between guards; gives its address."""
        beside = fresh(guard)
        self.buffers.append(np.concatenate([beside, _bytes(values), beside]))
        return Pointer(len(self.buffers) - 1, guard)

    def rows(self, values: Array) -> Pointer:
        """The same for rows that are compared one by one: the guards are whole rows too."""
        return self.put(values, int(np.lcm(values.shape[-1] * values.itemsize, GUARD)))

    def fresh(self, size: int) -> Pointer:
        """Room for what a kernel must write, of ``size`` bytes."""
        return self.put(fresh(size))

    def expect(self, at: Pointer, right: Array, measure: str, dtype: str = "<f2") -> None:
        """Say what the whole array at an address must be in the end; the guards must be as they were.

        For ``equal`` it is of the memory's own type; else NaN is where nobody may write.
        """
        before = self.buffers[at.buffer]
        if measure == "equal":
            kind, inner, guard = "|u1", _bytes(right), fresh(at.offset)
        else:
            kind = dtype
            # A float16 is compared with a float32, which is off by a fraction of what the bound allows.
            inner = right.astype(np.float32 if dtype == "<f2" else np.float64)
            inner = inner.reshape(-1, right.shape[-1]) if measure == "row" else inner.reshape(-1)
            guard = np.full(at.offset // np.dtype(kind).itemsize, np.nan, inner.dtype)
            guard = guard.reshape(-1, *inner.shape[1:])
        whole = np.concatenate([guard, inner, guard])
        if whole.size * np.dtype(kind).itemsize != before.nbytes:
            raise ValueError(f"{right.shape} is not what buffer {at.buffer} holds")
        self.results.append(Result(at.buffer, whole, kind, measure=measure))

    def row(self, name: str, launches: Sequence[Launch], bound: float) -> Row:
        """The finished row."""
        kernels = ", ".join(dict.fromkeys(_plain(one.symbol) for one in launches))
        return Row(name, kernels, self.buffers, list(launches), self.results, bound)


def i32(value: int) -> Number:
    """An ``int``."""
    return Number("i32", int(value))


def i64(value: int) -> Number:
    """An ``int64_t`` or ``size_t``."""
    return Number("i64", int(value))


def u16(value: int) -> Number:
    """A ``uint16_t``: rows know no such kind, but a float16 has as many bits, and up to 31743 they are a number."""
    if not 0 <= value < 0x7C00:
        raise ValueError(f"{value} does not fit")
    return Number("f16", float(np.uint16(value).view(np.float16)))


def f32(value: float) -> Number:
    """A ``float``."""
    return Number("f32", float(value))


def truth(value: bool) -> Number:
    """A ``bool``."""
    return Number("bool", bool(value))


def beyond(at: Pointer, size: int) -> Pointer:
    """The address ``size`` bytes behind another."""
    return Pointer(at.buffer, at.offset + size)


def launch(
    image: Image,
    pattern: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Arguments,
    shared: int = 0,
) -> Launch:
    """One launch of the one kernel whose mangled name holds ``pattern``.

    Raises:
        ValueError: there is not one, or it takes other arguments.
    """
    known = parameters(image.ptx)
    names = [name for name in known if re.search(pattern, name)]
    if len(names) != 1:
        raise ValueError(f"{len(names)} kernels are called {pattern}, not one: {', '.join(names[:3])}")
    given = [size(one) for one in arguments]
    asked = known[names[0]]
    if given != [bits for _, bits in asked]:
        raise ValueError(f"{names[0]} takes {asked}, not {given}")
    return Launch(image, names[0], _three(grid), _three(block), list(arguments), shared)


@functools.lru_cache(maxsize=32)
def parameters(ptx: str) -> dict[str, list[tuple[str, str]]]:
    """What each kernel of a PTX takes, in its order: the letter of each type (``u``, ``f``) and its bits."""
    return {name: _PARAMETER.findall(text) for name, text in _ENTRY.findall(ptx)}


def size(argument: Pointer | Number) -> str:
    """The bits of an argument, as PTX writes them."""
    return "64" if isinstance(argument, Pointer) else SIZES[argument.kind]


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _three(counts: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*counts, 1, 1)[:3]
    return int(x), int(y), int(z)


def _plain(symbol: str) -> str:
    """The function's own name in a mangled one: the last of its nested names."""
    at, found = 2, symbol
    at += symbol.startswith("_ZN")
    while match := re.match(r"\d+", symbol[at:]):
        begin = at + match.end()
        found = symbol[begin : begin + int(match[0])]
        at = begin + int(match[0])
    return found


def ceil_div(count: int, step: int) -> int:
    """How many steps hold ``count``."""
    return -(-count // step)


def generator(*seed: int) -> np.random.Generator:
    """Return a random generator with this seed."""
    return np.random.default_rng([0x70, *seed])


def random_halves(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    """Return normally distributed float16 numbers."""
    return rng.standard_normal(shape).astype(np.float16)
