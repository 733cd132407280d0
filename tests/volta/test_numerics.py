"""The results of vLLM's Triton kernels, run by Triton's interpreter, compared with float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.vllm_python import VllmPython, Workbench

pytestmark = pytest.mark.build

CaseResult = Mapping[str, Any]

# An example takes about a second in the interpreter.
searching = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
PRELUDE = """
import json, unittest.mock
from volta.numerics.verify import attempt, table  # first: it sets Triton's mode
from volta import pretended_gpu, reference
from volta.numerics.attention import Attention, Layer, Store
from volta.numerics.interpreter import e5m2_of_volta, read_by_volta
from volta.numerics.quantized import Dequantize, Multiply
import numpy as np
import torch
from vllm.attention.ops import triton_reshape_and_cache_flash, triton_unified_attention
from vllm.model_executor.layers.quantization import awq_triton
"""


class Bench(Workbench):
    """A process that runs cases of volta.numerics."""

    def __init__(self, vllm_python: VllmPython, *words: str) -> None:
        super().__init__(vllm_python, *words, prelude=PRELUDE)

    def row(self, case: str) -> CaseResult:
        """Run a case and return its row."""
        row: CaseResult = json.loads(
            self.does(f"row = attempt({case})\nprint(json.dumps(vars(row) | {{'fine': row.fine}}))")
        )
        return row


@pytest.fixture(scope="module")
def bench(vllm_python: VllmPython) -> Iterator[Bench]:
    """A process that interprets kernels."""
    made = Bench(vllm_python)
    yield made
    made.end()


@pytest.fixture(scope="module")
def compiling(vllm_python: VllmPython) -> Iterator[Bench]:
    """A process that compiles kernels for sm_70."""
    made = Bench(vllm_python, "compile")
    yield made
    made.end()


def called(kind: str, fields: Mapping[str, object]) -> str:
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def test_every_row_of_the_table_is_within_its_bound(vllm_python: VllmPython) -> None:
    said = vllm_python.run("-m", "volta.numerics")
    kernels = (
        "kernel_unified_attention_2d",
        "kernel_unified_attention_3d + reduce_segments",
        "reshape_and_cache_kernel_flash",
        "awq_dequantize_kernel",
        "awq_gemm_kernel",
    )
    for kernel in kernels:
        assert f" ok   {kernel}: " in said


def test_every_case_compiles_for_sm_70(vllm_python: VllmPython) -> None:
    assert "compile for sm_70" in vllm_python.run("-m", "volta.numerics", "compile").splitlines()[-1]


FAULTS = {
    "nothing written": ("triton_unified_attention.unified_attention", "lambda plain, **call: None", "Attention()"),
    "a token too far": (
        "triton_unified_attention.unified_attention",
        "lambda plain, **call: plain(**call | {'seqused_k': call['seqused_k'] + 1})",
        "Attention()",
    ),
    "another's pages": (
        "triton_unified_attention.unified_attention",
        "lambda plain, **call: plain(**call | {'block_table': call['block_table'].flip(0)})",
        "Attention(new=(1, 1), old=(20, 20))",
    ),
    "nothing stored": (
        "triton_reshape_and_cache_flash.triton_reshape_and_cache_flash",
        "lambda plain, *call: None",
        "Store()",
    ),
    "padding stored": (
        "triton_reshape_and_cache_flash.triton_reshape_and_cache_flash",
        "lambda plain, *call: plain(*call[:4], call[4].abs(), *call[5:])",
        "Store()",
    ),
    "no product": ("awq_triton.awq_gemm_triton", "lambda plain, *call: torch.empty(3, 64)", "Multiply()"),
    "columns in another order": (
        "awq_triton.awq_dequantize_triton",
        "lambda plain, *call: plain(*call).flip(1)",
        "Dequantize()",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_kernel_is_found(fault: str, bench: Bench) -> None:
    name, instead, case = FAULTS[fault]
    module, function = name.split(".")
    said = bench.does(
        "import functools\n"
        f"wrong = functools.partial({instead}, {name})\n"
        f"with unittest.mock.patch.object({module}, '{function}', wrong), "
        f"unittest.mock.patch('volta.numerics.verify.CASES', ({case},)):\n"
        "    print('exit status', table())"
    )
    assert " BAD " in said
    assert "exit status 1" in said


IN_FLOAT16 = "with unittest.mock.patch.object(awq_triton, 'ACCUMULATES_IN_FLOAT32', False):\n    "


def test_awq_product_in_float16_exceeds_its_bound_and_is_found_in_the_ptx(bench: Bench, compiling: Bench) -> None:
    """The unpatched kernel: the interpreter rounds once in 32 multiply-adds, sm_70 after each."""
    case = "Multiply(rows=2, inputs=4096, group=128, outputs=32, parts=1)"
    assert "False" in bench.does(f"{IN_FLOAT16}print(attempt({case}).fine)")
    assert "awq_gemm_kernel sums in float16" in compiling.does(f"{IN_FLOAT16}print(attempt(Multiply()).problem)")
    said = bench.does(
        "case = Multiply(rows=2, inputs=4096, group=128, outputs=64)\n"
        "print(attempt(case).error < case.bound < 3 * case.bound < case.chained())"
    )
    assert "True" in said


def test_without_the_patch_a_window_hides_low_logits(bench: Bench) -> None:
    """0017-window-maximum, in prefill and in decode."""
    said = bench.does(
        "from vllm.attention.ops import triton_unified_attention as module\n"
        "class Stock:\n"
        "    def __init__(self, kernel): self.kernel = kernel\n"
        "    def __getitem__(self, grid): return lambda **call: self.kernel[grid](**call | {'KEEP_INF': False})\n"
        "for name, new, old in (('2d', (40,), (50,)), ('3d', (1,), (620,))):\n"
        "    case, name = Attention(new=new, old=old, window=24, level=-40.0), 'kernel_unified_attention_' + name\n"
        "    with unittest.mock.patch.object(module, name, Stock(getattr(module, name))):\n"
        "        print(attempt(case).error > 0.1, attempt(case).problem)\n"
    )
    assert said.split() == ["True", "True"]


@pytest.mark.parametrize(("capability", "answer"), [((7, 0), True), ((7, 5), False), ((9, 0), False)])
def test_awq_product_sums_in_float32_only_below_7_5(capability: tuple[int, int], answer: bool, bench: Bench) -> None:
    said = bench.does(
        "import importlib\n"
        f"with unittest.mock.patch.object(pretended_gpu.Platform, 'capability', {capability}):\n"
        "    name = awq_triton.__name__\n"
        "    spec = importlib.util.spec_from_file_location(name, awq_triton.__file__)\n"
        "    fresh = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(fresh)\n"
        "print(fresh.ACCUMULATES_IN_FLOAT32)"
    )
    assert said.strip() == str(answer)


@pytest.mark.parametrize("case", ["Store(cache={!r})", "Attention(cache={!r})", "Attention(cache={!r}, new=(3,))"])
def test_e4m3_does_not_compile_for_sm_70_and_e5m2_does(case: str, compiling: Bench) -> None:
    refused = compiling.row(case.format("fp8_e4m3"))
    assert "fp8e4nv not supported in this architecture" in refused["problem"]
    assert compiling.row(case.format("fp8_e5m2"))["fine"]


def test_layer_with_e5m2_does_not_quantize_queries(bench: Bench) -> None:
    said = bench.does(
        "from vllm.attention.layer import Attention\n"
        "from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config\n"
        "kind = unittest.mock.patch('torch.get_default_dtype', lambda: torch.float16)\n"
        "with kind, set_current_vllm_config(VllmConfig()):\n"
        "    one = Attention(2, 64, 0.125, 1, cache_config=CacheConfig(cache_dtype='fp8_e5m2'), prefix='a layer')\n"
        "print(type(one.impl).__name__, one.query_quant)"
    )
    assert "TritonAttentionImpl None" in said


def test_layer_with_e5m2_ignores_a_calculated_query_scale(bench: Bench) -> None:
    said = bench.does("print(attempt(Layer(Attention(new=(5,), old=(0,), cache='fp8_e5m2'), query_scale=0.7)))")
    assert "problem=''" in said


def test_types_of_other_caches_are_unchanged(bench: Bench) -> None:
    said = bench.does(
        "from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl\n"
        "for kind in ('auto', 'fp8', 'fp8_e4m3', 'fp8_e5m2'):\n"
        "    one = TritonAttentionImpl(2, 64, 0.125, 1, None, None, kind)\n"
        "    print(kind, one.fp8_dtype, one.supports_quant_query_input())"
    )
    e4m3 = [f"{kind} torch.float8_e4m3fn True" for kind in ("auto", "fp8", "fp8_e4m3")]
    assert said.splitlines() == [*e4m3, "fp8_e5m2 torch.float8_e5m2 False"]


def test_conversions_to_e5m2_agree_for_every_float16(bench: Bench) -> None:
    """The reference, the steps of Triton's PTX and torch agree, and so do the conversions back."""
    said = bench.does(
        "every = torch.arange(-2**15, 2**15).short().view(torch.float16)\n"
        "every = every[every.isfinite()].float()\n"
        "stored = torch.from_numpy(e5m2_of_volta(every.numpy())).view(torch.float8_e5m2).double()\n"
        "assert torch.equal(stored, reference.e5m2(every))\n"
        "evenly = every.to(torch.float8_e5m2).double()\n"
        "away = stored.isfinite() & evenly.isfinite() & (stored != evenly)\n"
        "assert ((stored - every).abs() == (evenly - every).abs())[away].all()\n"
        "assert (stored.abs() > evenly.abs())[away].all()\n"
        "assert torch.equal(stored.isinf(), every.abs() >= 61440)\n"
        "codes = torch.arange(256).byte()\n"
        "back = read_by_volta(codes.numpy())\n"
        "right = codes.view(torch.float8_e5m2).float()\n"
        "assert np.array_equal(back, right.numpy(), equal_nan=True)\n"
        "print(int(away.sum()), 'halves go away from zero')"
    )
    assert "halves go away from zero" in said


