"""The work folder of a build is reused if nothing in it can be stale."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from voltforge.compile import fixed_paths, work_folder
from voltforge.compile.build import Build
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.scheduler import Scheduler
from voltforge.system import files


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def prepared(build: Build) -> list[str]:
    """Prepare the build and return the files of its tree."""
    build.prepare()
    return sorted(path.name for path in build.folders["tree"].iterdir())


def test_compiled_objects_survive_a_failed_build(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(build)
    (build.folders["tree"] / "a.o").write_text("object")
    assert prepared(build) == ["a.c", "a.o"]
    assert said(capsys) == ""


@pytest.mark.parametrize("late", ["a.o", "deeper/below/a.o"])
def test_objects_are_discarded_after_the_clock_was_set_back(
    build: Build, late: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(build)
    ahead = build.folders["tree"] / late
    ahead.parent.mkdir(parents=True, exist_ok=True)
    ahead.write_text("object")
    os.utime(ahead, (time.time() + 3600,) * 2)
    assert prepared(build) == ["a.c"]
    assert f"starting from scratch: tree/{late} is newer than the clock: the clock was set back" in said(capsys)


def begun(build: Build) -> None:
    """A build that wrote an object and was killed."""
    prepared(build)
    files.write_json(build.work / work_folder.UNSYNCED, work_folder.boot_id())
    (build.folders["tree"] / "a.o").write_text("object")


def test_objects_are_discarded_after_the_machine_went_down_in_a_build(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ninja recorded an object as done whose last bytes never reached the disk."""
    begun(build)
    monkeypatch.setattr(work_folder, "BOOT", tmp_path / "boot")
    (tmp_path / "boot").write_text("another boot\n")
    assert prepared(build) == ["a.c"]
    assert "starting from scratch: the machine went down during the last build" in said(capsys)


def test_a_killed_build_resumes(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    begun(build)
    assert prepared(build) == ["a.c", "a.o"]
    assert said(capsys) == ""


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_files_of_a_finished_build_are_synced_to_disk(
    build: Build, end: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared(build)
    synced = []
    monkeypatch.setattr(os, "sync", lambda: synced.append((build.work / work_folder.UNSYNCED).exists()))
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), work_folder.synced(build.work):
        (build.folders["tree"] / "a.o").write_text("object")
        if end:
            raise end
    assert synced == [True], "the note goes when all is on the disk, and not before"
    monkeypatch.setattr(work_folder, "BOOT", tmp_path / "missing")
    assert prepared(build) == ["a.c", "a.o"]


def test_objects_of_a_build_with_another_launcher_are_discarded(
    build: Build, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Some build systems configure once; their compilers would all start at once."""
    prepared(build)
    asking = replace(build, scheduler=Scheduler(tmp_path / "gate", 1, {}))
    (build.folders["tree"] / "a.o").write_text("object")
    assert "a.o" not in prepared(asking)
    assert "starting from scratch: the launcher of the compilers changed" in capsys.readouterr().out
    (asking.folders["tree"] / "a.o").write_text("object")
    assert "a.o" in prepared(asking)


def test_coarse_clocks_and_dangling_links_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    os.utime(tmp_path / "now", (time.time() + 1,) * 2)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "up").symlink_to(tmp_path)
    assert work_folder.newer_than_clock(tmp_path) is None
    os.utime(tmp_path / "now", (time.time() + 60,) * 2)
    assert work_folder.newer_than_clock(tmp_path) == tmp_path / "now"
    assert work_folder.newer_than_clock(tmp_path / "work") is None


def test_objects_of_a_tree_at_another_path_are_discarded(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CMake refuses another folder: its cache names the old one."""
    prepared(build)
    (build.folders["tree"] / "a.o").write_text("object")
    monkeypatch.setattr(fixed_paths, "obstacle", lambda *_: "as in this test")
    outside = replace(build, sandbox=Sandbox("none"))
    assert prepared(outside) == ["a.c"]
    told = said(capsys)
    assert f"building in {outside.folders['tree']}, not /build/tree (as in this test): the bytes can differ" in told
    assert "starting from scratch: the last build ran in /build/tree" in told
