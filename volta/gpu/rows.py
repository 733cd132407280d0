"""Define a row: kernel launches, the memory that they use, and its expected contents; needs only numpy.

A row is made on a machine without a GPU and run on a machine with one. Rows are stored in a zip archive:
``rows.json``, an ``.npy`` file for each array, and each kernel's code for 7.0 as PTX and as cubin.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KINDS = {"i32": np.int32, "i64": np.int64, "u32": np.uint32, "u64": np.uint64, "f32": np.float32, "f64": np.float64,
         "f16": np.float16, "bool": np.bool_}  # fmt: skip
"""The kinds of number arguments, with their numpy types."""
FRESH = 0xFF
"""Each byte of uninitialized memory: NaN in float16, float32 and both 8-bit float types."""


@dataclass(frozen=True)
class Image:
    """A kernel module for 7.0."""

    ptx: str
    """The PTX, which the driver of every newer card can compile."""
    cubin: bytes = b""
    """The binary that a card of 7.0 runs."""

    @property
    def name(self) -> str:
        """A digest of PTX and cubin."""
        return hashlib.sha256(self.ptx.encode() + self.cubin).hexdigest()[:16]


@dataclass(frozen=True)
class Pointer:
    """An address in a buffer of the row."""

    buffer: int
    offset: int = 0
    """Bytes."""


@dataclass(frozen=True)
class Number:
    """A number argument of a kind in :data:`KINDS`."""

    kind: str
    value: float | int


NULL = Number("u64", 0)
"""The null pointer."""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel."""

    image: Image
    symbol: str
    """The kernel's mangled name."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: Sequence[Pointer | Number]
    shared: int = 0
    """Bytes of dynamic shared memory."""


@dataclass(frozen=True)
class Result:
    """The expected contents of a part of a buffer after all launches of a row."""

    buffer: int
    right: Array
    """The expected numbers: computed in float64, stored as float64 or float32; of the memory's own type for
    ``measure="equal"``."""
    dtype: str = "<f2"
    """The type in memory: numpy's name, or ``e5m2``."""
    offset: int = 0
    """Bytes."""
    strides: tuple[int, ...] | None = None
    """Bytes; ``None`` if contiguous."""
    parts: int = 0
    """If not 0, memory has a first axis of this length, over which it is summed before the comparison."""
    measure: str = "row"
    """``row``: the largest relative error of a row (the last axis) in the 2-norm. ``each``: the largest error of a
    number, relative to it or to the smallest normal float16. ``equal``: 0 if all are equal, else infinite. Where
    ``right`` is NaN, memory must be NaN: no kernel may write there."""


@dataclass(frozen=True)
class Row:
    """One check: fill the buffers, launch the kernels in order, compare the results."""

    name: str
    kernels: str
    """The kernels' names in the source."""
    buffers: Sequence[Array]
    """The contents of memory before the first launch. An array of :data:`FRESH` bytes needs no space in the bundle."""
    launches: Sequence[Launch]
    results: Sequence[Result]
    bound: float
    """The largest relative error that passes."""


def fresh(size: int) -> Array:
    """Return ``size`` bytes of :data:`FRESH`: memory that a kernel must write."""
    return np.full(size, FRESH, np.uint8)


def error(result: Result, memory: bytes) -> float:
    """Return the error of a buffer's bytes, by ``result.measure``; infinite if a number is NaN."""
    actual = _numbers(result, memory)
    if result.measure == "equal":
        return 0.0 if actual.tobytes() == np.ascontiguousarray(result.right).tobytes() else np.inf
    actual, right = actual.astype(np.float64), result.right.astype(np.float64)
    actual = actual.sum(0) if result.parts else actual
    untouched = np.isnan(right)
    if not np.isnan(actual[untouched]).all():
        return np.inf
    with np.errstate(all="ignore"):
        actual, right = (np.where(untouched, 0, numbers) for numbers in (actual, right))
        if result.measure == "row":
            norm = np.linalg.norm(right, axis=-1)
            off = np.linalg.norm(actual - right, axis=-1) / np.where(norm == 0, 1, norm)
        else:
            off = np.where(actual == right, 0, np.abs(actual - right)) / np.maximum(np.abs(right), 2.0**-14)
    return float(np.inf) if np.isnan(off).any() else float(off.max(initial=0))


