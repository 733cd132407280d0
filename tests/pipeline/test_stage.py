"""A stage runs if an input changed, and counts as finished only with its record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.errors import VoltforgeError
from voltforge.pipeline import stage as module
from voltforge.pipeline.stage import Changed, NotRun, Stage, changed
from voltforge.system import files
from voltforge.system.records import CheckoutPath


@dataclass(frozen=True)
class Product:
    path: CheckoutPath


class Work:
    """A stage that writes a file and counts its runs."""

    def __init__(self, folder: Path, name: str = "tree:vllm", unless: Callable[[], bool] = lambda: False) -> None:
        self.inputs: dict[str, Any] = {"source": "abc"}
        self.product = folder / f"{name}.product"
        self.runs = 0
        self.fails: BaseException | None = None
        self.stage = Stage(
            name, folder / "records" / f"{name}.json", folder, Product, lambda: self.inputs, self.make, self.seal,
            unless=unless,
        )  # fmt: skip

    def make(self, key: str) -> Product:
        self.runs += 1
        if self.fails:
            raise self.fails
        self.product.write_text(key)
        return Product(self.product)

    def seal(self, product: Product) -> str:
        return files.sha256(product.path)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_a_stage_runs_once_and_records_its_inputs(work):
    assert not work.stage.current()
    work.stage.run()
    work.stage.run()
    assert work.runs == 1
    assert work.stage.current()
    kept = json.loads(work.stage.path.read_text())
    assert kept == {
        "stage": "tree:vllm", "key": work.stage.key(), "inputs": {"source": "abc"},
        "results": {"path": work.product.name}, "seal": files.sha256(work.product),
    }  # fmt: skip
    assert work.product.read_text() == kept["key"]
    assert work.stage.result() == Product(work.product)


def test_a_changed_input_makes_it_run_again(work):
    work.stage.run()
    work.inputs = {"source": "abd"}
    assert not work.stage.current()
    work.stage.run()
    assert work.runs == 2
    assert work.stage.finished().inputs == {"source": "abd"}


def test_a_new_version_of_the_pipeline_makes_it_run_again(work, monkeypatch):
    work.stage.run()
    monkeypatch.setattr(module, "PIPELINE_VERSION", module.PIPELINE_VERSION + 1)
    assert not work.stage.current()


def test_a_missing_product_makes_it_run_again(work):
    work.stage.run()
    work.product.unlink()
    assert not work.stage.current()
    work.stage.run()
    assert work.stage.current()


def test_a_missing_record_makes_it_run_again(work):
    work.stage.run()
    work.stage.path.unlink()
    assert not work.stage.current()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '"text"', "{}", '{"key": "x"}', '{"results": 3}', "\0\1"])
def test_an_unreadable_record_counts_as_missing(work, content):
    work.stage.path.parent.mkdir()
    work.stage.path.write_text(content)
    assert work.stage.record() is None
    assert not work.stage.current()
    work.stage.run()
    assert work.stage.current()


VALUES = st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()) | st.none(), max_size=4)


@given(VALUES, VALUES)
def test_keys_are_equal_only_for_equal_inputs(one, other):
    work = Work(Path("/never/written"))
    assert (work.stage.key(one) == work.stage.key(other)) == (one == other)


def test_two_stages_with_equal_inputs_have_different_keys(tmp_path):
    assert Work(tmp_path, "tree:a").stage.key() != Work(tmp_path, "tree:b").stage.key()


@pytest.mark.parametrize("problem", [VoltforgeError("no"), ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_failed_work_leaves_no_record_not_even_the_old_one(work, problem):
    work.stage.run()
    work.inputs, work.fails = {"source": "abd"}, problem
    with pytest.raises(type(problem)):
        work.stage.run()
    assert not work.stage.path.exists()
    work.inputs = {"source": "abc"}
    assert not work.stage.current()


def test_a_killed_run_leaves_no_record(tmp_path):
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from voltforge.pipeline.stage import Stage
        from voltforge.sources.tree import Tree
        def make(key):
            if sys.argv[2] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return Tree(Path("/tree"), 1)
        record = Path(sys.argv[1])
        stage = Stage("tree:x", record, record.parent, Tree, lambda: {"for": sys.argv[2]}, make)
        stage.run()
        print(stage.current())
    """
    record = tmp_path / "record.json"
    words = [sys.executable, "-c", script, str(record)]
    assert subprocess.run([*words, "live"], capture_output=True, text=True, check=True).stdout == "True\n"
    assert subprocess.run([*words, "die"], check=False).returncode == -signal.SIGKILL
    assert [*tmp_path.iterdir()] == []


