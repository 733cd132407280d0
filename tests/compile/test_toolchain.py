"""A CUDA_HOME for the arch is found or assembled, and an unsuitable one is rejected with a reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.checkouts import pack
from tests.support.servers import Fault, serving
from voltforge.binary import fatbin
from voltforge.compile import toolchain as module
from voltforge.compile.toolchain import HostCompiler, Toolchain, ToolchainError
from voltforge.errors import VoltforgeError
from voltforge.sources.fetch import Store
from voltforge.sources.index import Indexes
from voltforge.sources.recipe import CudaRecipe, Source, load_cuda
from voltforge.system import files

COMPILERS = ("bin/nvcc", "bin/ptxas", "nvvm/bin/cicc", "g++/cc1plus", "g++/as")


@pytest.fixture
def recipe(repository: Path) -> CudaRecipe:
    return load_cuda(repository / "recipes" / "cuda.toml")


@pytest.fixture
def empty_store(tmp_path: Path) -> Store:
    """An empty store that may use no network."""
    return Store(tmp_path / "downloads", offline=True)


def toolkit(folder: Path, version: str) -> Path:
    """A stand-in for a toolkit: an nvcc that prints a version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return folder


def compile_for_sm_70(toolchain: Toolchain, tmp_path: Path) -> None:
    """Compile a kernel and check the device code of the library."""
    source, library = tmp_path / "kernel.cu", tmp_path / "kernel.so"
    source.write_text(
        "__global__ void twice(float *x) { x[threadIdx.x] *= 2; }\nvoid run(float *x) { twice<<<1, 32>>>(x); }\n"
    )
    words = [
        "-gencode=arch=compute_70,code=sm_70",
        "-cudart=shared",
        "-shared",
        "-Xcompiler=-fPIC",
        "-ccbin",
        str(toolchain.host.cxx),
    ]
    subprocess.run([toolchain.home / "bin/nvcc", *words, "-o", library, source], check=True)
    assert {image.name for image in fatbin.images(library)} == {"sm_70"}


def test_a_toolkit_of_cuda_13_is_refused_because_it_has_no_sm_70(recipe: CudaRecipe, tmp_path: Path) -> None:
    reason = module.unsuitable(recipe, toolkit(tmp_path / "cuda", "13.0"))
    assert reason is not None
    assert "13.0.88" in reason
    assert "removed compute capability 7.0" in reason


def test_a_toolkit_of_cuda_11_is_too_old(recipe: CudaRecipe, tmp_path: Path) -> None:
    assert "older than 12.0" in (module.unsuitable(recipe, toolkit(tmp_path / "cuda", "11.8")) or "")


def test_a_toolkit_without_headers_names_what_it_lacks(recipe: CudaRecipe, tmp_path: Path) -> None:
    reason = module.unsuitable(recipe, toolkit(tmp_path / "cuda", "12.4"))
    assert "include/cuda_runtime.h" in (reason or "")
    assert "nvvm/bin/cicc" in (reason or "")


def test_a_folder_without_nvcc_and_a_broken_nvcc_are_reported(recipe: CudaRecipe, tmp_path: Path) -> None:
    assert "has no bin/nvcc" in (module.unsuitable(recipe, tmp_path) or "")
    broken = toolkit(tmp_path / "cuda", "12.4")
    (broken / "bin/nvcc").write_text("#!/bin/sh\nexit 3\n")
    assert "does not run" in (module.unsuitable(recipe, broken) or "")
    (broken / "bin/nvcc").write_text("#!/bin/sh\necho hello\n")
    assert "prints no version" in (module.unsuitable(recipe, broken) or "")


def test_cuda_home_precedes_path_and_each_toolkit_is_tried_once(tmp_path: Path) -> None:
    named, found = toolkit(tmp_path / "named", "12.4"), toolkit(tmp_path / "found", "12.4")
    environ = {"CUDA_HOME": str(named), "CUDA_PATH": str(named), "PATH": str(found / "bin")}
    assert list(module.candidates(environ)) == [named, found]
    assert list(module.candidates({"PATH": str(tmp_path)})) == []


