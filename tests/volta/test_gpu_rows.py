"""The rows of vLLM's own CUDA kernels, checked without a GPU: launches, references and bounds."""

from __future__ import annotations

import ctypes
import io
import json
import math
import re
import zipfile
from collections.abc import Sequence

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from numpy.typing import NDArray

from tests.support.gptq import CallReport, Kernels
from tests.support.gptq import packed as packed_by_bits
from volta.gpu import rows as gpu
from volta.gpu.rows import Array, Bundle, Image, Launch, Number, Pointer, Result, Row
from volta.gpu_rows import activations, builder, gptq, kv_cache
from volta.gpu_rows import cuda_kernels as cuda_rows
from voltforge.gpu import cuda_kernels
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches, tree

LARGEST = 4 << 20
"""Bytes of a row's memory."""
SHARED = 48 << 10
"""Bytes of shared memory that a block has without the opt-in for more."""
NAMES = (
    *(f"gptq_gemm bits=4 rows={rows}" for rows in (1, 2, 3, 4, 5, 8, 13, 24, 33, 50)),
    *(f"gptq_gemm bits=8 rows={rows}" for rows in (1, 2, 3, 4, 5, 8, 13, 24)),
    *(f"gptq_gemm bits={bits} rows=64 weights for cuBLAS" for bits in (4, 8)),
    *(f"gptq_gemm bits={bits} rows=8 outlier={size}" for bits in (4, 8) for size in (8192, 65504)),
    *(f"topk_softmax {kind} experts={experts}" for kind in ("float16", "float32") for experts in (8, 64)),
    *(f"rotary_embedding float16 {style}" for style in ("neox", "gptj")),
    *(f"reshape_and_cache{flash} {kind}" for flash in ("", "_flash") for kind in ("float16", "fp8_e5m2")),
    *(f"moe_wna16_gemm bits={bits}" for bits in (4, 8)),
    *("rms_norm", "fused_add_rms_norm", "silu_and_mul", "gelu_and_mul", "moe_align_block_size", "moe_sum"),
)  # fmt: skip
"""Prefixes of the names of required rows."""
TINY = Image(
    ".target sm_70\n.visible .entry _Z4pairPfib(\n.param .u64 a_0,\n.param .u32 a_1,\n.param .u8 a_2\n)\n{\n}\n"
)


# Without a build.


def test_launch_has_the_arguments_of_its_kernel() -> None:
    right = builder.launch(TINY, "pair", (2,), (32,), [Pointer(0), builder.i32(1), builder.boolean(True)])
    assert (right.symbol, right.grid, right.block) == ("_Z4pairPfib", (2, 1, 1), (32, 1, 1))


@pytest.mark.parametrize(
    "arguments",
    [
        [Pointer(0), builder.i32(1)],
        [Pointer(0), builder.i64(1), builder.boolean(True)],
        [builder.i32(1), Pointer(0), builder.boolean(True)],
    ],
)
def test_launch_with_wrong_arguments_is_refused(arguments: list[Pointer | Number]) -> None:
    with pytest.raises(ValueError, match="has parameters"):
        builder.launch(TINY, "pair", (1,), (32,), arguments)


def test_launch_of_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="0 kernels match triple"):
        builder.launch(TINY, "triple", (1,), (32,), [])


def test_missing_source_has_no_rows() -> None:
    assert not list(cuda_rows.rows({}))


def test_uint16_arguments_survive_json() -> None:
    for value in range(0x7C00):
        made = json.loads(json.dumps(builder.u16(value).value))
        assert gpu.KINDS["f16"](made).view(np.uint16) == value


def test_words_are_packed_like_gptq() -> None:
    for bits in (4, 8):
        values = np.random.default_rng(1).integers(0, 1 << bits, (5, 64))
        np.testing.assert_array_equal(gptq.packed(values, bits), packed_by_bits(values, bits))


