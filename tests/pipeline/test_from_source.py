"""PyTorch's own recipe builds a small package of PyTorch's shape, up to a kept wheel.

The recipe is the real one without the source and without the checks that only the whole of PyTorch can pass. The
locked environments, the toolchain, cuDNN, NCCL and MKL are the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.checkouts import PACKAGES, ROOT, pack, small_checkout
from tests.support.tally import Tally
from voltforge.binary.elf import Elf
from voltforge.commands import reproduce
from voltforge.compile.build import BuildError
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.sources.fetch import DownloadError
from voltforge.sources.options import OptionError
from voltforge.system import files
from voltforge.wheel import wheelfile

pytestmark = pytest.mark.slow
LEFT_OUT = ('"torch.linalg.solve', "imports =")
"""Lines of the recipe with checks that only the whole of PyTorch can pass."""


def torch_checkout(root: Path, settings: Settings | None = None) -> Pipeline:
    """A new checkout with PyTorch's recipe for a small package of its shape, beside the real one's environment."""
    real = Pipeline.load(ROOT, Settings(torch="source"))
    real.package(real.recipes["torch"]).stages["environment"].run()
    small_checkout(root)
    for name in ("torch-build.txt", "torch-runtime.txt"):
        os.link(ROOT / "recipes/locks" / name, root / "recipes/locks" / name)
    os.link(ROOT / "build/stages/environment-torch.json", root / "build/stages/environment-torch.json")
    (root / "recipes/saxpy.toml").unlink()
    sdist = pack(PACKAGES / "torch", root / "build/downloads/pytorch-v2.9.0.tar.gz")
    lines = (ROOT / "recipes/torch.toml").read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(LEFT_OUT))
    text = text.replace("[expect]\n", '[expect]\nimports = ["torch", "functorch"]\n', 1)
    source = real.recipes["torch"].source.sha256
    (root / "recipes/torch.toml").write_text(text.replace(source, files.sha256(sdist)))
    return Pipeline.load(root, settings or Settings(torch="source"))


def edited(pipeline: Pipeline, old: str, new: str) -> Pipeline:
    """The checkout after an edit of the recipe."""
    path = pipeline.root / "recipes/torch.toml"
    assert path.read_text().count(old) == 1, old
    path.write_text(path.read_text().replace(old, new))
    return Pipeline.load(pipeline.root, pipeline.settings)


def run(pipeline: Pipeline) -> wheelfile.Wheel:
    """Run every stage, and give the wheel that was kept."""
    for stage in pipeline.package(pipeline.recipes["torch"]).stages.values():
        stage.run()
    (kept,) = pipeline.wheelhouse.wheels()
    return kept


@pytest.fixture
def checkout(tmp_path: Path, toolchain: object) -> Pipeline:
    return torch_checkout(tmp_path / "checkout")


def test_pytorchs_recipe_makes_a_checked_and_reproducible_wheel(
    checkout: Pipeline, counted: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(checkout)
    assert re.fullmatch(r"torch-2\.9\.0\+sm70\.cu12\d-cp(\d+)-cp\1-linux_x86_64\.whl", kept.path.name)
    wanted = (checkout.root / "recipes/torch.toml").read_text().split('REQUIREMENTS = """\\')[1].split('"""')[0]
    pins = [pin.strip() for pin in wanted.replace("\\\n", "").split("|")]
    assert [str(requirement) for requirement in kept.requires] == pins
    wheelfile.unpack(kept.path, checkout.root / "content")
    library = Elf.read(checkout.root / "content/torch/lib/libtorch_cuda.so")
    assert {"libcudart.so.12", "libcudnn.so.9", "libnccl.so.2"} <= set(library.needed)
    assert {"$ORIGIN", "$ORIGIN/../../nvidia/cudnn/lib"} <= set(library.runpath)
    assert Elf.read(checkout.root / "content/torch/bin/torch_shm_manager").runpath == ("$ORIGIN/../lib",)
    receipt = json.loads(checkout.wheelhouse.receipt("torch", environment.python_tag()).read_text())
    assert receipt["results"]["commit"] == checkout.recipes["torch"].source.commit
    assert receipt["results"]["linked"] == {
        "torch/lib/libtorch_cuda.so": 2, "torch/lib/libtorch_cuda_linalg.so": 1, "torch/lib/libtorch_python.so": 0,
    }  # fmt: skip
    assert receipt["inputs"]["variables"]["USE_CUDNN"] == "1"
    found = {finding["check"]: finding for finding in receipt["results"]["findings"]}
    assert found["configuration"]["detail"].startswith("5 variables as in the recipe: USE_CUDA, USE_CUDNN")
    assert not run_again(checkout)
    monkeypatch.setenv("VOLTFORGE_MIRRORS", str(ROOT / "build/downloads"))
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    assert reproduce.wheel(checkout, "torch").tier == "identical"
    varied = files.read_json(checkout.scratch / "reproduce/torch.json")["variations"]
    counted("variations under which the hashes agreed", sum(not variation["same_because"] for variation in varied))


def run_again(pipeline: Pipeline) -> list[str]:
    stages = pipeline.package(pipeline.recipes["torch"]).stages
    return [kind for kind, stage in stages.items() if not stage.current()]


def test_without_cudnn_neither_the_library_nor_the_wheel_requires_it(tmp_path: Path, toolchain: object) -> None:
    pipeline = torch_checkout(tmp_path / "checkout", Settings(torch="source", cudnn="0"))
    kept = run(pipeline)
    assert kept.version.local.endswith(".nocudnn")
    assert "nvidia-cudnn-cu12" not in {requirement.name for requirement in kept.requires}
    wheelfile.unpack(kept.path, tmp_path / "content")
    assert "libcudnn.so.9" not in Elf.read(tmp_path / "content/torch/lib/libtorch_cuda.so").needed


def test_a_wheel_that_reports_another_configuration_is_not_kept(checkout: Pipeline) -> None:
    source = checkout.root / "torch"
    shutil.copytree(PACKAGES / "torch", source)
    text = (source / "CMakeLists.txt").read_text()
    assert text.count("USE_MPI=OFF") == 1
    (source / "CMakeLists.txt").write_text(text.replace("USE_MPI=OFF", "USE_MPI=ON"))
    before = checkout.recipes["torch"].source.sha256
    files.remove(checkout.scratch / "downloads" / before[:16])
    sdist = pack(source, checkout.scratch / "downloads/pytorch-v2.9.0.tar.gz")
    with pytest.raises(
        VoltforgeError, match="was not kept: configuration: it reports USE_MPI=ON, but was built with 0"
    ):
        run(edited(checkout, before, files.sha256(sdist)))
    assert not checkout.wheelhouse.wheels()


def test_an_unknown_option_is_refused_before_anything_is_compiled(checkout: Pipeline) -> None:
    with pytest.raises(OptionError, match="USE_CUDDN, perhaps meant for USE_CUDNN"):
        run(edited(checkout, 'USE_CUDA = "1"', 'USE_CUDA = "1"\nUSE_CUDDN = "1"'))
    assert not (checkout.scratch / "work").exists()


def test_a_missing_library_stops_the_build_at_configuration(checkout: Pipeline) -> None:
    with pytest.raises(BuildError, match="configured with USE_CUDNN=OFF, but the recipe has 1"):
        run(edited(checkout, '"{site}/nvidia/cudnn"', '"/nowhere"'))
    assert not list(checkout.scratch.rglob("*.cu.o"))


def test_a_missing_source_is_reported_with_its_hash_its_place_and_the_thin_wheel(
    checkout: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    files.remove(checkout.scratch / "downloads")
    pipeline = Pipeline.load(checkout.root, Settings(torch="source"))
    with pytest.raises(DownloadError) as caught:
        run(pipeline)
    said = str(caught.value)
    for part in ("pytorch-v2.9.0.tar.gz", pipeline.recipes["torch"].source.sha256, "build/downloads", "torch=thin"):
        assert part in said


SCRIPT = """
import sys
from pathlib import Path
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
pipeline = Pipeline.load(Path(sys.argv[1]), Settings(torch="source", jobs="1"))
pipeline.package(pipeline.recipes["torch"]).stages["build"].run()
"""


def test_a_build_killed_near_its_end_resumes_there(checkout: Pipeline) -> None:
    for kind in ("fetch", "tree", "environment"):
        checkout.package(checkout.recipes["torch"]).stages[kind].run()
    child = psutil.Popen(
        [sys.executable, "-c", SCRIPT, str(checkout.root)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    libraries: list[Path] = []
    deadline = time.monotonic() + 180
    while not libraries and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        libraries = list((checkout.scratch / "work").glob("*/tree/build/lib/libtorch_cuda.so"))
    family = child.children(recursive=True)
    child.send_signal(signal.SIGKILL)
    psutil.wait_procs([child, *family], timeout=10)
    before = made(checkout)
    assert "libtorch_cuda.so" in before
    run(checkout)
    after = made(checkout)
    assert {name: after[name] for name in before if name.endswith(".cu.o")} == {
        name: when for name, when in before.items() if name.endswith(".cu.o")
    }
    assert after["libtorch_cpu.so"] == before["libtorch_cpu.so"], "what was linked is not linked again"


def made(pipeline: Pipeline) -> dict[str, int]:
    """When each object and library was made."""
    build = next((pipeline.scratch / "work").glob("*/tree/build"))
    return {path.name: path.stat().st_mtime_ns for path in build.rglob("*") if path.suffix in (".o", ".so")}
