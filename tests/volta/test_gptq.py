"""4-bit GPTQ with few rows (vllm#10656): vLLM's own kernels, run on the CPU, compared with float64.

What stands in for CUDA is tests/native/cuda_on_cpu.h; the kernels, their launches and the choice between them are the
source text of the tree, with the patch and without it. No GPU was involved, and cuBLAS is a stand-in.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.gptq import CallReport, Kernels, layer
from volta.gpu_rows.gptq import Layer
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches, tree

pytestmark = pytest.mark.slow
PATCH = "gptq-small-prompts"
LARGEST = 65504.0
"""The largest half."""
ROUNDING = 2.0**-11
"""The relative error of one operation in half."""


@pytest.fixture(scope="module")
def trees(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The patched sources, and the same without the patch for GPTQ."""
    pipeline = Pipeline.load(repository, Settings())
    archive = pipeline.store.get(pipeline.recipes["vllm"].source.artifact)
    series = patches.series(repository / "patches" / "vllm")
    without = [patch for patch in series if PATCH not in patch.path.name]
    assert len(without) == len(series) - 1
    folder = tmp_path_factory.mktemp("vllm")
    return {
        "patched": tree.create(archive, series, folder / "patched").path,
        "unpatched": tree.create(archive, without, folder / "unpatched").path,
    }