def _numbers(result: Result, memory: bytes) -> Array:
    kind = np.uint8 if result.dtype == "e5m2" else np.dtype(result.dtype)
    flat = np.frombuffer(memory, np.uint8)[result.offset :]
    shape = (result.parts, *result.right.shape) if result.parts else result.right.shape
    actual: Array = np.ndarray(shape, kind, flat, strides=result.strides)
    if result.dtype == "e5m2" and result.measure != "equal":
        return (actual.astype(np.uint16) << 8).view(np.float16)
    return actual


@dataclass(frozen=True)
class Bundle:
    """The rows of an archive; each is read when it is needed."""

    archive: zipfile.ZipFile
    listed: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Any) -> Bundle:
        """Open an archive that :func:`write` wrote.

        Raises:
            OSError, zipfile.BadZipFile, KeyError: the file cannot be read or is no bundle.
        """
        archive = zipfile.ZipFile(path)
        return cls(archive, json.loads(archive.read("rows.json")))

    def row(self, number: int) -> Row:
        """Read a row by its number."""
        record = self.listed[number]
        launches = [
            Launch(
                self.image(launch["image"]), launch["symbol"], tuple(launch["grid"]), tuple(launch["block"]),
                [Pointer(*arg[1:]) if arg[0] == "pointer" else Number(*arg) for arg in launch["arguments"]],
                launch["shared"],
            )
            for launch in record["launches"]
        ]  # fmt: skip
        results = [
            Result(
                **{
                    **result,
                    "right": self.array(result["right"]),
                    "strides": result["strides"] and tuple(result["strides"]),
                }
            )
            for result in record["results"]
        ]
        buffers = [fresh(entry) if isinstance(entry, int) else self.array(entry) for entry in record["buffers"]]
        return Row(record["name"], record["kernels"], buffers, launches, results, record["bound"])

    def image(self, name: str) -> Image:
        """Read a kernel module by its name."""
        return Image(self.archive.read(f"images/{name}.ptx").decode(), self.archive.read(f"images/{name}.cubin"))

    def array(self, name: str) -> Array:
        """Read an array by its name."""
        values: Array = np.load(io.BytesIO(self.archive.read(f"arrays/{name}.npy")), allow_pickle=False)
        return values


def write(rows: Iterable[Row], archive: zipfile.ZipFile) -> None:
    """Write rows to an archive, each array and each kernel once."""
    written: set[str] = set()
    listed = []

    def add(name: str, data: bytes) -> None:
        if name not in written:
            written.add(name)
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)

    def array(values: Array) -> str:
        sink = io.BytesIO()
        np.save(sink, np.ascontiguousarray(values), allow_pickle=False)
        name = hashlib.sha256(sink.getvalue()).hexdigest()[:16]
        add(f"arrays/{name}.npy", sink.getvalue())
        return name

    def argument(value: Pointer | Number) -> list[Any]:
        if isinstance(value, Pointer):
            return ["pointer", value.buffer, value.offset]
        return [value.kind, value.value]

    for row in rows:
        for launch in row.launches:
            add(f"images/{launch.image.name}.ptx", launch.image.ptx.encode())
            add(f"images/{launch.image.name}.cubin", launch.image.cubin)
        listed.append({
            "name": row.name, "kernels": row.kernels, "bound": row.bound,
            "buffers": [
                buffer.nbytes if buffer.dtype == np.uint8 and (buffer == FRESH).all() else array(buffer)
                for buffer in row.buffers
            ],
            "launches": [
                {
                    "image": launch.image.name, "symbol": launch.symbol, "grid": launch.grid, "block": launch.block,
                    "shared": launch.shared, "arguments": [argument(value) for value in launch.arguments],
                }
                for launch in row.launches
            ],
            "results": [{**vars(result), "right": array(result.right)} for result in row.results],
        })  # fmt: skip
    add("rows.json", json.dumps(listed, indent=1).encode())
