"""The hash of an unchanged file is not computed again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from voltforge.system import files
from voltforge.system.known_hashes import KnownHashes


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long enough ago for its times to be trusted."""
    monkeypatch.setattr(files, "SETTLED", 50_000_000)
    path = tmp_path / "sample.whl"
    path.write_bytes(b"wheel")
    time.sleep(0.1)
    return path


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    read: list[Path] = []
    hashed = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or hashed(path))
    return read


def test_an_unchanged_file_is_read_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads(monkeypatch)
    first, second = (KnownHashes(tmp_path / "hashes.json").sha256(wheel) for _ in range(2))
    assert first == second == files.sha256_bytes(b"wheel")
    assert read == [wheel]


@pytest.mark.parametrize("change", ["content", "content, with size and mtime restored", "replaced"])
def test_a_changed_file_is_read_again(wheel: Path, tmp_path: Path, change: str) -> None:
    hashes = KnownHashes(tmp_path / "hashes.json")
    hashes.sha256(wheel)
    before = wheel.stat()
    if change == "replaced":
        (tmp_path / "other").write_bytes(b"WHEEL")
        (tmp_path / "other").replace(wheel)
    else:
        wheel.write_bytes(b"WHEEL")
    if "restored" in change:
        os.utime(wheel, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.sha256(wheel) == files.sha256_bytes(b"WHEEL")


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashes = tmp_path / "sample.whl", KnownHashes(tmp_path / "hashes.json")
    path.write_bytes(b"wheel")
    read = reads(monkeypatch)
    assert hashes.sha256(path) == hashes.sha256(path)
    assert read == [path, path]


@pytest.mark.parametrize("content", ["", "[]", '{"PATH": 1}', '{"PATH": {"identity": [1], "sha256": 2}}'])
def test_a_damaged_memory_is_ignored(wheel: Path, tmp_path: Path, content: str) -> None:
    memory = tmp_path / "hashes.json"
    memory.write_text(content.replace("PATH", str(wheel)))
    assert KnownHashes(memory).sha256(wheel) == files.sha256_bytes(b"wheel")


def test_an_unwritable_memory_is_skipped(wheel: Path) -> None:
    assert KnownHashes(Path("/proc/none/hashes.json")).sha256(wheel) == files.sha256_bytes(b"wheel")
    assert KnownHashes().sha256(wheel) == files.sha256_bytes(b"wheel")


def test_files_that_are_gone_are_forgotten(wheel: Path, tmp_path: Path) -> None:
    hashes = KnownHashes(tmp_path / "hashes.json")
    hashes.sha256(wheel)
    renamed = wheel.rename(tmp_path / "renamed.whl")
    time.sleep(0.1)  # a rename changes the ctime
    hashes.sha256(renamed)
    assert [*files.read_json(tmp_path / "hashes.json")] == [str(renamed)]
