"""The recipe for PyTorch from source, tried on a PyTorch that can be had: Debian's 2.6.0, as far as it goes.

The release tarball of 2.9.0 lies on a host that many machines do not reach. Debian's archive has the source of 2.6.0
without most vendored parts: it is configured to the end, its code is generated, and c10 and some CUDA sources of ATen
are compiled, with the recipe's options, its locked environment, the toolchain and the sandbox. The rest of the way, to
an installed wheel, is gone by a small package of PyTorch's shape in tests/test_compiled.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checkouts import PACKAGES
from tests.samples import listed_by_cuobjdump
from voltforge import build, files, jobs, options, sandbox, tree
from voltforge.build import BuildError, Workshop
from voltforge.checkout import Settings
from voltforge.elf import Elf
from voltforge.environment import Environment
from voltforge.options import OptionError
from voltforge.pipeline import Pipeline
from voltforge.recipe import Source, SourceRecipe, parsed
from voltforge.toolchain import Toolchain
from voltforge.tree import Patch, Tree

pytestmark = pytest.mark.slow

NEWER = {"USE_NVSHMEM", "USE_FBGEMM_GENAI"}
"""Options of the recipe that PyTorch has since 2.8."""
UNDONE = (
    ("tools/generate_torch_version.py", "version + '+debian'", 'os.environ["PYTORCH_BUILD_VERSION"]'),
    ("tools/setup_helpers/cmake.py", "max_jobs, '-v']", "max_jobs]"),
    ("CMakeLists.txt", "set(CMAKE_VERBOSE_MAKEFILE ON)", ""),
    ("CMakeLists.txt", 'to the shared objects" ON)', 'to the shared objects" OFF)'),
    ("cmake/Dependencies.cmake", "set(CUDNN_FRONTEND_INCLUDE_DIR /usr/include/)", ""),
    ("cmake/Dependencies.cmake", '  add_library(fp16 STATIC "/usr/include/fp16.h")',
     '  find_file(FP16_HEADER fp16.h REQUIRED)\n  add_library(fp16 STATIC "${FP16_HEADER}")'),
)  # fmt: skip
"""Where Debian's packaging has its own version, its own paths, or prints every command."""
DEVIATIONS = {
    "USE_SYSTEM_LIBS": "1",  # the vendored parts are gone
    "USE_FBGEMM": "0",  # not in Debian
    "USE_MKLDNN": "0",  # these three would take more packages, and nothing that is compiled here
    "USE_XNNPACK": "0",
    "USE_PYTORCH_QNNPACK": "0",
}
KERNELS = ("FillKernel", "RangeFactories", "AbsKernel")


@pytest.fixture(scope="module")
def pipeline(repository: Path) -> Pipeline:
    return Pipeline.load(repository, Settings())


@pytest.fixture(scope="module")
def recipe(pipeline: Pipeline) -> SourceRecipe:
    found = pipeline.recipes["torch"]
    assert isinstance(found, SourceRecipe)
    return found


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Source]]:
    """The files in Debian's archive."""
    found = parsed(PACKAGES / "pytorch" / "debian.toml")
    lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: [Source.model_validate(one) for one in several] for name, several in lists.items()}


@pytest.fixture(scope="module")
def upstream(pipeline: Pipeline, parts: dict[str, list[Source]], tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The sources of 2.6.0, as upstream has them but for what Debian left out."""
    folder = tmp_path_factory.mktemp("pytorch") / "upstream"
    folder.mkdir()
    [source] = parts["source"]
    return Tree(folder, tree.unpack(pipeline.store.get(source.artifact), folder))


@pytest.fixture(scope="module")
def patched(pipeline: Pipeline, parts: dict[str, list[Source]], upstream: Tree) -> Tree:
    """The same with Debian's patches, and with the packages that stand in for vendored parts in ``deb/usr``."""
    folder = upstream.path.with_name("patched")
    shutil.copytree(upstream.path, folder, symlinks=True)
    (folder / "debian").mkdir()
    [packaging] = parts["packaging"]
    tree.unpack(pipeline.store.get(packaging.artifact), folder / "debian")
    for line in (folder / "debian/patches/series").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            tree.apply(Patch(folder / "debian/patches" / line.strip(), line.strip(), ""), folder)
    for name, old, new in UNDONE:
        text = (folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new))
    for package in parts["packages"]:
        part = upstream.path.with_name("package")
        part.mkdir()
        tree.unpack(pipeline.store.get(package.artifact), part)  # its single top folder, usr, is left out
        shutil.copytree(part, folder / "deb/usr", symlinks=True, dirs_exist_ok=True)
        files.remove(part)
    return Tree(folder, upstream.epoch)


def workshop(
    pipeline: Pipeline, recipe: SourceRecipe, grown: Tree, toolchain: Toolchain, work: Path, env: Mapping[str, str]
) -> Workshop:
    """A place for the build with the recipe's options, but for what 2.6.0 and Debian do not have, and ``env``."""
    pipeline.package(recipe).stage("environment").run()
    environment = Environment(pipeline.scratch / "environments" / "torch-build")
    around = sandbox.choose("auto")
    system = f"{around.place('tree', work / 'tree')}/deb/usr"
    own = {name: value for name, value in recipe.build.env.items() if name not in NEWER}
    own |= {**DEVIATIONS, "CMAKE_PREFIX_PATH": f"{{environment}};{system}"}
    own |= {"LD_LIBRARY_PATH": f"{system}/lib/x86_64-linux-gnu", **env}
    changed = {"version": "2.6.0", "build": recipe.build.model_copy(update={"env": own, "options": ()})}
    count, _ = jobs.count("", recipe.build.memory_per_job)
    return Workshop(recipe.model_copy(update=changed), grown, environment, toolchain, around, count, work)


