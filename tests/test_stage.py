"""A stage runs when something that can change its result has changed, and is done only when its record says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge import stage as module
from voltforge.errors import VoltforgeError
from voltforge.stage import NotRun, Stage


class Work:
    """A stage whose work is to write a file, and that counts how often it is done."""

    def __init__(self, folder: Path, name: str = "tree:vllm", unless: Stage | None = None) -> None:
        self.inputs: dict[str, Any] = {"source": "abc"}
        self.product = folder / f"{name}.product"
        self.runs = 0
        self.fails: BaseException | None = None
        self.stage = Stage(
            name, folder / "records" / f"{name}.json", lambda: self.inputs, self.make, self.intact, (), unless
        )

    def make(self, key: str) -> dict[str, Any]:
        self.runs += 1
        if self.fails:
            raise self.fails
        self.product.write_text(key)
        return {"path": str(self.product)}

    def intact(self, results: Any) -> bool:
        return Path(results["path"]).exists()


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_a_stage_runs_once_and_keeps_what_it_was_made_of(work):
    assert not work.stage.current()
    work.stage.run()
    work.stage.run()
    assert work.runs == 1
    assert work.stage.current()
    kept = json.loads(work.stage.record.read_text())
    results = {"path": str(work.product)}
    assert kept == {"stage": "tree:vllm", "key": work.stage.key(), "inputs": {"source": "abc"}, "results": results}
    assert work.product.read_text() == kept["key"]
    assert work.stage.results() == results


def test_a_changed_input_makes_it_run_again(work):
    work.stage.run()
    work.inputs = {"source": "abd"}
    assert not work.stage.current()
    work.stage.run()
    assert work.runs == 2
    assert work.stage.kept()["inputs"] == {"source": "abd"}


def test_a_new_version_of_the_pipeline_makes_it_run_again(work, monkeypatch):
    work.stage.run()
    monkeypatch.setattr(module, "PIPELINE_VERSION", module.PIPELINE_VERSION + 1)
    assert not work.stage.current()


def test_a_product_that_is_gone_makes_it_run_again(work):
    work.stage.run()
    work.product.unlink()
    assert not work.stage.current()
    work.stage.run()
    assert work.stage.current()


def test_a_record_that_is_gone_makes_it_run_again(work):
    work.stage.run()
    work.stage.record.unlink()
    assert not work.stage.current()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '"text"', "{}", '{"key": "x"}', '{"results": 3}', "\0\1"])
def test_a_record_that_makes_no_sense_is_none(work, content):
    work.stage.record.parent.mkdir()
    work.stage.record.write_text(content)
    assert work.stage.kept() is None
    assert not work.stage.current()
    work.stage.run()
    assert work.stage.current()


VALUES = st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()) | st.none(), max_size=4)


@given(VALUES, VALUES)
def test_any_difference_in_the_inputs_is_another_key(one, other):
    work = Work(Path("/never/written"))
    assert (work.stage.key(one) == work.stage.key(other)) == (one == other)


def test_two_stages_with_equal_inputs_have_different_keys(tmp_path):
    assert Work(tmp_path, "tree:a").stage.key() != Work(tmp_path, "tree:b").stage.key()


@pytest.mark.parametrize("problem", [VoltforgeError("no"), ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_work_that_fails_leaves_no_record_not_even_the_old_one(work, problem):
    work.stage.run()
    work.inputs, work.fails = {"source": "abd"}, problem
    with pytest.raises(type(problem)):
        work.stage.run()
    assert not work.stage.record.exists()
    work.inputs = {"source": "abc"}
    assert not work.stage.current()


def test_a_killed_run_leaves_no_record(tmp_path):
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from voltforge.stage import Stage
        def make(key):
            if sys.argv[2] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return {}
        one = Stage("one", Path(sys.argv[1]), lambda: {"for": sys.argv[2]}, make, lambda _: True)
        one.run()
        print(one.current())
    """
    record = tmp_path / "record.json"
    words = [sys.executable, "-c", script, str(record)]
    assert subprocess.run([*words, "live"], capture_output=True, text=True, check=True).stdout == "True\n"
    assert subprocess.run([*words, "die"], check=False).returncode == -signal.SIGKILL
    assert [*tmp_path.iterdir()] == []


def test_the_inputs_of_the_record_are_those_of_its_key(work):
    """Even when they change while they are asked for."""
    asked = []

    def inputs() -> dict[str, Any]:
        asked.append(len(asked))
        return {"time": len(asked)}

    moving = Stage("moving", work.stage.record, inputs, work.make, work.intact)
    moving.run()
    assert moving.kept()["key"] == moving.key(moving.kept()["inputs"])


def test_results_before_a_run_are_refused_with_what_to_do(work):
    with pytest.raises(NotRun) as caught:
        work.stage.results()
    assert (caught.value.what, caught.value.hint) == ("tree:vllm has not run", "./doit tree:vllm")


def test_inputs_that_need_a_stage_that_has_not_run_are_not_current(work, tmp_path):
    after = Work(tmp_path, "build:vllm")
    built = Stage("build:vllm", after.stage.record, lambda: work.stage.results(), after.make, after.intact)
    assert not built.current()
    work.stage.run()
    built.run()
    assert built.current()
    work.stage.record.unlink()
    assert not built.current()


def test_a_later_stage_that_is_current_makes_this_one_needless(tmp_path):
    later = Work(tmp_path, "wheels:vllm")
    earlier = Work(tmp_path, "build:vllm", unless=later.stage)
    assert not earlier.stage.current()
    later.stage.run()
    assert earlier.stage.current()
    earlier.stage.run()
    assert earlier.runs == 0
    later.inputs = {"source": "abd"}
    assert not earlier.stage.current()
    earlier.stage.run()
    assert earlier.runs == 1


def test_a_record_that_cannot_be_written_leaves_the_stage_undone(work):
    work.stage.record.mkdir(parents=True)
    with pytest.raises(OSError, match=os.strerror(21)):
        work.stage.run()
    assert not work.stage.current()
