"""Rows survive their archive, and errors in memory are measured."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from volta.gpu import rows
from volta.gpu.rows import Bundle, Image, Launch, Number, Pointer, Result, Row

IMAGE = Image(".version 8.4\n.target sm_70\n", b"\x7fELF")
numbers = st.sampled_from(sorted(rows.KINDS)).flatmap(
    lambda kind: st.builds(
        Number, st.just(kind), st.floats(width=16, allow_nan=False) if kind[0] == "f" else st.integers(0, 1)
    )
)
buffers = st.lists(
    st.one_of(
        st.integers(1, 300).map(rows.fresh),
        arrays.arrays(st.sampled_from([np.float16, np.int32, np.uint8]), arrays.array_shapes(max_dims=2, max_side=5)),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def somewhat(draw: st.DrawFn) -> Row:
    memory = draw(buffers)
    pointers = st.builds(Pointer, st.integers(0, len(memory) - 1), st.integers(0, 4))
    given_to_it = draw(st.lists(st.one_of(numbers, pointers), max_size=6))
    launch = Launch(IMAGE, draw(st.text("abc_", min_size=1)), (1, 2, 3), (32, 1, 1), given_to_it, draw(st.integers(0)))
    right = draw(arrays.arrays(np.float64, (2, 3)))
    result = Result(0, right, "<f2", 2, (8, 2), draw(st.integers(0, 3)), draw(st.sampled_from(["row", "each"])))
    return Row(draw(st.text()), "kernel", memory, [launch], [result], draw(st.floats(0, 1)))


def kept(content: list[Row]) -> Bundle:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        rows.write(content, archive)
    return Bundle.open(sink)


def plain(value: Any) -> Any:
    """Return arrays as type, shape and bytes, in which NaN is equal to itself."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return {name: plain(one) for name, one in vars(value).items()} if hasattr(value, "__dict__") else value


@given(st.lists(somewhat(), max_size=3))
def test_rows_are_read_as_they_were_written(content: list[Row]) -> None:
    bundle = kept(content)
    assert [plain(bundle.row(number)) for number in range(len(bundle.listed))] == plain(content)


def test_uninitialized_memory_is_not_stored_and_shared_arrays_are_stored_once() -> None:
    noise = np.random.default_rng(7).integers(0, 255, 50_000).astype(np.uint8)
    row = Row("row", "kernel", [noise, rows.fresh(1 << 24)], [], [Result(0, noise, "|u1", measure="equal")], 0)
    bundle = kept([row, row, row])
    assert sum(member.compress_size for member in bundle.archive.infolist()) < 52_000


@given(arrays.arrays(np.float16, (4, 8), elements=st.floats(-1000, 1000, width=16)))
def test_exact_numbers_have_no_error_by_any_measure(right: Any) -> None:
    for measure in ("row", "each", "equal"):
        kind = right if measure == "equal" else right.astype(np.float64)
        assert rows.error(Result(0, kind, measure=measure), right.tobytes()) == 0


@given(st.integers(0, 31), st.sampled_from(["row", "each"]))
def test_unwritten_number_is_an_infinite_error(at: int, measure: str) -> None:
    right = np.arange(32, dtype=np.float64).reshape(4, 8)
    made = right.astype(np.float16)
    made.flat[at] = np.nan
    assert rows.error(Result(0, right, measure=measure), made.tobytes()) == np.inf


def test_the_error_of_a_row_is_relative_to_the_row_and_that_of_a_number_to_the_number() -> None:
    right = np.array([[3.0, 4.0], [300.0, 400.0]])
    made = np.array([[3.0, 4.5], [300.0, 400.0]], np.float16)
    assert rows.error(Result(0, right), made.tobytes()) == pytest.approx(0.1)
    assert rows.error(Result(0, right, measure="each"), made.tobytes()) == pytest.approx(0.125)


def test_write_to_protected_memory_is_an_infinite_error() -> None:
    right = np.array([[1.0, np.nan]])
    for measure in ("row", "each"):
        result = Result(0, right, measure=measure)
        assert rows.error(result, np.array([1, np.nan], np.float16).tobytes()) == 0
        assert rows.error(result, np.array([1, 2], np.float16).tobytes()) == np.inf


def test_result_can_have_offset_strides_and_parts() -> None:
    memory = np.zeros((3, 2, 4), np.float32)
    memory[:, :, 1] = [[1, 2], [10, 20], [100, 200]]
    summed = Result(0, np.array([111.0, 222.0]), "<f4", offset=4, strides=(32, 16), parts=3)
    assert rows.error(summed, memory.tobytes()) == 0
    assert rows.error(Result(0, np.array([10.0, 20.0]), "<f4", 36, (16,)), memory.tobytes()) == 0
    assert rows.error(Result(0, np.array([10.0, 20.0]), "<f4", 32, (16,)), memory.tobytes()) > 0


def test_eight_bit_numbers_are_read_as_e5m2() -> None:
    codes = np.array([0x3C, 0x40, 0xC2], np.uint8)  # 1, 2, -3
    assert rows.error(Result(0, np.array([1.0, 2.0, -3.0]), "e5m2"), codes.tobytes()) == 0
    assert rows.error(Result(0, np.array([1.0]), "e5m2"), bytes([0x7F])) == np.inf
