"""`./doit doctor` lists what is installed and what is missing, with commands to install it, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import serving
from voltforge.commands import doctor
from voltforge.commands.doctor import Check
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline


@pytest.fixture
def pipeline(repository: Path) -> Pipeline:
    return loaded(repository)


def loaded(repository: Path) -> Pipeline:
    """The pipeline of a checkout for vLLM alone: PyTorch's source lies on a host that no test should ask."""
    whole = Pipeline.load(repository, Settings())
    return Pipeline(repository, Settings(), {"vllm": whole.recipes["vllm"]}, cuda=whole.cuda)


def found(pipeline: Pipeline, name: str) -> Check:
    return next(check for check in doctor.examine(pipeline) if check.name == name)


def test_every_requirement_of_a_build_is_listed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    names = {check.name for check in doctor.examine(loaded(pipeline.root))}
    assert {"Python", "Python headers", "g++", "patch", "disk", "memory", "jobs", "sandbox", "NVIDIA driver"} <= names
    assert {"package index", "CUDA compiler"} <= names


def test_a_missing_program_is_listed_with_its_install_command(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(pipeline, "patch")
    assert check.state == "missing"
    assert "patch" in check.hint
    with pytest.raises(VoltforgeError, match=r"missing: .*g\+\+.*patch"):
        doctor.report(pipeline)


def test_a_missing_container_engine_does_not_fail_the_doctor(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(pipeline, "image engine")
    assert (check.state, "wheels need none" in check.detail) == ("note", True)


def test_a_small_disk_is_reported_with_the_required_space(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK", 10**18)
    check = found(pipeline, "disk")
    assert check.state == "note"
    assert "make room" in check.hint


def test_an_index_without_the_source_is_reported(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    check = found(loaded(pipeline.root), "package index")
    assert check.state == "missing"
    assert "vllm-0.12.0.tar.gz" in check.detail


def test_offline_the_index_is_not_asked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    assert "not used" in found(loaded(pipeline.root), "package index").detail


def upstream(pipeline: Pipeline, url: str) -> Check:
    recipe = Pipeline.load(pipeline.root, Settings(torch="source")).recipes["torch"]
    changed = {"url": url, "sha256": "ab" * 32}
    elsewhere = recipe.model_copy(update={"source": recipe.source.model_copy(update=changed)})
    return found(Pipeline(pipeline.root, Settings(), {"torch": elsewhere}, cuda=pipeline.cuda), "upstream")


def test_an_unreachable_upstream_is_reported_with_the_alternative(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        server.files["/a.tar.gz"] = b"here"
        assert upstream(pipeline, f"{server.url}/a.tar.gz") == Check("upstream", "ok", "has pytorch-v2.9.0.tar.gz")
        gone = upstream(pipeline, f"{server.url}/b.tar.gz")
    assert (gone.state, gone.detail) == (
        "note", "pytorch-v2.9.0.tar.gz is not here, and 127.0.0.1: answered 404 Not Found",
    )  # fmt: skip
    assert "torch=thin" in gone.hint
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    assert "no host is asked" in upstream(pipeline, "http://127.0.0.1:1/a.tar.gz").detail


def test_a_toolkit_that_cannot_target_volta_is_reported(
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