def test_e5m2_rounds_to_the_nearest_number() -> None:
    codes = np.arange(0x7C, dtype=np.uint8)
    numbers = (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    for value, code in zip(halves, kv_cache.e5m2(halves), strict=True):
        off = np.abs(numbers - value)
        nearest = np.flatnonzero(off == off.min())
        assert code == (nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0])
    np.testing.assert_array_equal(kv_cache.e5m2(-halves), kv_cache.e5m2(halves) | 0x80)
    assert kv_cache.e5m2(np.array([1e9, -1e9])).tolist() == [0x7B, 0xFB]


def test_error_function_equals_the_standard_library() -> None:
    x = np.linspace(-4, 8, 2001)
    np.testing.assert_allclose(activations._erf(x), [math.erf(one) for one in x], rtol=0, atol=3e-8)
    x = np.linspace(-2.2, 2.2, 501)
    np.testing.assert_allclose(activations._erf(x), [math.erf(one) for one in x], rtol=1e-12)


def test_write_next_to_an_array_is_an_error() -> None:
    for measure in ("row", "each", "equal"):
        memory = builder.RowBuilder()
        right = np.ones((3, 4), np.float16)
        at = memory.rows(right)
        memory.expect(at, right, measure)
        (result,) = memory.results
        good = bytearray(memory.buffers[0].tobytes())
        assert gpu.error(result, bytes(good)) == 0
        for place in (at.offset - 2, len(good) - at.offset):
            bad = good.copy()
            bad[place : place + 2] = b"\0\0"
            assert gpu.error(result, bytes(bad)) == np.inf


# With the wheel's kernels.


@pytest.fixture(scope="module")
def images(vllm: Pipeline) -> dict[str, Image]:
    return cuda_kernels.images(vllm)


@pytest.fixture(scope="module")
def rows(images: dict[str, Image]) -> list[Row]:
    return list(cuda_rows.rows(images))


def launches(rows: Sequence[Row]) -> list[tuple[str, Row, Launch]]:
    return [(row.name, row, launche) for row in rows for launche in row.launches]


