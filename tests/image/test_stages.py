"""The image is made of the wheels in the wheelhouse, and of nothing else."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT
from tests.support.samples import wheel
from voltforge.image import container_engine, stages
from voltforge.image.leave_out import ImageError
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import NotRun

MINE = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def pipeline(root: Path, base: str = "") -> Pipeline:
    """A checkout without packages that can make an image."""
    for name in ("docker", "recipes/locks", "volta"):
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "recipes" / "cuda.toml", root / "recipes")
    return Pipeline.load(root, Settings(base=base))


def kept(checkout: Pipeline, name: str, tag: str) -> None:
    """Put a small wheel into the wheelhouse."""
    folder = checkout.root / "made" / name
    checkout.wheelhouse.add(wheel(folder, {f"{name}/__init__.py": ""}, name=name, tag=tag))


def before(made: RuntimeImage) -> list[str]:
    """The stages that run before the image."""
    return [stage.name for stage in made.image.after()]


def test_missing_wheels_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    checkout = pipeline(tmp_path)
    kept(checkout, "vllm", "cp38-abi3-linux_x86_64")
    with pytest.raises(ImageError, match="the wheelhouse has no torch for Python") as caught:
        RuntimeImage(checkout).wheels()
    assert "./doit wheels" in caught.value.hint


def test_a_base_is_made_unless_one_is_chosen(tmp_path: Path) -> None:
    assert before(RuntimeImage(pipeline(tmp_path))) == ["image:base"]
    assert before(RuntimeImage(pipeline(tmp_path, "python:3.11-slim"))) == []


def test_wheels_for_another_python_are_ignored(tmp_path: Path) -> None:
    checkout = pipeline(tmp_path)
    kept(checkout, "vllm", "cp38-abi3-linux_x86_64")
    kept(checkout, "torch", "cp27-cp27mu-linux_x86_64")
    with pytest.raises(ImageError, match="no torch"):
        RuntimeImage(checkout).wheels()
    kept(checkout, "torch", f"{MINE}-{MINE}-linux_x86_64")
    assert RuntimeImage(checkout).wheels()["torch"].path.name == f"torch-1.0-{MINE}-{MINE}-linux_x86_64.whl"


def test_sizes_of_an_image_that_was_not_made_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="image has not run"):
        RuntimeImage(pipeline(tmp_path)).why()


def test_a_change_of_the_image_code_makes_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = pipeline(tmp_path, "python:3.11-slim")
    for name in ("torch", "vllm"):
        kept(checkout, name, "cp38-abi3-linux_x86_64")
    monkeypatch.setattr(container_engine, "choose", lambda: "an engine")
    assert Path(stages.__file__) in stages.CODE
    code = tmp_path / "image.py"
    monkeypatch.setattr(stages, "CODE", (code,))
    keys = []
    for text in ("one way", "another"):
        code.write_text(text)
        keys.append(RuntimeImage(checkout).image.key())
    assert keys[0] != keys[1]
