"""Durations of stages are stored, and a damaged file of them is ignored."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.pipeline.durations import Durations

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def durations(tmp_path):
    return Durations(tmp_path / "stages" / "history.json")


def test_the_last_duration_of_a_stage_is_returned(durations):
    assert durations.usual("build:vllm") is None
    durations.store("build:vllm", 400.04)
    durations.store("tree:vllm", 7.0)
    durations.store("build:vllm", 500.0)
    assert (durations.usual("build:vllm"), durations.usual("tree:vllm")) == (500.0, 7.0)


def test_too_short_and_absurd_durations_are_not_stored(durations):
    for seconds in (0.2, 1e9, float("nan"), float("inf")):
        durations.store("tree:vllm", seconds)
    assert not durations.path.exists()


def test_the_duration_of_a_failed_stage_is_not_stored(durations, monkeypatch):
    now = iter([0.0, 50.0, 100.0, 130.0])
    monkeypatch.setattr("voltforge.pipeline.durations.time.monotonic", lambda: next(now))
    with pytest.raises(ZeroDivisionError), durations.measured("build:vllm"):
        print(next(now) / 0)
    assert durations.usual("build:vllm") is None
    with durations.measured("build:vllm"):
        pass
    assert durations.usual("build:vllm") == 30.0


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_in_the_file_is_ignored_and_overwritten(tmp_path_factory, content):
    durations = Durations(tmp_path_factory.mktemp("history") / "history.json")
    durations.path.write_bytes(content)
    usual = durations.usual("tree:vllm")
    assert usual is None or 1 <= usual < 1e7
    durations.store("tree:vllm", 7.0)
    assert durations.usual("tree:vllm") == 7.0


def test_invalid_durations_are_ignored(durations):
    durations.path.parent.mkdir()
    durations.path.write_text('{"a": -1, "b": true, "c": "9", "d": 1e999, "e": NaN, "f": 1' + "0" * 400 + ', "g": 8}')
    assert [durations.usual(name) for name in "abcdefg"] == [None] * 6 + [8.0]


def test_a_file_that_cannot_be_written_is_skipped(tmp_path):
    (tmp_path / "file").write_text("")
    durations = Durations(tmp_path / "file" / "history.json")
    durations.store("tree:vllm", 7.0)
    assert durations.usual("tree:vllm") is None
