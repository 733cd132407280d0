"""The GPU bundle has every kernel for 7.0 with inputs and expected results, and reports a missing GPU.

The tests make and inspect it without a GPU. docs/volta.md has the table of a run on a newer GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.image.test_stages import pipeline as checkout
from tests.support.checkouts import ROOT, doit, small_checkout
from tests.support.vllm_python import VllmPython
from tests.volta.test_run import has_driver
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.gpu import bundle
from voltforge.gpu.bundle import GpuError, NoGpuError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import NotRun
from voltforge.system import files

pytestmark = pytest.mark.build

KERNELS = (
    "kernel_unified_attention_2d", "kernel_unified_attention_3d", "reduce_segments", "reshape_and_cache_kernel_flash",
    "awq_dequantize_kernel", "awq_gemm_kernel", "fused_moe_kernel_gptq_awq", "gptq", "rms_norm", "rotary", "topk",
    "moe_align", "moe_wna16", "act_and_mul",
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle_file(vllm: Pipeline) -> Path:
    """The bundle of the wheel in the wheelhouse."""
    doit("gpu-bundle")
    return bundle.bundle(vllm).result().path


def run_bundle(path: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle outside the checkout."""
    return subprocess.run([sys.executable, path, *words], cwd=cwd, capture_output=True, text=True, timeout=600)


def test_bundle_has_every_kernel_and_passes_its_check(bundle_file: Path, tmp_path: Path) -> None:
    done = run_bundle(bundle_file, "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 flaws. No kernel was run, since that needs a GPU." in done.stdout
    listed = run_bundle(bundle_file, "--list", cwd=tmp_path).stdout
    for kernel in KERNELS:
        assert kernel in listed
    assert bundle_file.stat().st_size <= bundle.MAX_SIZE


def test_bundle_has_driver_bindings_for_every_python_and_the_code_of_the_checkout(
    bundle_file: Path, repository: Path
) -> None:
    with zipfile.ZipFile(bundle_file) as archive:
        names = archive.namelist()
        for tag in ("cp310", "cp311", "cp312", "cp313"):
            assert any(name.startswith(f"site/{tag}/cuda/bindings/driver.") for name in names)
        for name in bundle.CODE:
            assert archive.read(f"volta/{name}") == (repository / "volta" / name).read_bytes()


def test_bundle_without_a_gpu_ends_with_status_5(bundle_file: Path, tmp_path: Path) -> None:
    if has_driver():
        pytest.skip("this machine has a driver; CI has none")
    done = run_bundle(bundle_file, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "x this machine has no NVIDIA driver: libcuda.so.1 is not found\n"


def test_bundle_without_numpy_ends_with_status_2(bundle_file: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", bundle_file], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "x this bundle needs numpy: pip install numpy\n"


def test_verify_gpu_without_a_gpu_ends_with_status_5_and_a_hint(bundle_file: Path, repository: Path) -> None:
    if has_driver():
        pytest.skip("this machine has a driver; CI has none")
    done = subprocess.run(["./doit", "verify:gpu"], cwd=repository, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 5
    assert "x this machine has no NVIDIA driver" in done.stdout
    assert "copy the file that ./doit gpu-bundle makes" in done.stdout


def test_bundle_is_current_until_a_module_that_makes_rows_changes(
    bundle_file: Path, vllm: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = bundle.bundle(vllm)
    assert stage.current()
    monkeypatch.setattr(bundle, "MAKERS", (*bundle.MAKERS, "triton_kernels/case.py"))
    assert not stage.current()


ENDS = {
    "print('x no card at all'); sys.exit(5)": (NoGpuError, "no card at all"),
    "print('FAILED: a row'); sys.exit(1)": (GpuError, "a kernel has a wrong result"),
    "print('x the card was lost'); sys.exit(1)": (GpuError, "the card was lost"),
    "print('x verdicts.json cannot be written'); sys.exit(2)": (GpuError, "verdicts.json cannot be written"),
    "raise SystemExit(3)": (GpuError, "failed with status 3"),
}


@pytest.mark.parametrize("end", ENDS)
def test_errors_of_a_bundle_are_reported(end: str, tmp_path: Path) -> None:
    kind, words = ENDS[end]
    with pytest.raises(kind, match=words):
        bundle.verify(with_bundle(tmp_path, end))


def test_small_model_is_skipped_on_a_gpu_that_is_not_a_volta(tmp_path: Path) -> None:
    bundle.verify(with_bundle(tmp_path, 'open(sys.argv[2], "w").write(\'{"card": {"capability": [9, 0]}}\')'))


def with_bundle(root: Path, program: str) -> Pipeline:
    """Return a checkout whose bundle is this program."""
    pipeline = checkout(root)
    path = root / "bundle.py"
    path.write_text(f"import sys\n{program}\n")
    result = {"path": path.name, "sha256": files.sha256(path), "rows": 1, "launches": 1}
    files.write_json(bundle.bundle(pipeline).path, {"results": result})
    (root / "build" / "gpu").mkdir()
    return pipeline


def test_bundle_without_a_wheel_is_an_error(tmp_path: Path, toolchain: Toolchain) -> None:
    pipeline = small_checkout(tmp_path / "checkout")
    shutil.copytree(ROOT / "volta", pipeline.root / "volta")
    shutil.copy(ROOT / "recipes" / "locks" / "gpu-runner.txt", pipeline.root / "recipes" / "locks")
    files.write(pipeline.root / "recipes" / "locks" / "vllm-runtime.txt", "")
    with pytest.raises(NotRun, match="gpu-bundle has not run"):
        bundle.verify(pipeline)
    with pytest.raises(VoltforgeError, match="the wheelhouse has no vllm"):
        bundle.bundle(pipeline).run()


def test_recorded_row_passes_its_check(vllm_python: VllmPython, tmp_path: Path) -> None:
    vllm_python.run(
        "-m", "volta.gpu_rows.record_triton", tmp_path / "made.zip", "--only", "Experts(zeros=True)", "--jobs", "1"
    )
    with zipfile.ZipFile(tmp_path / "made.zip") as archive:
        listed = archive.read("rows.json").decode()
    assert '"kernels": "fused_moe_kernel_gptq_awq"' in listed
    done = subprocess.run(
        [sys.executable, "-m", "volta.gpu.run", "--bundle", tmp_path / "made.zip", "--check"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("1 rows with 1 launches; 0 flaws."), done.stderr
