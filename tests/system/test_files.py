"""Writing whole or not at all, removing everything, and hashing, with real files and a real kill."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rights import ordinary_user
from voltforge.system import files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# --- one file ---


def test_file_appears_only_if_the_block_succeeds(tmp_path):
    path = tmp_path / "new" / "file"
    with files.replacing(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert [*path.parent.iterdir()] == [path]


def test_failed_block_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    with contextlib.suppress(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    work = (
        "import os, signal; from pathlib import Path; from voltforge.system import files\n"
        f"with files.replacing(Path({str(path)!r})) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", work], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_new_file_is_world_readable_by_default(tmp_path):
    files.write(tmp_path / "file", "text")
    with files.replacing(tmp_path / "program", 0o755):
        pass
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in ("file", "program")] == ["644", "755"]


# --- one folder ---


def test_folder_replaces_an_old_folder(tmp_path):
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with files.replacing_folder(path) as beside:
            (beside / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [*tmp_path.iterdir()] == [path]
    assert oct(path.stat().st_mode)[-3:] == "755"


@pytest.mark.parametrize("old", ["file", "link", "broken link"])
def test_folder_replaces_a_file_or_link(tmp_path, old):
    path, kept = tmp_path / "folder", tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").touch()
    if old == "file":
        path.touch()
    else:
        path.symlink_to(kept if old == "link" else "nowhere")
    with files.replacing_folder(path):
        pass
    assert path.is_dir()
    assert not path.is_symlink()
    assert (kept / "precious").exists()


def test_failed_block_leaves_the_old_folder_and_no_other(tmp_path):
    path = tmp_path / "folder"
    with files.replacing_folder(path) as beside:
        (beside / "old").touch()
    with contextlib.suppress(KeyboardInterrupt), files.replacing_folder(path) as beside:
        (beside / "half").touch()
        raise KeyboardInterrupt
    assert [file.name for file in path.iterdir()] == ["old"]
    assert [*tmp_path.iterdir()] == [path]


def test_the_old_folder_is_moved_away_whole_before_it_is_removed(tmp_path, monkeypatch):
    path, seen = tmp_path / "folder", []
    for _ in range(2):
        with files.replacing_folder(path) as beside:
            (beside / "part").touch()
    remove = files.remove

    def watched(gone: Path) -> None:
        seen.append((gone.name, sorted(file.name for file in path.iterdir())))
        remove(gone)

    monkeypatch.setattr(files, "remove", watched)
    with files.replacing_folder(path) as beside:
        (beside / "new part").touch()
    assert [content for _, content in seen] == [["new part"]]
    assert path.name not in {name for name, _ in seen}


# --- removing ---


def test_remove_deletes_files_folders_and_links_but_not_the_targets_of_links(tmp_path):
    kept = tmp_path / "kept"
    (kept / "inner").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "link").symlink_to(kept)
    (tmp_path / "link").symlink_to(kept)
    kept.chmod(0o555)
    for name in ("gone", "link", "never was"):
        files.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in kept.iterdir()] == ["inner"]
    assert oct(kept.stat().st_mode)[-3:] == "555"
    files.remove(kept)


def test_remove_deletes_folders_without_permissions():
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        path = Path(room, "folder")
        (path / "a" / "b").mkdir(parents=True)
        (path / "a" / "b" / "file").touch()
        for folder in (path / "a" / "b", path / "a", path):
            folder.chmod(0)
        files.remove(path)
        assert not path.exists()


# --- values ---


@given(JSON)
def test_json_is_read_as_it_was_written(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "value.json")
        files.write_json(path, value)
        assert files.read_json(path) == value


@pytest.mark.parametrize("content", [b"", b"{", b'{"half": ', b"\xff\xfe"])
def test_a_broken_json_file_reads_as_none(tmp_path, content):
    (tmp_path / "broken").write_bytes(content)
    assert files.read_json(tmp_path / "broken") is None
    assert files.read_json(tmp_path / "absent") is None
    assert files.read_json(tmp_path) is None


def test_the_order_of_keys_changes_neither_digest_nor_file(tmp_path):
    one, other = {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}
    assert files.digest(one) == files.digest(other) != files.digest({"a": 1, "b": [2, 1]})
    for name, value in (("one", one), ("other", other)):
        files.write_json(tmp_path / name, value)
    assert files.sha256(tmp_path / "one") == files.sha256(tmp_path / "other")


@given(JSON, JSON)
def test_different_values_have_different_digests(one, other):
    assert (files.digest(one) == files.digest(other)) == (repr_of(one) == repr_of(other))


def repr_of(value: object) -> str:
    """A picture in which 1, 1.0 and True differ, as they do in JSON, and the order of keys does not count."""
    if isinstance(value, dict):
        return f"dict {sorted((key, repr_of(item)) for key, item in value.items())}"
    return f"list {[repr_of(item) for item in value]}" if isinstance(value, list) else repr(value)


def test_a_name_that_is_not_utf_8_has_a_digest_and_can_be_stored(tmp_path):
    name = os.fsdecode(b"/opt/cud\xe4")
    files.write_json(tmp_path / "record", {"CUDA_HOME": name})
    assert files.read_json(tmp_path / "record") == {"CUDA_HOME": name}
    assert files.digest(name) != files.digest("/opt/cud")


@given(st.binary(max_size=100))
def test_the_hash_of_a_file_is_the_hash_of_its_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(data)
        assert files.sha256(path) == files.sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_a_file_of_many_blocks_is_hashed_whole(tmp_path):
    data = bytes(range(256)) * (files.BLOCK // 100)
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (17_594_403, "17.6 MB"), (999_990, "1.0 MB"), (20e9, "20.00 GB")],
)
def test_sizes_use_decimal_units(count, text):
    assert files.size(count) == text


@given(st.integers(0, 10**9))
def test_sizes_have_at_most_three_digits_before_the_point(count):
    assert len(files.size(count).split(".")[0].split(" ")[0]) <= 3
