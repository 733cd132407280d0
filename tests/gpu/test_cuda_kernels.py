"""The PTX of vLLM's kernels is made with the commands of the build, and the cubins are those of the wheel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT
from volta.gpu.rows import Image
from voltforge.errors import VoltforgeError
from voltforge.gpu import cuda_kernels
from voltforge.gpu.cuda_kernels import BuildCommands, CudaKernelError
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
"""ninja's command for vLLM 0.12.0, without some of its options."""
SMALL = "csrc/permute_cols.cu"
"""The source with the shortest compile time."""


def compdb(command: str, source: str = "csrc/moe/moe_wna16.cu") -> str:
    return json.dumps([{"directory": "/elsewhere", "command": command, "file": f"{TREE}/{source}", "output": "x.o"}])


def command_words() -> list[str]:
    return cuda_kernels.parse_compdb(compdb(COMMAND), TREE)["csrc/moe/moe_wna16.cu"]


def test_launcher_of_the_scheduler_is_removed_from_the_command() -> None:
    launched = f"/build/environment/bin/python -I -S /build/gate/launcher.py {COMMAND}"
    assert cuda_kernels.parse_compdb(compdb(launched), TREE) == cuda_kernels.parse_compdb(compdb(COMMAND), TREE)


def test_only_architecture_and_output_of_a_command_change() -> None:
    command = cuda_kernels.fatbin_command(command_words(), Path("/build/home/x.fatbin"))
    before = COMMAND.replace(" -gencode arch=compute_70,code=sm_70", "")
    kept = before[: before.index(" -MD")].split()
    source = ["-x", "cu", "-fatbin", "/build/tree/csrc/moe/moe_wna16.cu"]
    assert command == [*kept, *source, cuda_kernels.GENCODE, "-o", "/build/home/x.fatbin"]


def test_changed_command_writes_no_file_of_the_build() -> None:
    assert not any(
        "CMakeFiles" in word for word in cuda_kernels.fatbin_command(command_words(), Path("/build/home/x.fatbin"))
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("code=sm_70", "code=sm_80", "code=sm_80"),
        ("-gencode arch=compute_70,code=sm_70", "--generate-code=arch=compute_90a,code=sm_90a", "compute_90a"),
        (" -gencode arch=compute_70,code=sm_70", "", "no architecture"),
        (" -c ", " -dc ", "sm_70"),
    ],
)
def test_command_for_another_architecture_or_without_a_compile_is_an_error(old: str, new: str, message: str) -> None:
    command = cuda_kernels.parse_compdb(compdb(COMMAND.replace(old, new)), TREE)["csrc/moe/moe_wna16.cu"]
    with pytest.raises(CudaKernelError, match=message):
        cuda_kernels.fatbin_command(command, Path("x.fatbin"))


def test_sources_outside_the_tree_are_ignored() -> None:
    assert not cuda_kernels.parse_compdb(compdb(COMMAND), Path("/another/tree"))


def test_included_source_gets_the_command_of_the_including_source(tmp_path: Path) -> None:
    (tmp_path / "csrc/together").mkdir(parents=True)
    (tmp_path / "csrc/alone.cu").write_text('#include "a.cuh"\n')
    (tmp_path / "csrc/together/both.cu").write_text('#include <b.h>\n#include "../moe/a.cu"\n#include "c.cu"\n')
    commands = {"csrc/alone.cu": ["nvcc", "alone"], "csrc/together/both.cu": ["nvcc", "both"]}
    more = {"csrc/moe/a.cu": ["nvcc", "both"], "csrc/together/c.cu": ["nvcc", "both"]}
    assert cuda_kernels.with_included_sources(commands, tmp_path) == {**commands, **more}


def test_missing_build_is_an_error_with_the_build_command(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for folder in ("recipes", "patches"):
        shutil.copytree(ROOT / folder, bare / folder)
    with pytest.raises(VoltforgeError) as caught:
        cuda_kernels.images(Pipeline.load(bare, Settings()))
    assert "wheels:vllm" in caught.value.hint


def test_kernels_of_an_invalid_cubin_are_an_error() -> None:
    with pytest.raises(CudaKernelError, match="not a cubin"):
        cuda_kernels.cubin_kernels(b"not an ELF file at all")


@pytest.fixture(scope="module")
def images(vllm: Pipeline) -> dict[str, Image]:
    return cuda_kernels.images(vllm)


@pytest.fixture(scope="module")
def cubins(vllm: Pipeline) -> list[bytes]:
    wheel = vllm.package(vllm.recipes["vllm"]).wheels.result()
    return cuda_kernels.wheel_cubins(vllm.wheelhouse.path / wheel.file, vllm.toolchain.result())


@pytest.mark.slow
def test_missing_work_folder_is_an_error_with_the_rebuild_command(vllm: Pipeline, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    for folder in ("recipes", "patches", "build/stages", "wheelhouse"):
        shutil.copytree(vllm.root / folder, moved / folder)
    (moved / "build/toolchains").symlink_to(vllm.root / "build/toolchains")  # records name it relative to the checkout
    with pytest.raises(CudaKernelError, match="work folder") as caught:
        cuda_kernels.images(Pipeline.load(moved, Settings()))
    assert "build/stages/build-vllm.json" in caught.value.hint
    assert (moved / "build/stages/build-vllm.json").is_file()
    assert [*(moved / "wheelhouse/receipts").glob("vllm-*.json")]


@pytest.mark.slow
def test_same_command_gives_the_wheels_cubin_and_does_not_change_the_build(
    vllm: Pipeline, cubins: list[bytes], tmp_path: Path
) -> None:
    build = BuildCommands.of(vllm)
    before = files.folder_digest(build.build.folders["tree"]), sorted(build.build.folders["home"].iterdir())
    image = cuda_kernels.compile_source(build, SMALL, tmp_path / "log")
    assert (
        files.folder_digest(build.build.folders["tree"]),
        sorted(build.build.folders["home"].iterdir()),
    ) == before
    assert image.cubin in cubins
    assert ".target sm_70" in image.ptx
    assert set(cuda_kernels.ptx_kernels(image.ptx)) == cuda_kernels.cubin_kernels(image.cubin)


@pytest.mark.slow
def test_source_outside_the_build_is_an_error(vllm: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(CudaKernelError, match="does not compile csrc/nothing"):
        cuda_kernels.compile_source(BuildCommands.of(vllm), "csrc/nothing.cu", tmp_path / "log")


@pytest.mark.slow
def test_every_image_has_the_wheels_cubin_and_ptx_of_the_same_kernels(
    images: dict[str, Image], cubins: list[bytes]
) -> None:
    assert tuple(images) == cuda_kernels.SOURCES
    for image in images.values():
        assert image.cubin in cubins
        assert set(cuda_kernels.ptx_kernels(image.ptx)) == cuda_kernels.cubin_kernels(image.cubin)


@pytest.mark.slow
def test_kept_images_are_reused(vllm: Pipeline, images: dict[str, Image], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "compile_source", None)
    assert cuda_kernels.images(vllm) == images


@pytest.mark.slow
def test_wheels_cubin_with_other_bytes_is_found_by_its_kernels(images: dict[str, Image], cubins: list[bytes]) -> None:
    for image in images.values():
        assert cuda_kernels.matching_cubin(Image(image.ptx, b"other bytes"), cubins) == image.cubin
    with pytest.raises(CudaKernelError, match="nobodys_kernel"):
        cuda_kernels.matching_cubin(Image(".visible .entry nobodys_kernel()"), cubins)
