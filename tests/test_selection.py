"""The tests that a run leaves out: each runs in one of the rotations, and a result stands for its inputs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import selection


@pytest.fixture(autouse=True)
def _ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "ALL", False)


@given(st.lists(st.integers(), unique=True))
def test_every_item_is_in_exactly_one_rotation(items: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for rotation in range(selection.ROTATIONS):
            patch.setattr(selection, "ROTATION", rotation)
            found += selection.rotated(items)
    assert sorted(found) == sorted(items)


def test_a_run_of_all_tests_leaves_none_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selection, "ALL", True)
    monkeypatch.setattr(selection, "RESULTS", tmp_path / "results.json")
    assert selection.rotated([1, 2, 3, 4]) == [1, 2, 3, 4]
    selection.record("sample", "inputs", tmp_path / "results.json")
    assert not selection.has_passed("sample", "inputs")
    monkeypatch.setattr(selection, "ALL", False)
    assert selection.has_passed("sample", "inputs")
    assert not selection.has_passed("sample", "other inputs")


def test_an_ordinary_run_records_nothing(tmp_path: Path) -> None:
    selection.record("sample", "inputs", tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_the_digest_covers_content_names_and_further_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selection, "ROOT", tmp_path)
    (tmp_path / "a.toml").write_text("1")
    digests = [selection.digest(["*.toml"], "12.4")]
    (tmp_path / "a.toml").write_text("2")
    digests.append(selection.digest(["*.toml"], "12.4"))
    (tmp_path / "b.toml").write_text("2")
    digests.append(selection.digest(["*.toml"], "12.4"))
    digests.append(selection.digest(["*.toml"], "12.8"))
    assert len(set(digests)) == 4
    (tmp_path / "c.txt").write_text("3")
    assert selection.digest(["*.toml"], "12.8") == digests[-1]