def declared(text: str, symbol: str) -> list[int]:
    """Return the bytes of each parameter of a kernel, from the lines of its PTX."""
    begin = text.index(f".entry {symbol}(")
    lines = text[begin : text.index(")", begin)].splitlines()[1:]
    return [int(re.search(r"\.[usbf](\d+)", line)[1]) // 8 for line in lines if ".param" in line]


def numbers(row: Row, at: Pointer, kind: str, count: int) -> Array:
    return np.frombuffer(row.buffers[at.buffer].tobytes(), kind, count, at.offset)


def inner(row: Row, result: Result, kind: str) -> Array:
    """Return a result without its guards, which have the sizes of the buffer's guards."""
    whole = result.right.reshape(-1)
    if result.measure == "equal":
        whole = np.frombuffer(whole.tobytes(), kind)
        guard = builder.GUARD // np.dtype(kind).itemsize
        return whole[guard:-guard]
    return whole[~np.isnan(whole)]


@pytest.mark.slow
def test_every_documented_kernel_has_rows(rows: list[Row]) -> None:
    assert not [name for name in NAMES if not any(row.name.startswith(name) for row in rows)]
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.slow
def test_every_launch_has_the_parameters_of_the_ptx(rows: list[Row]) -> None:
    for name, _, one in launches(rows):
        given = [8 if isinstance(each, Pointer) else np.dtype(gpu.KINDS[each.kind]).itemsize for each in one.arguments]
        assert given == declared(one.image.ptx, one.symbol), name


@pytest.mark.slow
def test_ptx_and_cubin_are_for_7_0(rows: list[Row]) -> None:
    for name, _, one in launches(rows):
        assert ".target sm_70\n" in one.image.ptx, name
        assert one.symbol in cuda_kernels.cubin_kernels(one.image.cubin), name


@pytest.mark.slow
def test_blocks_and_shared_memory_fit_a_card(rows: list[Row]) -> None:
    for name, _, one in launches(rows):
        assert 1 <= np.prod(one.block) <= 1024, name
        assert min(one.grid) >= 1, name
        assert max(one.grid[1:]) <= 65535, name
        file = ELFFile(io.BytesIO(one.image.cubin))
        fixed = file.get_section_by_name(f".nv.shared.{one.symbol}")
        size = (fixed["sh_size"] if fixed else 0) + one.shared
        assert size <= SHARED, name


@pytest.mark.slow
def test_addresses_are_inside_their_buffers_and_aligned(rows: list[Row]) -> None:
    for name, row, one in launches(rows):
        for each in one.arguments:
            if isinstance(each, Pointer):
                assert builder.GUARD <= each.offset < row.buffers[each.buffer].nbytes - builder.GUARD, name
                assert each.offset % 16 == 0, name


@pytest.mark.slow
def test_arrays_are_small_and_have_guards(rows: list[Row]) -> None:
    for row in rows:
        assert sum(buffer.nbytes for buffer in row.buffers) < LARGEST, row.name
        for buffer in row.buffers:
            flat = buffer.reshape(-1).view(np.uint8)
            assert (flat[: builder.GUARD] == gpu.FRESH).all(), row.name
            assert (flat[-builder.GUARD :] == gpu.FRESH).all(), row.name


@pytest.mark.slow
def test_references_are_finite_and_bounds_small(rows: list[Row]) -> None:
    for row in rows:
        assert 0 <= row.bound <= 5 * builder.HALF, row.name
        for result in row.results:
            if result.right.dtype.kind == "f":
                assert not np.isinf(result.right).any(), row.name
                assert np.abs(result.right[~np.isnan(result.right)]).max() < builder.LARGEST, row.name


@pytest.mark.slow
def test_no_result_passes_before_the_launch(rows: list[Row]) -> None:
    for row in rows:
        for result in row.results:
            assert gpu.error(result, row.buffers[result.buffer].tobytes()) > max(10 * row.bound, 1e-3), row.name


@pytest.mark.slow
def test_rows_are_reproducible_and_survive_a_bundle(images: dict[str, Image], rows: list[Row]) -> None:
    packed = []
    for some in (rows, cuda_rows.rows(images)):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            gpu.write(some, archive)
        packed.append(sink)
    assert packed[0].getvalue() == packed[1].getvalue()
    assert len(packed[0].getvalue()) < 16 << 20
    bundle = Bundle.open(packed[0])
    for number, row in enumerate(rows):
        back = bundle.row(number)
        assert [launche.arguments for launche in back.launches] == [list(launche.arguments) for launche in row.launches]
        assert all(np.array_equal(a, b) for a, b in zip(back.buffers, row.buffers, strict=True))


# The kernels' results for the same inputs, computed on the CPU.


@pytest.fixture(scope="module")
def on_cpu(vllm: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The patched sources, run on the CPU."""
    archive = vllm.store.get(vllm.recipes["vllm"].source.artifact)
    series = patches.series(vllm.root / "patches" / "vllm")
    folder = tmp_path_factory.mktemp("vllm")
    return Kernels(tree.create(archive, series, folder / "tree").path, tmp_path_factory.mktemp("kernels"))


def values(arguments: Sequence[Pointer | Number]) -> list[int]:
    return [int(argument.value) for argument in arguments if isinstance(argument, Number)]


def executed(kernels: Kernels, row: Row) -> NDArray[np.float16]:
    """Return the results of gptq_shuffle and gptq_gemm for a row's buffers, on the CPU."""
    products = [launche for launche in row.launches if "gemm_half" in launche.symbol]
    shuffles = [launche for launche in row.launches if "shuffle" in launche.symbol]
    exllama = bool(shuffles)
    bits = 4 if "4bit" in products[0].symbol else 8
    a, words, second, third, fourth = products[0].arguments[:5]
    if exllama:  # a, words, zeros, scales, result, rows, outputs, inputs, groups, v2, order
        zeros, scales, order = second, third, products[0].arguments[10]
        counts = [values(product.arguments) for product in products]
        rows, (_, outputs, inputs, groups, v2) = sum(count[0] for count in counts), counts[0][:5]
        words = row.launches[0].arguments[0]
    else:  # a, words, result, scales, zeros, groups, rows, words along the inputs, outputs, v2
        scales, zeros, order = third, fourth, products[0].arguments[5]
        rows, height, outputs, v2 = values(products[0].arguments)
        inputs, groups = height * 32 // bits, 13
    assert isinstance(a, Pointer)
    assert isinstance(words, Pointer)
    assert isinstance(zeros, Pointer)
    assert isinstance(scales, Pointer)
    held = {
        "a": numbers(row, a, "<f2", rows * inputs),
        "words": numbers(row, words, "<u4", inputs * outputs * bits // 32).copy(),
        "zeros": numbers(row, zeros, "<u4", groups * outputs * bits // 32),
        "scales": numbers(row, scales, "<f2", groups * outputs),
        "order": numbers(row, order, "<i4", inputs) if isinstance(order, Pointer) else None,
        "result": np.empty(rows * outputs, np.float16),
    }
    at = {name: None if one is None else ctypes.c_void_p(one.ctypes.data) for name, one in held.items()}
    library = kernels._library
    if exllama:
        library.shuffle(at["words"], at["order"], outputs, inputs, bits)
    pointers = [at[name] for name in ("a", "words", "zeros", "scales", "order", "result")]
    told: CallReport = library.gemm(*pointers, rows, outputs, inputs, groups, int(exllama), v2, bits, 0)
    assert told.overruns == told.rows_by_cublas == 0
    result = held["result"]
    assert result is not None
    return result


@pytest.mark.slow
def test_gptq_products_on_the_cpu_are_within_half_of_their_bounds(rows: list[Row], on_cpu: Kernels) -> None:
    """The references are right, and the bounds allow for a card that sums in another order."""
    tried = [row for row in rows if any("gemm_half" in launche.symbol for launche in row.launches)]
    assert len(tried) == 34
    for row in tried:
        (result,) = row.results
        memory = row.buffers[result.buffer].copy()
        made = executed(on_cpu, row).view(np.uint8)
        begin = (memory.nbytes - made.nbytes) // 2
        memory[begin : begin + made.nbytes] = made
        assert gpu.error(result, memory.tobytes()) <= 0.5 * row.bound, row.name


@pytest.mark.slow
def test_gptq_products_write_each_row_once(rows: list[Row]) -> None:
    for row in rows:
        if match := re.fullmatch(r"gptq_gemm bits=\d rows=(\d+)", row.name):
            covered: list[int] = []
            for launche in row.launches[1:]:
                result, count = launche.arguments[4], int(re.search(r"ILb1ELi(\d)EE", launche.symbol)[1])
                assert isinstance(result, Pointer)
                width = values(launche.arguments)[1]
                first = result.offset // 2 // width
                covered += range(first, first + count * launche.grid[1])
            assert np.diff(covered).tolist() == [1] * (int(match[1]) - 1)


def experts_product(row: Row) -> tuple[Launch, NDArray[np.float64]]:
    """Compute a product of experts from the row's bytes, with the kernel's indices of each weight."""
    one = row.launches[-1]
    x, _, words, scales, zeros, share = one.arguments[:6]
    given = one.arguments[9:]
    experts, group, top = (int(np.float16(each.value).view(np.uint16)) for each in given[:3])
    tokens, outputs, inputs = (int(each.value) for each in given[3:6])
    bits = int(re.search(r"6__halfLi(\d)E", one.symbol)[1])
    chosen = row.launches[0].arguments[0]
    for each in (x, words, scales, chosen):
        assert isinstance(each, Pointer)
    e, n, k = np.ogrid[:experts, :outputs, :inputs]
    place = (e * outputs + n) * inputs + k
    per = 32 // bits
    packed = numbers(row, words, "<u4", experts * outputs * inputs // per)
    weight = (packed[place // per] >> (place % per * bits)) & ((1 << bits) - 1)
    scale = numbers(row, scales, "<f2", experts * outputs * inputs // group)[place // group]
    zero: Array = np.array(1 << (bits - 1))
    if isinstance(zeros, Pointer):
        held = numbers(row, zeros, "|u1", experts * outputs * inputs // group * bits // 8)
        at = (e * outputs + n) // (8 // bits) * (inputs // group) + k // group
        zero = (held[at] >> (n % (8 // bits) * bits)) & ((1 << bits) - 1)
    whole = (weight.astype(np.float64) - zero) * scale.astype(np.float64)
    ids = numbers(row, chosen, "<i4", tokens * top)
    left = numbers(row, x, "<f2", tokens * inputs).reshape(tokens, inputs).astype(np.float64)
    right = np.stack([whole[expert] @ left[number // top] for number, expert in enumerate(ids)])
    if isinstance(share, Pointer):
        right *= numbers(row, share, "<f4", tokens * top)[:, None]
    return one, right


@pytest.mark.slow
def test_products_of_experts_match_the_packed_bytes(rows: list[Row]) -> None:
    tried = [row for row in rows if row.name.startswith("moe_wna16_gemm")]
    assert len(tried) == 8
    for row in tried:
        one, right = experts_product(row)
        made = next(each for each in row.results if each.measure == "row")
        np.testing.assert_allclose(inner(row, made, "<f4"), right.reshape(-1), rtol=1e-5, atol=1e-5)
        assert one.shared == 16 * 128 * 2
        total = next(inner(row, each, "<i4") for each in row.results if inner(row, each, "|u1").size == 4)
        assert one.grid[0] * 16 >= total[0]


def sorted_by_threads(
    ids: Array, experts: int, block: int, threads: int, room: int
) -> tuple[list[int], list[int], int]:
    """Run moe_align_block_size_small_batch_expert_kernel, one thread after another."""
    counts = np.zeros((threads + 1, experts), int)
    for thread in range(threads):
        for number in range(thread, len(ids), threads):
            counts[thread + 1, ids[number]] += 1
    before = counts.cumsum(axis=0)
    ends = np.concatenate([[0], np.cumsum(-(-before[-1] // block) * block)])
    made, homes = [len(ids)] * room, [0] * -(-room // block)
    for expert in range(experts):
        for at in range(ends[expert], ends[expert + 1], block):
            homes[at // block] = expert
    for thread in range(threads):
        for number in range(thread, len(ids), threads):
            made[ends[ids[number]] + before[thread, ids[number]]] = number
            before[thread, ids[number]] += 1
    return made, homes, int(ends[-1])


@pytest.mark.slow
def test_tokens_are_sorted_like_the_kernels_threads(rows: list[Row]) -> None:
    tried = [row for row in rows if row.name.startswith("moe_align") and "small_batch" in row.kernels]
    assert len(tried) == 3
    for row in tried:
        (one,) = row.launches
        experts, block, count, room = values(one.arguments)
        given = one.arguments[0]
        assert isinstance(given, Pointer)
        made = sorted_by_threads(numbers(row, given, "<i4", count), experts, block, one.block[0], room)
        homes, total, ids = (inner(row, each, "<i4").tolist() for each in row.results)
        assert (ids, homes, total) == (made[0], made[1], [made[2]])
        assert one.shared == 4 * ((one.block[0] + 1) * experts + experts + 1)


@pytest.mark.slow
def test_order_of_many_experts_is_checked_if_it_is_deterministic(rows: list[Row]) -> None:
    (row,) = (row for row in rows if row.name.startswith("moe_align_block_size tokens=64 experts=512"))
    ids = inner(row, row.results[2], "<i4")
    given = row.launches[0].arguments[0]
    assert isinstance(given, Pointer)
    chosen = numbers(row, given, "<i4", 512)
    assert "count_and_sort_expert_tokens_kernel" in row.kernels
    assert [int(chosen[one]) for one in ids[::16]] == list(range(512))
    assert (np.delete(ids, np.s_[::16]) == 512).all()
