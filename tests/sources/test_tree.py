"""A source tree is complete or absent, and syncing writes only the files that differ."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.source_files import (
    EPOCH,
    HEADER,
    LINES,
    changed,
    content,
    diff,
    member,
    patch,
    tar,
)
from voltforge.sources.patches import PatchError, series
from voltforge.sources.tree import create, sync


def test_a_tree_is_unpacked_and_patched_in_order(tmp_path):
    archive = tar(
        tmp_path / "a-1.0.tar.gz", member("a-1.0/file.txt", "".join(LINES).encode()), member("a-1.0/setup.py", b"")
    )
    first, second = changed(LINES, 20), changed(changed(LINES, 20), 21)
    patch(tmp_path / "patches", HEADER + diff(first, second), "0002-b.patch")
    patch(tmp_path / "patches", HEADER + diff(LINES, first), "0001-a.patch")
    grown = create(archive, series(tmp_path / "patches"), tmp_path / "tree")
    assert (grown.path, grown.epoch) == (tmp_path / "tree", EPOCH)
    assert (grown.path / "file.txt").read_text() == "".join(second)


def test_a_failed_tree_leaves_the_old_one(tmp_path):
    archive = tar(tmp_path / "a-1.0.tar.gz", member("a-1.0/file.txt", "".join(LINES).encode()))
    create(archive, (), tmp_path / "tree")
    bad = patch(tmp_path / "patches", HEADER + diff(changed(LINES, 1), changed(LINES, 2)))
    with pytest.raises(PatchError):
        create(archive, (bad,), tmp_path / "tree")
    assert (tmp_path / "tree" / "file.txt").read_text() == "".join(LINES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.0.tar.gz", "patches", "tree"]


def write(folder: Path, files: dict[str, str]) -> Path:
    """Make ``folder`` hold these files only; a value that begins with ``->`` is a link."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            (folder / name).symlink_to(text[2:])
        else:
            (folder / name).write_text(text)
    return folder


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def aged(folder: Path) -> dict[str, int]:
    """Make all its files a day old."""
    for path in folder.rglob("*"):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    return times(folder)


def test_unchanged_sources_keep_their_times_and_changed_ones_do_not(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a.cu": "1", "b/c.cu": "2"}), work)
    before = aged(work)
    sync(write(tmp_path / "tree", {"a.cu": "1", "b/c.cu": "3"}), work)
    after = times(work)
    assert after["a.cu"] == before["a.cu"]
    assert after["b/c.cu"] > before["b/c.cu"]
    assert content(work) == {"a.cu": b"1", "b/c.cu": b"3"}


def test_removed_sources_are_removed_and_files_of_the_build_stay(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a.cu": "1", "old/b.cu": "2", "mixed/c.cu": "3"}), work)
    write(work / "build", {"a.o": "object"})
    (work / "mixed" / "c.o").write_text("object")
    sync(write(tmp_path / "tree", {"a.cu": "1"}), work)
    assert content(work) == {"a.cu": b"1", "build/a.o": b"object", "mixed/c.o": b"object"}
    assert not (work / "old").exists()


def test_a_source_that_a_build_changed_is_restored(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"version.py": "0"}), work)
    (work / "version.py").write_text("1")
    sync(tmp_path / "tree", work)
    assert content(work) == {"version.py": b"0"}


def test_a_file_that_becomes_executable_is_updated(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"tool": "#!/bin/sh\n"}), work)
    (tmp_path / "tree" / "tool").chmod(0o755)
    sync(tmp_path / "tree", work)
    assert os.access(work / "tool", os.X_OK)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a": "file"}, {"a/b": "file in a folder"}),
        ({"a/b": "file in a folder"}, {"a": "file"}),
        ({"a": "->b", "b/c": "1"}, {"a/c": "2"}),
        ({"a/c": "2"}, {"a": "->b", "b/c": "1"}),
        ({"a": "file", "b": "x"}, {"a": "->b", "b": "x"}),
        ({"a": "->b", "b": "x"}, {"a": "x", "b": "x"}),
    ],
)
def test_files_folders_and_links_can_replace_each_other(tmp_path, old, new):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", old), work)
    sync(write(tmp_path / "tree", new), work)
    assert content(work) == content(tmp_path / "tree")


def test_the_next_sync_completes_a_killed_one(tmp_path, monkeypatch):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a": "1", "b/c": "2", "z": "3"}), work)
    copy, left = shutil.copy, [1]

    def cut(source, target, **more):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        copy(source, target, **more)

    monkeypatch.setattr(shutil, "copy", cut)
    with contextlib.suppress(KeyboardInterrupt):
        sync(write(tmp_path / "tree", {"a/d": "1", "b": "2", "y": "3"}), work)
    monkeypatch.undo()
    sync(write(tmp_path / "tree", {"a": "4", "b/c": "5"}), work)
    assert content(work) == {"a": b"4", "b/c": b"5"}


NAMES = st.sampled_from(["a", "b", "c", "d/a", "d/b", "d/e/a", "a/x", "b/y/z"])
TREES = st.dictionaries(NAMES, st.sampled_from(["", "1", "22", "->c", "->d/b"]), max_size=6).filter(
    lambda files: not any(other.startswith(f"{name}/") for name in files for other in files)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=4))
def test_after_any_history_sync_gives_the_tree_and_a_second_sync_changes_nothing(history):
    with tempfile.TemporaryDirectory() as room:
        source, work = Path(room, "tree"), Path(room, "work")
        work.mkdir()
        (work / "made.o").write_text("object")
        for files in history:
            sync(write(source, files), work)
            assert content(work) == {**content(source), "made.o": b"object"}
        before = aged(work)
        sync(source, work)
        assert times(work) == before
