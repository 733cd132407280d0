"""The doctor says what is there and what is missing, with the command that gets it, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltforge import doctor
from voltforge.checkout import Settings
from voltforge.doctor import Check
from voltforge.errors import VoltforgeError
from voltforge.pipeline import Pipeline


@pytest.fixture
def pipeline(repository: Path) -> Pipeline:
    return Pipeline.load(repository, Settings())


def found(pipeline: Pipeline, name: str) -> Check:
    return next(check for check in doctor.examine(pipeline) if check.name == name)


def test_everything_that_a_build_needs_has_a_line(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    names = {check.name for check in doctor.examine(Pipeline.load(pipeline.root, Settings()))}
    assert {"Python", "Python headers", "g++", "patch", "disk", "memory", "jobs", "sandbox", "NVIDIA driver"} <= names
    assert {"package index", "CUDA compiler"} <= names


def test_a_missing_program_comes_with_the_command_that_gets_it(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(pipeline, "patch")
    assert check.state == "missing"
    assert "patch" in check.hint
    with pytest.raises(VoltforgeError, match=r"missing: .*g\+\+.*patch"):
        doctor.report(pipeline)


def test_little_room_on_the_disk_is_told_and_how_much_is_needed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DISK", 10**18)
    check = found(pipeline, "disk")
    assert check.state == "note"
    assert "make room" in check.hint


def test_an_index_without_the_source_is_missing(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    check = found(Pipeline.load(pipeline.root, Settings()), "package index")
    assert check.state == "missing"
    assert "vllm-0.12.0.tar.gz" in check.detail


def test_offline_the_index_is_not_asked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    assert "never asked" in found(Pipeline.load(pipeline.root, Settings()), "package index").detail


def test_a_toolkit_that_cannot_target_volta_is_told(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    elsewhere = Pipeline(tmp_path, Settings(), pipeline.recipes, cuda=pipeline.cuda)
    check = found(elsewhere, "CUDA compiler")
    assert "CUDA 13 removed compute capability 7.0" in check.detail