@pytest.fixture(scope="module")
def shop(
    pipeline: Pipeline, recipe: SourceRecipe, patched: Tree, toolchain: Toolchain,
    tmp_path_factory: pytest.TempPathFactory,
) -> Workshop:  # fmt: skip
    made = workshop(pipeline, recipe, patched, toolchain, tmp_path_factory.mktemp("work"), {})
    made.prepare()
    return made


@pytest.fixture(scope="module")
def summary(shop: Workshop) -> list[str]:
    """What configuring said, line by line."""
    log = shop.work / "configure.log"
    shop.run([shop.places["environment"] / "bin/python", "setup.py", "build", "--cmake-only"], log=log)
    return log.read_text(errors="replace").splitlines()


def ninja(shop: Workshop, *targets: str) -> list[Path]:
    """Build some targets, and give their files."""
    tool = shop.places["environment"] / "bin/ninja"
    shop.run([tool, "-C", "build", f"-j{shop.jobs}", *targets], log=shop.work / "ninja.log")
    return [shop.work / "tree/build" / target for target in targets]


def test_the_source_knows_every_option_of_the_recipe_but_the_newer_ones(recipe: SourceRecipe, upstream: Tree) -> None:
    with pytest.raises(OptionError) as caught:
        options.check(recipe, upstream.path)
    assert set(caught.value.unknown) == NEWER


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(recipe: SourceRecipe, upstream: Tree) -> None:
    env = {name: value for name, value in recipe.build.env.items() if name not in NEWER} | {"USE_CUDDN": "1"}
    misspelt = recipe.model_copy(update={"build": recipe.build.model_copy(update={"env": env})})
    with pytest.raises(OptionError) as caught:
        options.check(misspelt, upstream.path)
    assert caught.value.unknown == {"USE_CUDDN": ["USE_CUDNN"]}


def test_it_is_configured_as_the_recipe_says(shop: Workshop, summary: list[str]) -> None:
    told = dict(match.groups() for line in summary if (match := re.match(r"--\s+([\w ]+?)\s+: (.*)", line)))
    assert told["cuDNN version"] == "9.10.2"
    assert (told["BLAS"], told["LAPACK"], told["USE_NCCL"], told["USE_SYSTEM_NCCL"]) == ("mkl", "mkl", "1", "ON")
    assert (told["USE_FLASH_ATTENTION"], told["USE_MEM_EFF_ATTENTION"]) == ("0", "1")
    assert not [line for line in summary if options.contradicted(line, shop.recipe.build.env)]
    compiled_for = set(re.findall(r"arch=compute_\w+,code=\w+", (shop.work / "tree/build/build.ninja").read_text()))
    assert compiled_for == {"arch=compute_70,code=sm_70"}


def test_a_library_that_is_not_found_ends_the_build_before_anything_is_compiled(
    pipeline: Pipeline, recipe: SourceRecipe, patched: Tree, toolchain: Toolchain, tmp_path: Path
) -> None:
    made = workshop(pipeline, recipe, patched, toolchain, tmp_path / "work", {"CUDNN_ROOT": "/nowhere"})
    with pytest.raises(BuildError, match="configured with USE_CUDNN=OFF, where the recipe has 1"):
        build.compile(made, tmp_path / "log")
    assert not list((tmp_path / "work").rglob("*.cu.o"))


@pytest.mark.usefixtures("summary")
def test_c10_is_compiled_and_loads(shop: Workshop, toolchain: Toolchain) -> None:
    c10, c10_cuda = ninja(shop, "lib/libc10.so", "lib/libc10_cuda.so")
    assert {"libc10.so", "libcudart.so.12"} <= set(Elf.read(c10_cuda).needed)
    program = "import ctypes, sys; [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:]]"
    runtime = toolchain.home / "lib64/libcudart.so.12"
    needed = {"LD_LIBRARY_PATH": str(shop.work / "tree/deb/usr/lib/x86_64-linux-gnu")}  # of Debian's cpuinfo
    subprocess.run([shop.environment.python, "-c", program, runtime, c10, c10_cuda], check=True, env=needed)
    ninja(shop, "gen_torch_version")
    assert "__version__ = '2.6.0+sm70.cu" in (shop.work / "tree/torch/version.py").read_text()


@pytest.mark.usefixtures("summary")
def test_cuda_sources_of_aten_are_compiled_for_sm_70_alone(shop: Workshop, toolchain: Toolchain) -> None:
    folder = "caffe2/CMakeFiles/torch_cuda.dir/__/aten/src/ATen/native/cuda"
    for made in ninja(shop, *(f"{folder}/{kernel}.cu.o" for kernel in KERNELS)):
        assert listed_by_cuobjdump(toolchain, made) == {"sm_70": 1}
        ptx = subprocess.run([toolchain.home / "bin/cuobjdump", "-lptx", made], capture_output=True, text=True)
        assert ".ptx" not in ptx.stdout
        assert str(shop.work).encode() not in made.read_bytes()
