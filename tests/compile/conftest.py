"""Folders and a small build that several tests of compiling share."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltforge.compile.build import Build
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.toolchain import HostCompiler, Toolchain
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.environment import Environment
from voltforge.sources.tree import Tree


@pytest.fixture
def build_folders(tmp_path) -> dict[str, Path]:
    """A read-only folder and a writable folder."""
    folders = {"tree": tmp_path / "work" / "tree", "environment": tmp_path / "some" / "environment"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    return folders


@pytest.fixture
def build(tmp_path: Path, repository: Path) -> Build:
    """A build of one source without compilers."""
    tree, home = tmp_path / "source", tmp_path / "toolkit"
    for folder in (tree, home):
        folder.mkdir()
    (tree / "a.c").write_text("int a;")
    gcc = HostCompiler(Path("/usr/bin/g++"), Path("/usr/bin/gcc"), "12.2.0")
    toolkit = Toolchain(home, "distro", "12.4.131", gcc, {})
    recipe = Pipeline.load(repository, Settings()).recipes["vllm"]
    work = tmp_path / "build" / "work"
    return Build(recipe, Tree(tree, 0), Environment(home), toolkit, Sandbox("bubblewrap"), 1, work)
