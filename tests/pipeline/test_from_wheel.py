"""A stock wheel is thinned once, and again only if an input changes."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT, small_checkout
from tests.support.samples import two_units, wheel
from tests.support.tally import Tally
from voltforge.commands import reproduce
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.sources.recipe import load_all
from voltforge.system import files

RECIPE = """\
name = "torch"
variant = "thin"
version = "2.9.0"
arch = ["7.0"]

[[wheels]]
index = "torch"
file = "{file}"
sha256 = "{sha256}"

[thin]
version = "torch/version.py"
runpath = {{ "torch/lib/*.so" = ["$ORIGIN"] }}

[expect]
lock = "locks/saxpy.txt"
imports = ["torch"]
says = {{ "torch.VERSION" = "2.9.0+sm70.thin" }}
"""
CONTENT = {
    "torch/__init__.py": "from torch.version import __version__ as VERSION\n",
    "torch/version.py": "__version__ = '2.9.0'\n",
}
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


@pytest.fixture
def pipeline(tmp_path: Path, toolchain: object) -> Pipeline:
    """A checkout with a recipe for a stock wheel, a small one with made-up device code for three archs."""
    root = small_checkout(tmp_path / "checkout").root
    made = wheel(
        tmp_path, {**CONTENT, "torch/lib/libtorch.so": two_units(tmp_path / "lib.so")}, name="torch", version="2.9.0",
        tag=f"{TAG}-{TAG}-linux_x86_64",
    )  # fmt: skip
    files.write(root / "build/downloads" / made.name, made.read_bytes())
    (root / "recipes/torch-thin.toml").write_text(RECIPE.format(file=made.name, sha256=files.sha256(made)))
    return Pipeline.load(root, Settings(torch="thin"))


def run(pipeline: Pipeline) -> list[str]:
    """Run every stage of the package in order; return the kinds that were not current."""
    done = []
    for kind, stage in pipeline.package(pipeline.recipes["torch"]).stages.items():
        if not stage.current():
            done.append(kind)
        stage.run()
    return done


def rewritten(pipeline: Pipeline, old: str, new: str) -> Pipeline:
    path = pipeline.root / "recipes/torch-thin.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Pipeline.load(pipeline.root, pipeline.settings)


@pytest.mark.slow
def test_a_stock_wheel_is_thinned_checked_and_kept_reproducibly(
    pipeline: Pipeline, counted: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(pipeline) == ["fetch", "build", "check", "wheels"]
    (kept,) = pipeline.wheelhouse.wheels()
    assert kept.path.name == f"torch-2.9.0+sm70.thin-{TAG}-{TAG}-linux_x86_64.whl"
    assert pipeline.wheelhouse.receipt("torch", environment.python_tag()).exists()
    assert run(pipeline) == []
    monkeypatch.setenv("VOLTFORGE_MIRRORS", str(ROOT / "build/downloads"))
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    assert reproduce.wheel(pipeline, "torch").tier == "identical"
    varied = files.read_json(pipeline.scratch / "reproduce/torch.json")["variations"]
    counted("variations under which the hashes agreed", sum(not variation["same_because"] for variation in varied))
    assert run(rewritten(pipeline, '"torch/lib/*.so" = ["$ORIGIN"]', '"torch/lib/*.so" = ["$ORIGIN/.."]')) == [
        "build", "check", "wheels",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_kept_wheel_no_longer_needs_the_stock_wheel(pipeline: Pipeline) -> None:
    run(pipeline)
    for name in ("downloads", "wheels", "stages"):
        files.remove(pipeline.scratch / name)
    assert run(Pipeline.load(pipeline.root, pipeline.settings)) == []


@pytest.mark.slow
def test_another_compiler_of_the_stubs_changes_the_key(pipeline: Pipeline, tmp_path: Path, monkeypatch) -> None:
    package = pipeline.package(pipeline.recipes["torch"])
    before = package.stages["build"].key()
    (tmp_path / "bin").mkdir()
    gcc = tmp_path / "bin/gcc"
    gcc.write_text('#!/bin/sh\n# another\nexec /usr/bin/gcc "$@"\n')
    gcc.chmod(gcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert package.stages["build"].key() != before


@pytest.mark.slow
def test_a_python_without_a_stock_wheel_is_refused_with_those_that_have_one(pipeline: Pipeline) -> None:
    other = rewritten(pipeline, f"{TAG}-{TAG}", "cp27-cp27mu")
    with pytest.raises(VoltforgeError, match=f"has no stock wheel for {TAG} on this machine") as caught:
        run(other)
    assert "run a Python of cp27" in caught.value.hint


def test_both_torch_recipes_agree_on_name_version_and_arch(repository: Path) -> None:
    source, thin = (load_all(repository / "recipes", {"torch": variant})["torch"] for variant in ("source", "thin"))
    assert (source.name, source.version, source.arch) == (thin.name, thin.version, thin.arch)
