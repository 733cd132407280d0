"""Debian's source of PyTorch 2.6.0, built with our recipe's options, in place of the 2.9.0 tarball.

Debian removes most vendored parts; tests/packages/pytorch/debian.toml lists their replacements.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.checkouts import PACKAGES
from voltforge.compile import jobs, sandbox
from voltforge.compile.build import Build
from voltforge.compile.toolchain import Toolchain
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches
from voltforge.sources.archive import unpack
from voltforge.sources.environment import Environment
from voltforge.sources.patches import Patch
from voltforge.sources.recipe import Source, SourceRecipe, read_toml
from voltforge.sources.tree import Tree
from voltforge.system import files

NEWER = {"USE_NVSHMEM", "USE_FBGEMM_GENAI"}
"""Options of the recipe that PyTorch has since 2.8."""
UNDONE = (
    ("tools/generate_torch_version.py", "version + '+debian'", 'os.environ["PYTORCH_BUILD_VERSION"]'),
    ("tools/setup_helpers/cmake.py", "max_jobs, '-v']", "max_jobs]"),
    ("CMakeLists.txt", "set(CMAKE_VERBOSE_MAKEFILE ON)", ""),
    ("CMakeLists.txt", 'to the shared objects" ON)', 'to the shared objects" OFF)'),
    ("cmake/Dependencies.cmake", "set(CUDNN_FRONTEND_INCLUDE_DIR /usr/include/)",
     "set(CUDNN_FRONTEND_INCLUDE_DIR ${PROJECT_SOURCE_DIR}/third_party/cudnn_frontend/include)"),
    ("cmake/Dependencies.cmake", '  add_library(fp16 STATIC "/usr/include/fp16.h")',
     '  find_file(FP16_HEADER fp16.h REQUIRED)\n  add_library(fp16 STATIC "${FP16_HEADER}")'),
)  # fmt: skip
"""Lines in which Debian's packaging has its own version, its own paths, or prints every command."""
DEVIATIONS = {
    "USE_SYSTEM_LIBS": "1",  # Debian removes the vendored parts
    "USE_FBGEMM": "0",  # not in Debian
    "USE_MKLDNN": "0",  # these three need more packages and no file that is compiled here
    "USE_XNNPACK": "0",
    "USE_PYTORCH_QNNPACK": "0",
}
VENDORED = {"cutlass": "cutlass_library/source/", "cudnn_frontend": ""}
"""Parts that come from wheels, by their folder in third_party/, with the folder in the wheel."""


def parts() -> dict[str, list[Source]]:
    """Return the files of the source: ``source``, ``packaging`` and ``packages`` of Debian, and :data:`VENDORED`."""
    found = read_toml(PACKAGES / "pytorch" / "debian.toml")
    lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: [Source.model_validate(one) for one in several] for name, several in lists.items()}


def upstream(pipeline: Pipeline, folder: Path) -> Tree:
    """Unpack the sources of 2.6.0 into the new ``folder``, without the parts that Debian removes."""
    folder.mkdir()
    [source] = parts()["source"]
    return Tree(folder, unpack(pipeline.store.get(source.artifact), folder))


def patched(pipeline: Pipeline, original: Tree) -> Tree:
    """Return a copy with Debian's patches, its packages for vendored parts in ``deb/usr``, and :data:`VENDORED`."""
    folder, known = original.path.with_name("patched"), parts()
    shutil.copytree(original.path, folder, symlinks=True)
    (folder / "debian").mkdir()
    [packaging] = known["packaging"]
    unpack(pipeline.store.get(packaging.artifact), folder / "debian")
    for line in (folder / "debian/patches/series").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            patches.apply(Patch(folder / "debian/patches" / line.strip(), line.strip(), ""), folder)
    for name, old, new in UNDONE:
        text = (folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new))
    for package in known["packages"]:
        part = original.path.with_name("package")
        part.mkdir()
        unpack(pipeline.store.get(package.artifact), part)  # without its single top folder, usr
        shutil.copytree(part, folder / "deb/usr", symlinks=True, dirs_exist_ok=True)
        files.remove(part)
    for name, inside in VENDORED.items():
        [wheel] = known[name]
        with zipfile.ZipFile(pipeline.store.get(wheel.artifact)) as archive:
            headers = tuple(f"{inside}{place}include/" for place in ("", "tools/util/"))
            for member in archive.namelist():
                if member.startswith(headers) and not member.endswith("/"):
                    target = folder / "third_party" / name / member.removeprefix(inside)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
    return Tree(folder, original.epoch)


def build_of(
    pipeline: Pipeline, patched: Tree, toolchain: Toolchain, work: Path, env: Mapping[str, str] | None = None
) -> Build:
    """Return a build with the recipe's options, without those that 2.6.0 and Debian lack, and with ``env``."""
    recipe = pipeline.recipes["torch"]
    assert isinstance(recipe, SourceRecipe)
    pipeline.package(recipe).stages["environment"].run()
    environment = Environment(pipeline.scratch / "environments" / "torch-build")
    chosen = sandbox.choose("auto")
    system = f"{chosen.place('tree', work / 'tree')}/deb/usr"
    own = {name: value for name, value in recipe.build.env.items() if name not in NEWER}
    own |= {**DEVIATIONS, "CMAKE_PREFIX_PATH": f"{{environment}};{system}"}
    own |= {"LD_LIBRARY_PATH": f"{system}/lib/x86_64-linux-gnu", **(env or {})}
    changed = {"version": "2.6.0", "build": recipe.build.model_copy(update={"env": own, "options": ()})}
    count, _ = jobs.count("", recipe.build.memory_per_job)
    return Build(recipe.model_copy(update=changed), patched, environment, toolchain, chosen, count, work)


def configured(build: Build) -> list[str]:
    """Run CMake in a prepared build and return its output by lines."""
    log = build.work / "configure.log"
    build.run([build.places["environment"] / "bin/python", "setup.py", "build", "--cmake-only"], log=log)
    return log.read_text(errors="replace").splitlines()
