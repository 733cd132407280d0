"""What took long is remembered for the next time, and a memory that is spoilt costs nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.pipeline.durations import History

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "stages" / "history.json")


def test_a_stage_is_remembered_by_its_name_and_the_last_time_counts(history):
    assert history.usual("build:vllm") is None
    history.keep("build:vllm", 400.04)
    history.keep("tree:vllm", 7.0)
    history.keep("build:vllm", 500.0)
    assert (history.usual("build:vllm"), history.usual("tree:vllm")) == (500.0, 7.0)


def test_what_takes_no_time_or_an_absurd_one_is_not_remembered(history):
    for seconds in (0.2, 1e9, float("nan"), float("inf")):
        history.keep("tree:vllm", seconds)
    assert not history.path.exists()


def test_what_fails_is_not_a_time_that_it_takes(history, monkeypatch):
    now = iter([0.0, 50.0, 100.0, 130.0])
    monkeypatch.setattr("voltforge.pipeline.durations.time.monotonic", lambda: next(now))
    with pytest.raises(ZeroDivisionError), history.measured("build:vllm"):
        print(next(now) / 0)
    assert history.usual("build:vllm") is None
    with history.measured("build:vllm"):
        pass
    assert history.usual("build:vllm") == 30.0


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_in_the_file_is_ignored_and_written_over(tmp_path_factory, content):
    history = History(tmp_path_factory.mktemp("history") / "history.json")
    history.path.write_bytes(content)
    usual = history.usual("tree:vllm")
    assert usual is None or 1 <= usual < 1e7
    history.keep("tree:vllm", 7.0)
    assert history.usual("tree:vllm") == 7.0


def test_numbers_that_are_no_times_are_not_taken_for_some(history):
    history.path.parent.mkdir()
    history.path.write_text('{"a": -1, "b": true, "c": "9", "d": 1e999, "e": NaN, "f": 1' + "0" * 400 + ', "g": 8}')
    assert [history.usual(name) for name in "abcdefg"] == [None] * 6 + [8.0]


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history.json")
    history.keep("tree:vllm", 7.0)
    assert history.usual("tree:vllm") is None