sequences = st.lists(st.tuples(st.integers(1, 24), st.integers(0, 50)), min_size=1, max_size=3)


@searching
@given(
    sequences=sequences,
    decode=st.booleans(),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 4), (1, 7), (1, 8), (1, 20)]),
    head_size=st.sampled_from([64, 80, 96, 128, 192]),
    page=st.sampled_from([16, 32]),
    cache=st.sampled_from(["auto", "fp8_e5m2"]),
    window=st.one_of(st.just(0), st.integers(1, 60)),
    level=st.sampled_from([0.0, -40.0]),
    softcap=st.sampled_from([0.0, 20.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_within_its_bound_for_any_batch(
    bench: Bench,
    sequences: list[tuple[int, int]],
    decode: bool,
    heads: tuple[int, int],
    seed: int,
    **rest: object,
) -> None:
    new = [1 if decode else count for count, _ in sequences]
    assume(sum(new) * heads[0] <= 60)  # limits the time
    # A level shifts every logit of a row, as does the zero of ALiBi, which vLLM chooses. With a soft cap or sinks such
    # a shift changes the result.
    assume(not rest["level"] or not (rest["softcap"] or rest["sinks"]))
    assume(not rest["alibi"] or not rest["sinks"])
    kv_heads, group = heads
    rest |= {"new": new, "old": [count for _, count in sequences], "kv_heads": kv_heads, "group": group, "seed": seed}
    row = bench.row(called("Attention", rest))
    assert row["fine"], row


@searching
@given(
    tokens=st.integers(1, 40),
    padding=st.sets(st.integers(0, 39)),
    heads=st.integers(1, 9),
    head_size=st.sampled_from([64, 80, 96, 128, 256]),
    page=st.sampled_from([16, 32]),
    cache=st.sampled_from(["auto", "fp8_e5m2"]),
    scales=st.tuples(st.floats(0.01, 50), st.floats(0.01, 50)),
    seed=st.integers(0, 1000),
)
def test_each_token_is_written_to_its_slot_only(bench: Bench, tokens: int, padding: set[int], **rest: object) -> None:
    padding = {token for token in padding if token < tokens}
    assume(len(padding) < tokens)
    row = bench.row(called("Store", rest | {"tokens": tokens, "padding": sorted(padding)}))
    assert row["fine"], row


@searching
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    outputs=st.integers(1, 12).map(lambda words: 8 * words),
    parts=st.sampled_from([1, 2, 8, 32]),
    seed=st.integers(0, 1000),
)
def test_awq_kernels_are_within_their_bounds_for_any_shape(
    bench: Bench, rows: int, groups: int, group: int, outputs: int, parts: int, seed: int
) -> None:
    shape = {"inputs": groups * group, "outputs": outputs, "group": group, "seed": seed}
    unpacked = bench.row(called("Dequantize", shape))
    assert unpacked["fine"], unpacked
    product = bench.row(called("Multiply", shape | {"rows": rows, "parts": parts}))
    assert product["fine"], product
