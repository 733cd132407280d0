"""A row: launches of kernels, the memory that they work on, and what must be in it afterwards; numpy is all it needs.

A row is made on the machine that builds, without a GPU, and carried to one that has one. Rows are kept in a folder of
a zip archive: ``rows.json``, one ``.npy`` for each array, and each kernel's code, for 7.0, as PTX and as cubin.
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
"""How a number is handed to a kernel."""
FRESH = 0xFF
"""Every byte of memory that nothing was put into: NaN in float16, float32 and both types of 8 bits."""


@dataclass(frozen=True)
class Image:
    """One kernel module for 7.0."""

    ptx: str
    """What every later card's driver can compile."""
    cubin: bytes = b""
    """What a card of 7.0 runs as it is."""

    @property
    def name(self) -> str:
        """A digest of both."""
        return hashlib.sha256(self.ptx.encode() + self.cubin).hexdigest()[:16]


@dataclass(frozen=True)
class Pointer:
    """An address in a buffer of the row."""

    buffer: int
    offset: int = 0
    """Bytes."""


@dataclass(frozen=True)
class Number:
    """A number, and which of :data:`KINDS` it is."""

    kind: str
    value: float | int


NULL = Number("u64", 0)
"""The pointer to nothing."""


@dataclass(frozen=True)
class Launch:
    """One start of one kernel."""

    image: Image
    symbol: str
    """Its name in the code, mangled."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: Sequence[Pointer | Number]
    shared: int = 0
    """Bytes of dynamic shared memory."""


@dataclass(frozen=True)
class Result:
    """Part of a buffer, after all launches of a row, and what it should be."""

    buffer: int
    right: Array
    """What it should be: computed in float64 and kept as such or as float32, or of the very type of the memory for
    ``measure="equal"``."""
    dtype: str = "<f2"
    """The type in memory, as numpy names it, or ``e5m2``."""
    offset: int = 0
    """Bytes."""
    strides: tuple[int, ...] | None = None
    """Bytes; ``None`` where it lies without gaps."""
    parts: int = 0
    """If not 0: memory has an axis of so many parts before those of ``right``, to be added up."""
    measure: str = "row"
    """``row``: the largest relative error of a row (the last axis) in the 2-norm. ``each``: of a number, that of the
    smallest normal float16 for those below it. ``equal``: 0 if all are equal, else infinite. Where ``right`` is NaN,
    nobody may write: NaN must be there still."""


@dataclass(frozen=True)
class Row:
    """One check: buffers are filled, kernels launched in their order, results compared."""

    name: str
    kernels: str
    """The kernels' names as the source has them."""
    buffers: Sequence[Array]
    """What is in memory before the first launch. An array of :data:`FRESH` bytes takes no room in the bundle."""
    launches: Sequence[Launch]
    results: Sequence[Result]
    bound: float
    """The largest relative error that is right."""


def fresh(size: int) -> Array:
    """Memory that a kernel must write to: ``size`` bytes of :data:`FRESH`."""
    return np.full(size, FRESH, np.uint8)


def error(result: Result, memory: bytes) -> float:
    """What ``result.measure`` gives for a buffer's bytes; infinite where a number is missing."""
    made = _found(result, memory)
    if result.measure == "equal":
        return 0.0 if made.tobytes() == np.ascontiguousarray(result.right).tobytes() else np.inf
    made, right = made.astype(np.float64), result.right.astype(np.float64)
    made = made.sum(0) if result.parts else made
    untouched = np.isnan(right)
    if not np.isnan(made[untouched]).all():
        return np.inf
    with np.errstate(all="ignore"):
        made, right = (np.where(untouched, 0, one) for one in (made, right))
        if result.measure == "row":
            norm = np.linalg.norm(right, axis=-1)
            off = np.linalg.norm(made - right, axis=-1) / np.where(norm == 0, 1, norm)
        else:
            off = np.where(made == right, 0, np.abs(made - right)) / np.maximum(np.abs(right), 2.0**-14)
    return float(np.inf) if np.isnan(off).any() else float(off.max(initial=0))


