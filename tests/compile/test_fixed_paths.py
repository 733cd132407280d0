"""Without mounts, the folders of a build are moved to their fixed paths and back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rights import NOBODY
from voltforge.compile import fixed_paths
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.toolchain import COMPILERS
from voltforge.system import files
from voltforge.system.process import ProgramFailed


@pytest.fixture
def fixed(tmp_path, monkeypatch) -> Path:
    """Use another folder in the place of /build, which an ordinary user cannot create."""
    monkeypatch.setattr(fixed_paths, "ROOT", tmp_path / "fixed")
    return tmp_path / "fixed"


def shown(build_folders: dict[str, Path]) -> contextlib.AbstractContextManager[None]:
    return Sandbox("none", moves=True).in_place(
        {"tree": build_folders["tree"]}, {"environment": build_folders["environment"]}
    )


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_moved_while_the_build_runs(fixed, build_folders):
    with shown(build_folders):
        assert content(fixed / "tree") == content(fixed / "environment") | {"file": "tree"}
        assert not build_folders["tree"].exists()
        assert content(build_folders["environment"]) == {"file": "environment"}, "others may be using it"
        (fixed / "tree" / "new.o").write_text("object")
    assert content(build_folders["tree"]) == {"file": "tree", "new.o": "object"}
    assert not fixed.exists()


@pytest.mark.parametrize("error", [ProgramFailed(["make"], 2, "", None, "failed"), KeyboardInterrupt()])
def test_moved_folders_are_back_after_any_error(fixed, build_folders, error):
    with pytest.raises(type(error)), shown(build_folders):
        raise error
    assert content(build_folders["tree"]) == {"file": "tree"}
    assert not fixed.exists()


def test_moved_folders_are_back_if_another_could_not_be_moved(fixed, build_folders):
    build_folders["environment"] = build_folders["environment"] / "absent"
    with pytest.raises(OSError, match="absent"), shown(build_folders):
        pytest.fail("not all of them are there")
    assert content(build_folders["tree"]) == {"file": "tree"}
    assert not fixed.exists()


def test_the_real_path_of_a_read_only_folder_is_hidden(fixed, build_folders):
    deeper = build_folders["environment"] / "lib" / "include"
    deeper.mkdir(parents=True)
    (deeper / "a.h").write_text("#pragma once")
    (build_folders["environment"] / "lib64").symlink_to("lib")
    with shown(build_folders):
        seen = [path.resolve() for path in (fixed / "environment").rglob("*")]
        assert len(seen) == 5
        assert all(path.is_relative_to(fixed.resolve()) for path in seen)


def test_the_compilers_keep_their_ctime(fixed, build_folders):
    """The toolchain compares the ctime of compilers, which a hard link changes."""
    compiler = build_folders["environment"] / COMPILERS[0]
    compiler.parent.mkdir()
    compiler.write_text("nvcc")
    before = compiler.stat().st_ctime_ns
    with shown(build_folders):
        assert (fixed / "environment" / COMPILERS[0]).read_text() == "nvcc"
    assert compiler.stat().st_ctime_ns == before


def test_two_builds_take_turns(fixed, build_folders, tmp_path, capsys):
    other = {name: tmp_path / "other" / name for name in build_folders}
    for folder in other.values():
        folder.mkdir(parents=True)
    entered = threading.Event()

    def second() -> None:
        with shown(other):
            entered.set()

    with shown(build_folders):
        later = threading.Thread(target=second)
        later.start()
        assert not entered.wait(0.3)
    later.join(60)
    assert entered.is_set()
    assert f"waiting for another build at {fixed}" in " ".join(capsys.readouterr().out.split())


KILLED = """
import subprocess, sys, time
from pathlib import Path
from voltforge.compile import fixed_paths, sandbox
fixed_paths.ROOT, tree = map(Path, sys.argv[1:])
with sandbox.Sandbox("none", moves=True).in_place({"tree": tree}, {}):
    (fixed_paths.ROOT / "tree" / "new.o").write_text("object")
    subprocess.Popen(["sleep", "1"], cwd=fixed_paths.ROOT / "tree")
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def killed(fixed, build_folders, repository) -> None:
    """The state after a killed build, with a compiler still running."""
    environ = {**os.environ, "PYTHONPATH": str(repository)}
    words = [sys.executable, "-c", KILLED, str(fixed), str(build_folders["tree"])]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"inside\n"
        child.send_signal(signal.SIGKILL)
    assert not build_folders["tree"].exists()


def test_folders_of_a_killed_run_are_moved_back_after_its_compilers_ended(fixed, build_folders, killed, capsys):
    began = time.monotonic()
    fixed_paths.recover(build_folders["tree"].parent)
    assert content(build_folders["tree"]) == {"file": "tree", "new.o": "object"}
    assert not fixed.exists()
    assert time.monotonic() - began > 0.3
    assert "waiting for processes of a killed build" in capsys.readouterr().out


def test_the_next_build_of_another_checkout_moves_folders_of_a_killed_run_back(fixed, build_folders, killed, tmp_path):
    fixed_paths.recover(tmp_path / "other" / "work")
    assert not build_folders["tree"].exists(), "it has nothing to do with that"
    assert fixed_paths.obstacle(tmp_path / "other" / "work", {}) == ""
    assert content(build_folders["tree"]) == {"file": "tree", "new.o": "object"}


@pytest.mark.parametrize("fate", ["made anew", "gone with its checkout"])
def test_folders_of_a_killed_run_are_removed_if_their_place_is_taken(fixed, build_folders, killed, fate):
    if fate == "made anew":
        build_folders["tree"].mkdir()
    else:
        files.remove(build_folders["tree"].parent)
    fixed_paths.recover(build_folders["tree"].parent)
    assert not fixed.exists()
    assert not build_folders["tree"].exists() or os.listdir(build_folders["tree"]) == []


def obstacles(fixed: Path, build_folders: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Each thing that can be in the way, and its message."""
    yield "nothing", ""
    (fixed / "theirs").mkdir(parents=True)
    yield "somebody's own folder", "theirs exists there"
    (fixed / "theirs").rmdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        fixed_paths.ROOT = Path(elsewhere)
        yield "another file system", "Invalid cross-device link"
    fixed_paths.ROOT = fixed
    if os.geteuid() == 0:
        fixed.mkdir(exist_ok=True)
        os.chown(fixed, NOBODY, NOBODY)
        yield "another user", "it belongs to another user"
        fixed_paths.ROOT = Path("/proc/build")
        yield "no right to make it", "No such file or directory"
    else:
        fixed_paths.ROOT = Path("/build-of-root")
        yield "no right to make it", "Permission denied"


def test_a_foreign_file_at_the_fixed_path_is_reported_and_nothing_is_left(fixed, build_folders):
    work = build_folders["tree"].parent
    for what, told in obstacles(fixed, build_folders):
        assert (what, fixed_paths.obstacle(work, {"environment": build_folders["environment"]})) == (what, told)
        assert os.listdir(work) == ["tree"]
        assert content(build_folders["environment"]) == {"file": "environment"}