def test_an_input_that_changes_during_the_work_is_named_and_nothing_is_recorded(work):
    make = work.stage.make

    def slow(key: str) -> Product:
        work.inputs = {"source": "abd", "patches": {"0001.patch": "1234"}}
        return make(key)

    moving = replace(work.stage, make=slow)
    with pytest.raises(Changed) as caught:
        moving.run()
    assert caught.value.what == (
        "inputs of tree:vllm changed during the run; nothing was recorded:"
        '\n  - patches: (none) -> {"0001.patch": "1234"}\n  - source: abc -> abd'
    )
    assert not work.stage.path.exists()
    moving.run()
    assert moving.finished().inputs == work.inputs


def test_inputs_of_a_stage_before_must_not_change(work, tmp_path):
    after = Work(tmp_path, "build:vllm")
    built = replace(after.stage, after=lambda: [work.stage])
    with pytest.raises(NotRun, match="tree:vllm has not run"):
        built.run()
    work.stage.run()
    work.inputs = {"source": "abd"}
    with pytest.raises(Changed, match="inputs of build:vllm changed during the run"):
        built.run()
    assert after.runs == 0
    work.stage.run()
    built.run()
    assert built.current()


def test_the_result_of_a_stage_before_must_stay_intact_until_the_end(work, tmp_path):
    after = Work(tmp_path, "build:vllm")

    def spoiling(key: str) -> Product:
        work.product.unlink()
        return after.make(key)

    built = replace(after.stage, after=lambda: [work.stage], make=spoiling)
    work.stage.run()
    with pytest.raises(Changed, match="the result of tree:vllm: complete -> changed or missing"):
        built.run()
    assert not built.path.exists()


NESTED = st.recursive(
    st.none() | st.text(max_size=3) | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(NESTED, NESTED)
def test_changes_are_reported_exactly_where_values_differ(one, other):
    found = [*changed(one, other)]
    assert all(files.digest(change.old) != files.digest(change.new) for change in found)
    assert bool(found) == (without_nothing(one) != without_nothing(other))


def without_nothing(value: Any) -> Any:
    """The value without None entries: an input that is None and a missing input are equal."""
    if isinstance(value, dict):
        return {key: inner for key, item in value.items() if (inner := without_nothing(item)) is not None}
    return value


def test_changes_are_named_by_their_keys_from_the_outside_in(work):
    work.inputs = {"patches": {"1": "a", "2": "b"}, "arch": ["7.0"]}
    work.stage.run()
    work.inputs = {"patches": {"1": "a", "2": "c", "3": "d"}, "arch": ["7.0", "8.0"]}
    told = ['arch: ["7.0"] -> ["7.0", "8.0"]', "patches.2: b -> c", "patches.3: (none) -> d"]
    assert [str(change) for change in work.stage.changes()] == told


def test_the_result_of_a_stage_that_has_not_run_is_refused_with_the_command(work):
    with pytest.raises(NotRun) as caught:
        work.stage.result()
    assert (caught.value.what, caught.value.hint) == ("tree:vllm has not run", "./doit tree:vllm")


def test_a_stage_is_stale_if_an_input_needs_a_stage_that_has_not_run(work, tmp_path):
    after = Work(tmp_path, "build:vllm")
    built = replace(after.stage, inputs=lambda: {"tree": work.stage.result().path.name})
    assert not built.current()
    work.stage.run()
    built.run()
    assert built.current()
    work.stage.path.unlink()
    assert not built.current()


def test_a_current_later_stage_makes_this_one_unnecessary(tmp_path):
    later = Work(tmp_path, "wheels:vllm")
    earlier = Work(tmp_path, "build:vllm", unless=later.stage.current)
    assert not earlier.stage.current()
    later.stage.run()
    assert earlier.stage.current()
    earlier.stage.run()
    assert earlier.runs == 0
    later.inputs = {"source": "abd"}
    assert not earlier.stage.current()
    earlier.stage.run()
    assert earlier.runs == 1


def test_a_stage_whose_record_cannot_be_written_is_not_current(work):
    work.stage.path.mkdir(parents=True)
    with pytest.raises(OSError, match=os.strerror(21)):
        work.stage.run()
    assert not work.stage.current()


def test_a_required_stage_runs_even_if_a_later_result_exists(tmp_path):
    work = Work(tmp_path, unless=lambda: True)
    work.stage.run()
    assert work.runs == 0
    assert work.stage.required() == Product(work.product)
    assert work.runs == 1