@pytest.fixture(scope="module")
def patched(trees: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(trees["patched"], tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def unpatched(trees: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(trees["unpatched"], tmp_path_factory.mktemp("unpatched"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(10656)


def ordinary(rng: np.random.Generator, rows: int, inputs: int) -> NDArray[np.float16]:
    return rng.standard_normal((rows, inputs)).astype(np.float16)


def with_outliers(rng: np.random.Generator, rows: int, inputs: int, size: float) -> NDArray[np.float16]:
    """Return activations with two huge channels in the first row, as in a model's first token."""
    a = ordinary(rng, rows, inputs)
    a[0, [inputs // 7, inputs // 2]] = size, -size
    return a


def assert_right(result: NDArray[np.float16], a: NDArray[np.float16], layer: Layer) -> None:
    """Check the error of each result, and of all on average, against the rounding errors for any order of sums."""
    exact = a.astype(np.float64) @ layer.exact
    assert np.isfinite(result).all(), f"{np.count_nonzero(~np.isfinite(result))} of {result.size} are infinite or NaN"
    blocks = -(-a.shape[1] // 128)
    # 4-bit sums of four products, 8-bit sums over a block, then one addition for each block along the inputs
    steps = {4: 5, 8: 17}[layer.bits] + blocks
    finest = a.shape[1] * 2.0**-19 * float(layer.scales.max()) + blocks * 2.0**-25
    size = np.abs(a.astype(np.float64)) @ np.abs(layer.exact)
    error = np.abs(result - exact)
    assert (error <= 1.01 * steps * ROUNDING * size + finest).all()
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 2e-3


def right(kernels: Kernels, a: NDArray[np.float16], layer: Layer, **how: int) -> CallReport:
    """Check a product, and that nothing was written past its end."""
    result, told = kernels.gemm(a, layer, **how)
    assert_right(result, a, layer)
    assert told.overruns == 0
    return told


def test_half_of_the_cpu_stand_in_rounds_like_numpy(patched: Kernels, rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 1 << 16, (2, 300_000)).astype(np.uint16).view(np.float16)
    near = (-a.view(np.int16) + rng.integers(-40, 40, a.size)).astype(np.int16).view(np.float16)
    values = rng.integers(0, 1 << 32, 300_000).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(patched.add(a, b), a + b)
        np.testing.assert_array_equal(patched.add(a, near), a + near)
        np.testing.assert_array_equal(patched.narrowed(values), values.astype(np.float16))


def test_fused_multiply_add_of_the_cpu_stand_in_rounds_once(patched: Kernels, rng: np.random.Generator) -> None:
    halves = rng.integers(0, 1 << 16, (3, 20_000)).astype(np.uint16).view(np.float16)
    halves = np.ascontiguousarray(halves[:, np.isfinite(halves).all(axis=0)])
    for a, b, c, result in zip(*halves, patched.fused(*halves), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if abs(exact) >= 65520:
            assert np.isinf(result)
            continue
        off = abs(Fraction(float(result)) - exact)
        for side in (-np.inf, np.inf):
            neighbour = float(np.nextafter(result, np.float16(side)))
            if np.isfinite(neighbour):
                beside = abs(Fraction(neighbour) - exact)
                assert off < beside or (off == beside and not result.view(np.uint16) & 1)


@pytest.mark.parametrize(("bits", "limit"), [(4, 50), (8, 24)])
def test_products_of_1_to_64_rows_are_right(patched: Kernels, rng: np.random.Generator, bits: int, limit: int) -> None:
    """The layer ends in the middle of a block in both directions, and groups are shorter than a block."""
    some = layer(rng, 288, 520, bits, group=32)
    for rows in range(1, 65):
        told = right(patched, ordinary(rng, rows, 288), some)
        assert told.rows_by_cublas == (rows if rows > limit else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_both_formats_of_zero_points_are_right(patched: Kernels, rng: np.random.Generator, bits: int) -> None:
    some = layer(rng, 288, 520, bits, group=32)
    some.zeros[:] %= 1 << bits  # the second format has no zero of 2^bits
    for rows in (1, 8, 13, 51):
        right(patched, ordinary(rng, rows, 288), some, v2=True)


@pytest.mark.parametrize("size", [1000, 2048, 4096, 8192, 20_000, LARGEST])
@pytest.mark.parametrize("bits", [4, 8])
def test_huge_activations_are_right_for_any_number_of_rows(
    patched: Kernels, rng: np.random.Generator, bits: int, size: float
) -> None:
    some = layer(rng, 512, 512, bits)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 25, 50, 51):
        right(patched, with_outliers(rng, rows, 512, size), some)


def test_without_the_patch_huge_activations_are_infinite_or_nan_up_to_50_rows(
    unpatched: Kernels, rng: np.random.Generator
) -> None:
    """The fault appears with 4 bits and few rows, and not with more rows or 8 bits."""
    some, eight = layer(rng, 512, 512), layer(rng, 512, 512, bits=8)
    for rows in (1, 8, 50):
        result, _ = unpatched.gemm(with_outliers(rng, rows, 512, 20_000), some)
        assert np.isinf(result[0]).any()
        assert np.isnan(result[0]).any()
        assert np.isfinite(result[1:]).all()
    right(unpatched, with_outliers(rng, 51, 512, 20_000), some)
    right(unpatched, with_outliers(rng, 8, 512, 20_000), eight)
    right(unpatched, with_outliers(rng, 8, 512, 1000), some)


@pytest.mark.parametrize(("weight", "size"), [(-8, 8192), (7, 9360), (-16, 4096), (15, 4368)])
def test_without_the_patch_one_overflowing_product_gives_infinity(
    patched: Kernels, unpatched: Kernels, weight: int, size: float
) -> None:
    """The result itself is small, 0.01 times the product; the next smaller activation is fine."""
    zero = max(-weight, 0)
    some = Layer(
        values=np.full((128, 8), zero + weight),
        zeros=np.full((1, 8), zero),
        scales=np.full((1, 8), 0.01, np.float16),
        bits=4,
        groups=np.zeros(128, np.int64),
    )
    a = np.zeros((1, 128), np.float16)
    a[0, 77] = size
    assert np.isinf(unpatched.gemm(a, some, v2=zero == 0)[0]).all()
    right(patched, a, some, v2=zero == 0)
    a[0, 77] = np.nextafter(np.float16(size), np.float16(0))
    right(unpatched, a, some, v2=zero == 0)


def test_finite_sums_never_overflow(patched: Kernels) -> None:
    """All activations are the largest half and all weights -16: each partial sum is as large as it can be."""
    some = Layer(
        values=np.zeros((384, 8), np.int64),
        zeros=np.full((3, 8), 16),
        scales=np.full((3, 8), 2.0**-14, np.float16),
        bits=4,
        groups=np.arange(384) // 128,
    )
    a = np.full((3, 384), LARGEST, np.float16)
    result, _ = patched.gemm(a, some)
    assert_right(result, a, some)


def test_patch_keeps_the_bits_of_ordinary_results(
    patched: Kernels, unpatched: Kernels, rng: np.random.Generator
) -> None:
    some = layer(rng, 1024, 512)
    for size in (1, 100):
        a = ordinary(rng, 8, 1024) * np.float16(size)
        assert patched.gemm(a, some)[0].tobytes() == unpatched.gemm(a, some)[0].tobytes()


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_small_activations_are_as_precise_as_large_ones(
    patched: Kernels, rng: np.random.Generator, size: float
) -> None:
    right(patched, (ordinary(rng, 8, 1024) * size).astype(np.float16), layer(rng, 1024, 512))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("exllama", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_result_does_not_depend_on_the_order_of_blocks(
    patched: Kernels, rng: np.random.Generator, bits: int, exllama: bool, order: int
) -> None:
    """Also with act-order, with and without exllama's order of weights."""
    some = layer(rng, 512, 256, bits, act_order=True)
    told = right(patched, ordinary(rng, 7, 512), some, exllama=exllama, order=order)
    assert told.rows_by_cublas == 0


@pytest.mark.parametrize("exllama", [True, False])
def test_without_the_patch_a_late_block_clears_sums(
    unpatched: Kernels, rng: np.random.Generator, exllama: bool
) -> None:
    some, a = layer(rng, 512, 256), ordinary(rng, 7, 512)
    right(unpatched, a, some, exllama=exllama)
    late, _ = unpatched.gemm(a, some, exllama=exllama, order=1)
    with pytest.raises(AssertionError):
        assert_right(late, a, some)


@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_does_not_write_past_results_of_any_width(
    patched: Kernels, unpatched: Kernels, rng: np.random.Generator, bits: int
) -> None:
    """The kernels without exllama's order have blocks of 128 columns."""
    some, a = layer(rng, 256, 520, bits, act_order=True), ordinary(rng, 3, 256)
    right(patched, a, some, exllama=False)
    assert unpatched.gemm(a, some, exllama=False)[1].overruns > 0


def test_vllm_does_not_warn_that_the_kernel_is_buggy(trees: dict[str, Path]) -> None:
    source = Path("vllm/model_executor/layers/quantization/gptq.py")
    assert "gptq_gemm kernel for GPTQ is buggy" in (trees["unpatched"] / source).read_text()
    assert "buggy" not in (trees["patched"] / source).read_text()