def test_all_reasons_are_listed_if_no_toolkit_works(recipe: CudaRecipe, tmp_path: Path, empty_store: Store) -> None:
    environ = {"CUDA_HOME": str(toolkit(tmp_path / "cuda", "13.0")), "PATH": ""}
    with pytest.raises(ToolchainError) as caught:
        module.select(recipe, "auto", empty_store, tmp_path / "made", environ)
    system, redist, distro = caught.value.reasons
    assert system.startswith("system: ")
    assert "13.0.88" in system
    assert "cuda_nvprune-linux-x86_64-12.8.90-archive.tar.xz" in redist, "the smallest is asked for first"
    assert recipe.distro.archives[0].file in distro
    assert "CUDA_HOME" in caught.value.hint


def test_one_origin_can_be_chosen_and_an_unknown_one_is_refused(
    recipe: CudaRecipe, tmp_path: Path, empty_store: Store
) -> None:
    with pytest.raises(ToolchainError) as caught:
        module.select(recipe, "distro", empty_store, tmp_path, {"PATH": ""})
    assert len(caught.value.reasons) == 1
    with pytest.raises(VoltforgeError, match="cuda=nix is not a valid choice"):
        module.select(recipe, "nix", empty_store, tmp_path)


def test_a_too_new_host_compiler_is_refused_with_the_one_to_install(tmp_path: Path) -> None:
    header = tmp_path / "include/crt/host_config.h"
    header.parent.mkdir(parents=True)
    header.write_text("#if __GNUC__ > 4\n#error unsupported GNU version\n#endif\n")
    with pytest.raises(ToolchainError, match=r"it needs g\+\+ 4 or older .*apt-get install g\+\+-4"):
        module.host_compiler(tmp_path)
    with pytest.raises(ToolchainError, match=r"no g\+\+ on PATH"):
        module.host_compiler(tmp_path, {"PATH": str(tmp_path)})


def test_an_archive_is_unpacked_while_another_is_downloading(recipe: CudaRecipe, tmp_path: Path) -> None:
    """The archives hold no compilers: that is found after all are unpacked, and nothing is left behind."""
    lock = tmp_path / "none.txt"
    lock.write_text("")
    hold = threading.Event()
    with serving() as server:
        sources = []
        for name in ("small", "large", "late"):
            folder = tmp_path / name
            (folder / "lib64").mkdir(parents=True)
            (folder / "lib64" / f"lib{name}.a").write_bytes(
                os.urandom({"small": 10, "large": 20_000, "late": 20_000}[name])
            )
            data = pack(folder, tmp_path / f"{name}.tar.gz").read_bytes()
            server.files[f"/{name}.tar.gz"] = data
            sha256 = files.sha256_bytes(data)
            sources.append(
                Source(file=f"{name}.tar.gz", sha256=sha256, size=len(data), url=f"{server.url}/{name}.tar.gz")
            )
        server.faults["/late.tar.gz"] = [Fault(hold=hold)]
        redist = recipe.redist.model_copy(update={"archives": tuple(sources), "lock": str(lock)})
        store = Store(tmp_path / "downloads", ask_indexes=lambda: Indexes(None), ask_archives=lambda: ())
        made = tmp_path / "made"
        unpacked: list[bool] = []

        def watch() -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not list(made.glob(".redist*/parts/1/**/liblarge.a")):
                time.sleep(0.01)
            unpacked.append(time.monotonic() < deadline and "/late.tar.gz" in server.paths())
            hold.set()

        watching = threading.Thread(target=watch)
        watching.start()
        with pytest.raises(ToolchainError, match="the archives lack bin/nvcc"):
            module.select(recipe.model_copy(update={"redist": redist}), "redist", store, made)
        watching.join()
    assert unpacked == [True]
    assert server.paths()[0] == "/small.tar.gz", "a host that cannot be reached is asked about the smallest"
    assert list(made.iterdir()) == []


@pytest.mark.slow
def test_a_complete_toolkit_in_cuda_home_is_used_unchanged(
    recipe: CudaRecipe, toolchain: Toolchain, empty_store: Store, tmp_path: Path
) -> None:
    environ = {**os.environ, "CUDA_HOME": str(toolchain.home)}
    chosen = module.select(recipe, "auto", empty_store, tmp_path / "made", environ)
    assert (chosen.origin, chosen.home, chosen.version) == ("system", toolchain.home, toolchain.version)


