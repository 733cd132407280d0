"""The PTX of vLLM's kernels comes from the build's own commands, and their cubins are the wheel's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT
from volta.gpu.rows import Image
from voltforge.errors import VoltforgeError
from voltforge.gpu import cuda_kernels
from voltforge.gpu.cuda_kernels import Bench, ImageError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files

TREE = Path("/build/tree")
COMMAND = (
    "/build/toolchain/bin/nvcc -forward-unknown-to-host-compiler -ccbin=/usr/bin/g++ -DTORCH_EXTENSION_NAME=_moe_C "
    "-I/build/tree/csrc/lean -isystem /build/toolchain/include -cudart=shared --objdir-as-tempdir "
    "-Xcompiler=-ffile-prefix-map=/build/tree=. -Xcudafe --diag_suppress=a,--diag_suppress=b --expt-relaxed-constexpr "
    "-O3 -DNDEBUG -std=c++17 -Xcompiler=-fPIC -DENABLE_FP8 --threads=1 -gencode arch=compute_70,code=sm_70 -gencode "
    "arch=compute_70,code=sm_70 -MD -MT CMakeFiles/_moe_C.dir/csrc/moe/moe_wna16.cu.o -MF "
    "CMakeFiles/_moe_C.dir/csrc/moe/moe_wna16.cu.o.d -x cu -c /build/tree/csrc/moe/moe_wna16.cu -o "
    "CMakeFiles/_moe_C.dir/csrc/moe/moe_wna16.cu.o"
)
"""As ninja has it for vLLM 0.12.0, with some of its options left out."""
SMALL = "csrc/permute_cols.cu"
"""The source that compiles in the shortest time."""


def compdb(command: str, source: str = "csrc/moe/moe_wna16.cu") -> str:
    return json.dumps([{"directory": "/elsewhere", "command": command, "file": f"{TREE}/{source}", "output": "x.o"}])


def words() -> list[str]:
    return cuda_kernels.commands(compdb(COMMAND), TREE)["csrc/moe/moe_wna16.cu"]


def test_what_asks_for_leave_before_the_compiler_is_left_out():
    asks = f"/build/environment/bin/python -I -S /build/gate/launcher.py {COMMAND}"
    assert cuda_kernels.commands(compdb(asks), TREE) == cuda_kernels.commands(compdb(COMMAND), TREE)


def test_a_command_is_changed_in_its_architecture_and_output_alone() -> None:
    made = cuda_kernels.rewritten(words(), Path("/build/home/x.fatbin"))
    before = COMMAND.replace(" -gencode arch=compute_70,code=sm_70", "")
    kept = before[: before.index(" -MD")].split()
    source = ["-x", "cu", "-fatbin", "/build/tree/csrc/moe/moe_wna16.cu"]
    assert made == [*kept, *source, cuda_kernels.GENCODE, "-o", "/build/home/x.fatbin"]


def test_nothing_is_written_where_the_build_wrote() -> None:
    assert not any("CMakeFiles" in word for word in cuda_kernels.rewritten(words(), Path("/build/home/x.fatbin")))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("code=sm_70", "code=sm_80", "code=sm_80"),
        ("-gencode arch=compute_70,code=sm_70", "--generate-code=arch=compute_90a,code=sm_90a", "compute_90a"),
        (" -gencode arch=compute_70,code=sm_70", "", "no architecture"),
        (" -c ", " -dc ", "sm_70"),
    ],
)
def test_a_command_for_another_card_or_of_another_kind_is_refused(old: str, new: str, said: str) -> None:
    command = cuda_kernels.commands(compdb(COMMAND.replace(old, new)), TREE)["csrc/moe/moe_wna16.cu"]
    with pytest.raises(ImageError, match=said):
        cuda_kernels.rewritten(command, Path("x.fatbin"))


def test_only_sources_of_the_tree_are_known() -> None:
    assert not cuda_kernels.commands(compdb(COMMAND), Path("/another/tree"))


def test_a_source_that_is_compiled_with_others_has_the_command_of_the_file_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "csrc/together").mkdir(parents=True)
    (tmp_path / "csrc/alone.cu").write_text('#include "a.cuh"\n')
    (tmp_path / "csrc/together/both.cu").write_text('#include <b.h>\n#include "../moe/a.cu"\n#include "c.cu"\n')
    commands = {"csrc/alone.cu": ["nvcc", "alone"], "csrc/together/both.cu": ["nvcc", "both"]}
    more = {"csrc/moe/a.cu": ["nvcc", "both"], "csrc/together/c.cu": ["nvcc", "both"]}
    assert cuda_kernels.followed(commands, tmp_path) == {**commands, **more}


def test_what_was_never_built_is_said_with_the_command_that_builds_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for folder in ("recipes", "patches"):
        shutil.copytree(ROOT / folder, bare / folder)
    with pytest.raises(VoltforgeError) as caught:
        cuda_kernels.images(Pipeline.load(bare, Settings()))
    assert "wheels:vllm" in caught.value.hint


def test_what_is_no_cubin_has_no_kernels() -> None:
    with pytest.raises(ImageError, match="no cubin"):
        cuda_kernels.kernels(b"not an ELF file at all")


@pytest.fixture(scope="module")
def images(vllm: Pipeline) -> dict[str, Image]:
    return cuda_kernels.images(vllm)


@pytest.fixture(scope="module")
def cubins(vllm: Pipeline) -> list[bytes]:
    package = cuda_kernels._package(vllm)
    return cuda_kernels.cubins(vllm.wheelhouse.path / package.wheels.result().file, vllm.toolchain.result())


@pytest.mark.slow
def test_a_work_folder_that_is_gone_is_said_with_what_brings_it_back(vllm: Pipeline, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    for folder in ("recipes", "patches", "build/stages", "wheelhouse"):
        shutil.copytree(vllm.root / folder, moved / folder)
    with pytest.raises(ImageError, match="work folder") as caught:
        cuda_kernels.images(Pipeline.load(moved, Settings()))
    assert "build/stages/build-vllm.json" in caught.value.hint
    assert (moved / "build/stages/build-vllm.json").is_file()
    assert [*(moved / "wheelhouse/receipts").glob("vllm-*.json")]


@pytest.mark.slow
def test_the_same_command_gives_the_wheels_own_bytes_and_leaves_the_build_alone(
    vllm: Pipeline, cubins: list[bytes], tmp_path: Path
) -> None:
    bench = Bench.of(vllm)
    before = files.folder_digest(bench.shop.folders["tree"]), sorted(bench.shop.folders["home"].iterdir())
    made = cuda_kernels.compiled(bench, SMALL, tmp_path / "log")
    assert (files.folder_digest(bench.shop.folders["tree"]), sorted(bench.shop.folders["home"].iterdir())) == before
    assert made.cubin in cubins
    assert ".target sm_70" in made.ptx
    assert set(cuda_kernels.entries(made.ptx)) == cuda_kernels.kernels(made.cubin)


@pytest.mark.slow
def test_a_source_that_the_build_does_not_know_is_refused(vllm: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not compile csrc/nothing"):
        cuda_kernels.compiled(Bench.of(vllm), "csrc/nothing.cu", tmp_path / "log")


@pytest.mark.slow
def test_every_image_has_the_wheels_cubin_and_ptx_for_all_its_kernels(
    images: dict[str, Image], cubins: list[bytes]
) -> None:
    assert tuple(images) == cuda_kernels.SOURCES
    for image in images.values():
        assert image.cubin in cubins
        assert set(cuda_kernels.entries(image.ptx)) == cuda_kernels.kernels(image.cubin)


@pytest.mark.slow
def test_what_was_compiled_once_is_not_compiled_again(
    vllm: Pipeline, images: dict[str, Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "compiled", None)
    assert cuda_kernels.images(vllm) == images


@pytest.mark.slow
def test_the_wheels_cubin_is_found_by_its_kernels_where_its_bytes_are_not_the_same(
    images: dict[str, Image], cubins: list[bytes]
) -> None:
    for image in images.values():
        assert cuda_kernels.the_wheels(Image(image.ptx, b"other bytes"), cubins) == image.cubin
    with pytest.raises(ImageError, match="nobodys_kernel"):
        cuda_kernels.the_wheels(Image(".visible .entry nobodys_kernel()"), cubins)


@pytest.mark.slow
def test_a_kernel_of_the_wheel_is_found_by_its_mangled_name(vllm: Pipeline, images: dict[str, Image]) -> None:
    name = "_ZN4vllm4gptq19shuffle_4bit_kernelEPjii"
    assert cuda_kernels.shipped(vllm, name) == [images["csrc/quantization/gptq/q_gemm.cu"].cubin]
    assert cuda_kernels.shipped(vllm, "_ZN4vllm7nothingEv") == []
