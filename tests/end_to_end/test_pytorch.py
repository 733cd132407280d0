"""The recipe for PyTorch from source, tried on a PyTorch that can be had: Debian's 2.6.0, as far as it goes.

The release tarball of 2.9.0 lies on a host that many machines do not reach. Debian's archive has the source of 2.6.0
without most vendored parts: it is configured to the end, its code is generated, and c10 and some sources of ATen
are compiled, with the recipe's options, its locked environment, the toolchain and the sandbox. The rest of the way, to
an installed wheel, is gone by a small package of PyTorch's shape in tests/pipeline/test_from_source.py.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import debian, selection
from tests.support.samples import listed_by_cuobjdump
from voltforge.binary.elf import Elf
from voltforge.compile.build import Build, BuildError
from voltforge.compile.toolchain import Toolchain
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import options
from voltforge.sources.options import OptionError
from voltforge.sources.recipe import SourceRecipe
from voltforge.sources.tree import Tree

pytestmark = pytest.mark.slow

ATEN = "caffe2/CMakeFiles/torch_cuda.dir/__/aten/src/ATen/native"
KERNELS = (
    "cuda/FillKernel", "cuda/RangeFactories", "cuda/AbsKernel",
    "transformers/cuda/mem_eff_attention/kernels/cutlassB_f16_aligned_k32",
)  # fmt: skip


INPUTS = (
    "recipes/torch.toml", "recipes/cuda.toml", "recipes/locks/torch-build.txt", "patches/torch/*",
    "voltforge/compile/*.py", "voltforge/sources/options.py",
    "tests/support/debian.py", "tests/end_to_end/test_pytorch.py",
)  # fmt: skip
"""The files that decide what these tests compile; the versions of the compilers are added."""


@pytest.fixture(scope="module", autouse=True)
def _changed(request: pytest.FixtureRequest, toolchain: Toolchain) -> Iterator[None]:
    """Skip the module if it passed with the same inputs: it takes minutes, and its answer stands."""
    inputs = selection.digest(INPUTS, toolchain.version, toolchain.host.version, platform.python_version())
    if selection.has_passed("pytorch", inputs):
        pytest.skip(f"passed with the same recipe and build, {inputs[:16]} in tests/records/results.json")
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        selection.record("pytorch", inputs)


@pytest.fixture(scope="module")
def pipeline(repository: Path) -> Pipeline:
    return Pipeline.load(repository, Settings(torch="source"))


@pytest.fixture(scope="module")
def recipe(pipeline: Pipeline) -> SourceRecipe:
    found = pipeline.recipes["torch"]
    assert isinstance(found, SourceRecipe)
    return found


@pytest.fixture(scope="module")
def upstream(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return debian.upstream(pipeline, tmp_path_factory.mktemp("pytorch") / "upstream")


@pytest.fixture(scope="module")
def patched(pipeline: Pipeline, upstream: Tree) -> Tree:
    return debian.patched(pipeline, upstream)


@pytest.fixture(scope="module")
def build(pipeline: Pipeline, patched: Tree, toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Build:
    made = debian.build_of(pipeline, patched, toolchain, tmp_path_factory.mktemp("work"))
    made.prepare()
    return made


@pytest.fixture(scope="module")
def summary(build: Build) -> list[str]:
    """Return the lines that CMake prints while it configures."""
    return debian.configured(build)


def ninja(build: Build, *targets: str) -> list[Path]:
    """Build some targets, and give their files."""
    tool = build.places["environment"] / "bin/ninja"
    build.run([tool, "-C", "build", f"-j{build.jobs}", *targets], log=build.work / "ninja.log")
    return [build.work / "tree/build" / target for target in targets]


def test_source_has_every_option_of_the_recipe_except_newer_ones(recipe: SourceRecipe, upstream: Tree) -> None:
    with pytest.raises(OptionError) as caught:
        options.check_variables(recipe, upstream.path)
    assert set(caught.value.unknown) == debian.NEWER


def test_misspelt_option_is_refused_with_a_suggestion(recipe: SourceRecipe, upstream: Tree) -> None:
    env = {name: value for name, value in recipe.build.env.items() if name not in debian.NEWER} | {"USE_CUDDN": "1"}
    misspelt = recipe.model_copy(update={"build": recipe.build.model_copy(update={"env": env})})
    with pytest.raises(OptionError) as caught:
        options.check_variables(misspelt, upstream.path)
    assert caught.value.unknown == {"USE_CUDDN": ["USE_CUDNN"]}


def test_configuration_matches_the_recipe(build: Build, summary: list[str]) -> None:
    told = dict(match.groups() for line in summary if (match := re.match(r"--\s+([\w ]+?)\s+: (.*)", line)))
    assert told["cuDNN version"] == "9.10.2"
    assert (told["BLAS"], told["LAPACK"], told["USE_NCCL"], told["USE_SYSTEM_NCCL"]) == ("mkl", "mkl", "1", "ON")
    assert (told["USE_FLASH_ATTENTION"], told["USE_MEM_EFF_ATTENTION"]) == ("0", "1")
    assert not [line for line in summary if options.contradiction(line, build.recipe.build.env)]
    compiled_for = set(re.findall(r"arch=compute_\w+,code=\w+", (build.work / "tree/build/build.ninja").read_text()))
    assert compiled_for == {"arch=compute_70,code=sm_70"}


def test_missing_library_stops_the_build_before_compilation(
    pipeline: Pipeline, patched: Tree, toolchain: Toolchain, tmp_path: Path
) -> None:
    made = debian.build_of(pipeline, patched, toolchain, tmp_path / "work", {"CUDNN_ROOT": "/nowhere"})
    with pytest.raises(BuildError, match="configured with USE_CUDNN=OFF, but the recipe has 1"):
        made.compile(tmp_path / "log")
    assert not list((tmp_path / "work").rglob("*.cu.o"))


@pytest.mark.usefixtures("summary")
def test_c10_is_compiled_and_loads(build: Build, toolchain: Toolchain) -> None:
    c10, c10_cuda = ninja(build, "lib/libc10.so", "lib/libc10_cuda.so")
    assert {"libc10.so", "libcudart.so.12"} <= set(Elf.read(c10_cuda).needed)
    program = "import ctypes, sys; [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:]]"
    runtime = toolchain.home / "lib64/libcudart.so.12"
    needed = {"LD_LIBRARY_PATH": str(build.work / "tree/deb/usr/lib/x86_64-linux-gnu")}  # of Debian's cpuinfo
    subprocess.run([build.environment.python, "-c", program, runtime, c10, c10_cuda], check=True, env=needed)
    ninja(build, "gen_torch_version")
    assert "__version__ = '2.6.0+sm70.cu" in (build.work / "tree/torch/version.py").read_text()


@pytest.mark.usefixtures("summary")
def test_cuda_sources_of_aten_are_compiled_only_for_sm_70(build: Build, toolchain: Toolchain) -> None:
    for made in ninja(build, *(f"{ATEN}/{kernel}.cu.o" for kernel in KERNELS)):
        assert listed_by_cuobjdump(toolchain, made) == {"sm_70": 1}
        ptx = subprocess.run([toolchain.home / "bin/cuobjdump", "-lptx", made], capture_output=True, text=True)
        assert ".ptx" not in ptx.stdout
        assert str(build.work).encode() not in made.read_bytes()


@pytest.mark.usefixtures("summary")
def test_cudnn_attention_is_compiled(build: Build) -> None:
    [made] = ninja(build, f"{ATEN}/cudnn/MHA.cpp.o")
    assert b"run_cudnn_SDP_fprop" in made.read_bytes()
