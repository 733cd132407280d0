"""The container engine is found on PATH, and its failures become one sentence."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from voltforge.errors import VoltforgeError
from voltforge.image import container_engine
from voltforge.image.container_engine import Engine, EngineError


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_missing_engine_is_reported_with_the_command_that_installs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VoltforgeError, match="buildah and podman are not installed, docker is not running") as caught:
        container_engine.choose()
    assert "buildah" in caught.value.hint


def test_a_docker_client_without_a_running_daemon_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(container_engine, "KINDS", ("docker",))
    program(tmp_path, "docker", "echo Version: 28.2.2; echo cannot connect to the daemon >&2; exit 1")
    with pytest.raises(VoltforgeError):
        container_engine.choose()
    program(tmp_path, "docker", "echo Version: 28.2.2")
    assert str(container_engine.choose()) == "docker 28.2.2"


def test_a_failing_engine_is_reported_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    program(tmp_path, "podman", 'echo STEP 1; echo "time=1 tried again"; echo Error: no such base; exit 125')
    with pytest.raises(EngineError, match=r"podman could not build a:b: STEP 1 Error: no such base") as caught:
        Engine("podman", "4.3").build(tmp_path / "Dockerfile", tmp_path, "a:b", {}, {})
    assert "no such base" in caught.value.output
    program(
        tmp_path, "podman", "echo Error: committing $(seq 900): no space; echo No space left on device >&2; exit 125"
    )
    with pytest.raises(EngineError, match=r"Error: committing 1 2 .* 900: no space") as caught:
        Engine("podman", "4.3").build(tmp_path / "Dockerfile", tmp_path, "a:b", {}, {})
    assert len(caught.value.what) < 500
    assert "make room" in caught.value.hint
    assert Engine("podman", "4.3").image_id("a:b") == ""


# CI installs buildah.
@pytest.mark.skipif(not shutil.which("buildah"), reason="buildah is not installed; CI installs it")
def test_a_build_that_fails_leaves_no_container_in_the_store(tmp_path: Path) -> None:
    def containers() -> set[str]:
        words = ["buildah", "containers", "--quiet"]
        return {*subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()}

    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "there").write_text("a file")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY there /\nCOPY absent /\n")
    before = containers()
    with pytest.raises(EngineError, match="absent"):
        Engine("buildah", "1").build(tmp_path / "Dockerfile", tmp_path / "context", "localhost/nothing", {}, {})
    assert containers() <= before
