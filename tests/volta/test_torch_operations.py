"""PyTorch's operations compared with float64: every bound holds on the CPU, and a wrong answer does not pass."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import elftools
import psutil
import pytest

from tests.support.checkouts import ROOT
from tests.support.vllm_python import VllmPython
from volta.torch_operations.operation import NO_GPU, Operation, OperationResult
from volta.torch_operations.table import line

PROGRAM = ("-m", "volta.torch_operations")
THIN = ROOT / "bench" / "thin_gpu.py"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
PATCHED = """
import sys, torch
from volta.torch_operations.__main__ import main
real = {real}
def spoilt(*args, **named):
    made = real(*args, **named)
    tested = next(one for one in args if isinstance(one, torch.Tensor)).dtype != torch.float64 if {guarded} else True
    return {wrong} if tested else made
{real} = spoilt
sys.exit(main(["--device", "cpu", "--json", "--only", "{only}"]))
"""


def told(lines: str) -> tuple[dict[str, Any], dict[str, OperationResult]]:
    about, *rows = map(json.loads, lines.splitlines())
    return about, {row["operation"]: OperationResult(**row) for row in rows}


@pytest.fixture(scope="module")
def on_the_cpu(vllm_python: VllmPython) -> tuple[dict[str, Any], dict[str, OperationResult]]:
    """The program's rows for the CPU, in the types that are tested on a GPU."""
    return told(vllm_python.run(*PROGRAM, "--device", "cpu", "--json"))


@pytest.mark.slow
@pytest.mark.build
def test_every_operation_is_right_on_the_cpu_in_the_tested_types(
    on_the_cpu: tuple[Any, dict[str, OperationResult]],
) -> None:
    about, rows = on_the_cpu
    assert "sm_70" in about["archs"]
    assert {name: row.verdict for name, row in rows.items() if row.verdict != "right"} == {
        "attention, mem-efficient, float16": "left out",
        "attention, mem-efficient, causal, float16": "left out",
    }
    ran = [row for row in rows.values() if row.verdict == "right"]
    assert len(ran) > 50
    assert all(row.microseconds and row.bits and row.repeats for row in ran)


@pytest.mark.slow
@pytest.mark.build
def test_errors_are_large_enough_to_show_that_short_types_are_tested(
    on_the_cpu: tuple[Any, dict[str, OperationResult]],
) -> None:
    for name, row in on_the_cpu[1].items():
        if row.verdict == "right" and row.bound:
            least = 2.0**-14 if "float16" in name else 2.0**-27
            assert row.error
            assert least < row.error <= row.bound, name


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.parametrize(
    ("real", "wrong", "only", "wronged"),
    [
        ("torch.softmax", "made * 1.01", "softmax, float16", "softmax, float16"),
        ("torch.bmm", "real(*(one.bfloat16().to(one.dtype) for one in args))", "bmm, float32", "bmm, float32"),
        ("torch.index_select", "made.roll(1, 0)", "index_select", "index_select"),
        ("torch.cumsum", "made.fill_(float('nan'))", "cumsum", "cumsum, float32"),
        ("torch.linalg.cholesky", "made.mT", "cholesky", "linalg.cholesky, float32"),
        ("torch.rand", "made.normal_() if 'generator' in named and named['generator'].initial_seed() == 7 else made",
         "rand, seeded", "rand, seeded"),
    ],
)  # fmt: skip
def test_wrong_answer_is_found(vllm_python: VllmPython, real: str, wrong: str, only: str, wronged: str) -> None:
    text = PATCHED.format(real=real, wrong=wrong, only=only, guarded=real != "torch.rand")
    rows = told(vllm_python.run("-c", text, status=1))[1]
    assert {name for name, row in rows.items() if row.verdict == "wrong"} == {wronged}


@pytest.mark.slow
@pytest.mark.build
def test_operation_without_a_kernel_is_a_failed_row_and_the_others_run(vllm_python: VllmPython) -> None:
    text = PATCHED.format(real="torch.cumsum", wrong=f"torch._assert(False, '{NO_KERNEL}')", only="cum", guarded=True)
    rows = told(vllm_python.run("-c", text, status=1))[1]
    assert rows["cumsum, float32"].verdict == "failed"
    assert rows["cumsum, float32"].reason == NO_KERNEL
    assert rows["cumprod, float32"].verdict == "right"


@pytest.mark.slow
@pytest.mark.build
def test_missing_gpu_gives_a_message_and_status_5(vllm_python: VllmPython) -> None:
    done = subprocess.run([vllm_python.python, *PROGRAM], env=dict(vllm_python.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (NO_GPU, "")
    assert done.stderr.startswith("PyTorch 2.9.0")
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_torch_gives_a_message_and_status_5() -> None:
    words = [sys.executable, "-S", *PROGRAM]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (NO_GPU, "")
    assert "no torch" in done.stderr


def test_row_is_printed_as_a_line() -> None:
    assert line(OperationResult("sort", 0.0, 0.0, 12.34, "right", "nothing is computed")).split() == [
        "sort", "0.0e+00", "0.0e+00", "12.3", "right"
    ]  # fmt: skip
    assert line(OperationResult("qr", bound=1e-5, reason=NO_KERNEL)).endswith(f"failed {NO_KERNEL}")
    assert "name" in Operation.__dataclass_fields__


# Stock and thin ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("thin_gpu", THIN)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def needs(tmp_path: Path) -> Path:
    """A folder with the two packages that the program needs in addition to torch."""
    folder = tmp_path / "needs"
    folder.mkdir()
    for module in (elftools, psutil):
        home = Path(str(module.__file__)).parent
        (folder / home.name).symlink_to(home)
    return folder


def row(**others: Any) -> Mapping[str, Any]:
    return vars(OperationResult("sort", 0.0, 0.0, 1.0, "right", "", "abc", True)) | others


@pytest.mark.parametrize(
    ("after", "where"),
    [
        (row(), "same"),
        (row(bits="xyz"), "off"),
        (row(bits="xyz", repeats=False), "loose"),
        (row(verdict="wrong", repeats=False), "off"),
        (row(verdict="failed", reason=NO_KERNEL, bits=""), "off"),
        (row(verdict="left out", error=None, reason="not on this card", bits=""), "off"),
    ],
)
def test_different_bits_and_failures_of_a_thin_torch_are_distinguished(
    thin_gpu: ModuleType, after: Mapping[str, Any], where: str
) -> None:
    found = dict(zip(("same", "loose", "off"), thin_gpu.compare({"sort": row()}, {"sort": after}), strict=True))
    assert [name for name, some in found.items() if some] == [where]


def test_operation_missing_with_the_thin_torch_does_not_pass(thin_gpu: ModuleType) -> None:
    assert [name for name, _ in thin_gpu.compare({"sort": row()}, {})[2]] == ["sort"]


@pytest.mark.slow
@pytest.mark.build
def test_torch_is_copied_thinned_and_compared_with_the_stock_torch(
    vllm_python: VllmPython, needs: Path, tmp_path: Path
) -> None:
    said = vllm_python.run(THIN, tmp_path / "thin", "--device", "cpu", "--arch", "7.0", before=needs)
    before, after = (float(one) for one in said.split("| libtorch_cuda.so |")[1].split("|")[:2])
    assert after < before / 4
    assert "| differ, or wrong, or failed | 0 |" in said
    stock = Path(str(vllm_python.python)).parent.parent
    libraries = next(stock.glob("lib/python*/site-packages/torch/lib/libtorch_cuda.so"))
    assert libraries.stat().st_size == pytest.approx(before * 1e6, rel=1e-3), "the stock one is as it was"