def _found(result: Result, memory: bytes) -> Array:
    kind = np.uint8 if result.dtype == "e5m2" else np.dtype(result.dtype)
    flat = np.frombuffer(memory, np.uint8)[result.offset :]
    shape = (result.parts, *result.right.shape) if result.parts else result.right.shape
    made: Array = np.ndarray(shape, kind, flat, strides=result.strides)
    if result.dtype == "e5m2" and result.measure != "equal":
        return (made.astype(np.uint16) << 8).view(np.float16)
    return made


@dataclass(frozen=True)
class Bundle:
    """Rows as they are kept in an archive, without the rows themselves."""

    archive: zipfile.ZipFile
    listed: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Any) -> Bundle:
        """Open an archive that :func:`write` has written to.

        Raises:
            OSError, zipfile.BadZipFile, KeyError: there is none, or it is no bundle.
        """
        archive = zipfile.ZipFile(path)
        return cls(archive, json.loads(archive.read("rows.json")))

    def row(self, number: int) -> Row:
        """One row, with all that it holds."""
        said = self.listed[number]
        launches = [
            Launch(
                self.image(one["image"]), one["symbol"], tuple(one["grid"]), tuple(one["block"]),
                [Pointer(*arg[1:]) if arg[0] == "pointer" else Number(*arg) for arg in one["arguments"]], one["shared"],
            )
            for one in said["launches"]
        ]  # fmt: skip
        results = [
            Result(**{**one, "right": self.array(one["right"]), "strides": one["strides"] and tuple(one["strides"])})
            for one in said["results"]
        ]
        buffers = [fresh(one) if isinstance(one, int) else self.array(one) for one in said["buffers"]]
        return Row(said["name"], said["kernels"], buffers, launches, results, said["bound"])

    def image(self, name: str) -> Image:
        """A kernel module by its name."""
        return Image(self.archive.read(f"images/{name}.ptx").decode(), self.archive.read(f"images/{name}.cubin"))

    def array(self, name: str) -> Array:
        """An array by its name."""
        made: Array = np.load(io.BytesIO(self.archive.read(f"arrays/{name}.npy")), allow_pickle=False)
        return made


def write(rows: Iterable[Row], archive: zipfile.ZipFile) -> None:
    """Put rows into an archive, each array and each kernel once."""
    kept: set[str] = set()
    listed = []

    def keep(name: str, data: bytes) -> None:
        if name not in kept:
            kept.add(name)
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)

    def array(values: Array) -> str:
        sink = io.BytesIO()
        np.save(sink, np.ascontiguousarray(values), allow_pickle=False)
        name = hashlib.sha256(sink.getvalue()).hexdigest()[:16]
        keep(f"arrays/{name}.npy", sink.getvalue())
        return name

    def argument(one: Pointer | Number) -> list[Any]:
        if isinstance(one, Pointer):
            return ["pointer", one.buffer, one.offset]
        return [one.kind, one.value]

    for row in rows:
        for one in row.launches:
            keep(f"images/{one.image.name}.ptx", one.image.ptx.encode())
            keep(f"images/{one.image.name}.cubin", one.image.cubin)
        listed.append({
            "name": row.name, "kernels": row.kernels, "bound": row.bound,
            "buffers": [
                one.nbytes if one.dtype == np.uint8 and (one == FRESH).all() else array(one) for one in row.buffers
            ],
            "launches": [
                {
                    "image": one.image.name, "symbol": one.symbol, "grid": one.grid, "block": one.block,
                    "shared": one.shared, "arguments": [argument(each) for each in one.arguments],
                }
                for one in row.launches
            ],
            "results": [{**vars(one), "right": array(one.right)} for one in row.results],
        })  # fmt: skip
    keep("rows.json", json.dumps(listed, indent=1).encode())
