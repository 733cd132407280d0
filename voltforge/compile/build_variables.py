"""The environment variables of a build: PATH, the compilers, and the flags of gcc and nvcc (CUDAFLAGS)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from voltforge.compile.toolchain import Toolchain
from voltforge.sources.environment import Environment
from voltforge.sources.recipe import SourceRecipe
from voltforge.sources.tree import Tree

FOLDERS = ("tree", "environment", "toolchain", "dist", "home")
"""The folders that a build sees, by name; the sandbox decides their paths."""


def variables(recipe: SourceRecipe, tree: Tree, toolchain: Toolchain, places: Mapping[str, Path]) -> dict[str, str]:
    """Return the whole environment of a build, without the number of jobs.

    ``places`` are the paths at which the build sees its ``tree``, ``environment``, ``toolchain`` and ``home``. gcc's
    -ffile-prefix-map replaces each path in the compilers' output, so that no binary names a folder of the build.
    """
    tools = places["environment"], places["toolchain"]
    site = Environment(places["environment"]).site_packages
    maps = {
        places["tree"]: ".",
        site: "site-packages",
        places["environment"]: "environment",
        places["toolchain"]: "cuda",
    }
    mapped = [f"-ffile-prefix-map={path}={name}" for path, name in maps.items()]
    # The toolkit has no static runtime. --objdir-as-tempdir keeps nvcc's process id out of the names of temporary
    # files.
    cudaflags = " ".join(["-cudart=shared", "--objdir-as-tempdir", *(f"-Xcompiler={flag}" for flag in mapped)])
    filled = {"cuda": toolchain.tag, "environment": str(tools[0]), "site": str(site), "cudaflags": cudaflags}
    return {
        "PATH": ":".join([*(f"{folder}/bin" for folder in tools), str(toolchain.host.cxx.parent), "/usr/bin", "/bin"]),
        "HOME": str(places["home"]),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOURCE_DATE_EPOCH": str(tree.epoch),
        "NINJA_STATUS": "[%f/%t] ",
        "CC": str(toolchain.host.cc),
        "CXX": str(toolchain.host.cxx),
        "LIBRARY_PATH": ":".join(f"{places['toolchain']}/{folder}" for folder in ("lib64", "lib64/stubs")),
        "CUDA_HOME": str(places["toolchain"]),
        "CUDACXX": f"{places['toolchain']}/bin/nvcc",
        "CUDAHOSTCXX": str(toolchain.host.cxx),
        "CFLAGS": " ".join(mapped),
        "CXXFLAGS": " ".join(mapped),
        "CUDAFLAGS": cudaflags,
        **recipe.build.variables(**filled, **recipe.variables),
    }