@pytest.mark.slow
def test_archives_of_nvidias_layout_are_assembled_and_compile(
    recipe: CudaRecipe, toolchain: Toolchain, tmp_path: Path
) -> None:
    """NVIDIA's archives could not be downloaded here; these hold the distribution's compilers in NVIDIA's layout."""
    folder = tmp_path / "cuda_nvcc-linux-x86_64-archive"
    for name in ("bin", "nvvm"):
        shutil.copytree(toolchain.home / name, folder / name)
    archive = tmp_path / "mirror" / "cuda_nvcc-linux-x86_64-archive.tar.gz"
    archive.parent.mkdir()
    subprocess.run(["tar", "-C", tmp_path, "-cf", archive, "--use-compress-program=gzip -1", folder.name], check=True)
    source = Source(file=archive.name, sha256=files.sha256(archive), url="https://nowhere.invalid/archive.tar.gz")
    redist = recipe.redist.model_copy(update={"archives": (source,), "lock": recipe.distro.lock})
    store = Store(tmp_path / "downloads", mirrors=(str(archive.parent),))
    made = module.select(recipe.model_copy(update={"redist": redist}), "redist", store, tmp_path / "made")
    assert made.origin == "redist"
    assert {name: made.identity[name] for name in COMPILERS} == {name: toolchain.identity[name] for name in COMPILERS}
    compile_for_sm_70(made, tmp_path)


@pytest.mark.slow
def test_the_toolkit_compiles_for_sm_70(toolchain: Toolchain, tmp_path: Path) -> None:
    compile_for_sm_70(toolchain, tmp_path)


@pytest.mark.slow
def test_the_toolkit_has_the_files_that_cmake_and_torch_need(toolchain: Toolchain) -> None:
    for name in (
        "bin/cuobjdump",
        "include/cusparse.h",
        "include/nvToolsExt.h",
        "lib64/libcublas.so",
        "lib64/libcudadevrt.a",
    ):
        assert (toolchain.home / name).exists(), name
    assert not list(toolchain.home.glob("bin/g*")), "Debian's wrappers call compilers of another release"


@pytest.mark.slow
def test_its_identity_is_the_content_of_the_compilers_and_the_version_of_gcc(toolchain: Toolchain) -> None:
    assert set(COMPILERS) < set(toolchain.identity)
    assert all(re.fullmatch(r"[0-9a-f]{64}", toolchain.identity[name]) for name in COMPILERS)
    version = subprocess.run(
        [toolchain.host.cxx, "-dumpfullversion"], capture_output=True, text=True, check=True
    ).stdout
    assert toolchain.identity["g++"] == version.strip()


@pytest.mark.slow
def test_the_toolkit_has_a_stub_of_the_driver_to_link_with(toolchain: Toolchain) -> None:
    assert (toolchain.home / "lib64/stubs/libcuda.so").resolve().name == "libcuda.so.1"


@pytest.mark.slow
def test_the_materials_are_the_compilers_and_what_the_toolkit_was_put_together_from(
    recipe: CudaRecipe, toolchain: Toolchain
) -> None:
    compilers = {material.name: material.sha256 for material in toolchain.materials if material.kind == "compiler"}
    assert {name: compilers[name] for name in COMPILERS} == {name: (toolchain.identity[name],) for name in COMPILERS}
    if toolchain.origin == "distro":
        assert {archive.sha256 for archive in recipe.distro.archives} <= {hashes[0] for hashes in compilers.values()}


def test_a_changed_compiler_changes_the_state_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    compiler = tmp_path / "cicc"
    compiler.write_text("one")
    host = HostCompiler(tmp_path / "g++", tmp_path / "gcc", "12.2.0")
    toolchain = Toolchain(tmp_path, "system", "12.4.131", host, {}, {"nvvm/bin/cicc": compiler})
    before = module.state(toolchain)
    assert module.state(toolchain) == before
    compiler.write_text("two")
    os.utime(compiler, ns=(1, 1))
    assert module.state(toolchain) != before
    compiler.unlink()
    with pytest.raises(FileNotFoundError):
        module.state(toolchain)
