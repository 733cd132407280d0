"""Estimates: measured here, else stated by the recipe, else the recipe's memory per job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.compile import costs
from voltforge.compile.costs import Estimate, Estimates

GIB = 1 << 30
SCAN = "CMakeFiles/_C.dir/csrc/mamba/selective_scan_fwd.cu.o"


@pytest.fixture
def estimates(tmp_path: Path) -> Estimates:
    return Estimates(tmp_path / "history" / "vllm.json", GIB, {"*selective_scan_fwd.cu.o": Estimate(84, 2 * GIB)})


def test_unknown_object_gets_the_memory_per_job_of_the_recipe(estimates):
    assert estimates.of("a.cu.o") == Estimate(costs.DEFAULT_SECONDS, GIB)


def test_estimate_of_the_recipe_is_used_until_a_measurement(estimates):
    assert estimates.of(SCAN) == Estimate(84, 2 * GIB)
    estimates.record(SCAN, Estimate(50, GIB))
    assert estimates.of(SCAN) == Estimate(50, int(GIB * costs.MARGIN))


def test_saved_measurement_is_read_by_the_next_run(estimates):
    estimates.record("a.cu.o", Estimate(12.3456, 3 * GIB))
    estimates.save()
    assert Estimates(estimates.path, GIB).measured() == {"a.cu.o": Estimate(12.346, 3 * GIB)}


def test_cache_hit_does_not_change_the_measured_time(estimates):
    estimates.record("a.cu.o", Estimate(40, 3 * GIB))
    estimates.record("a.cu.o", Estimate(0.1, 1000))
    assert estimates.measured() == {"a.cu.o": Estimate(40, 3 * GIB)}
    assert estimates.last_seconds() == {"a.cu.o": 0.1}
    estimates.save()
    assert Estimates(estimates.path, GIB).last_seconds() == {"a.cu.o": 0.1}
    estimates.record("a.cu.o", Estimate(20, 2 * GIB))
    assert estimates.measured() == {"a.cu.o": Estimate(20, 2 * GIB)}


def test_newest_measurement_replaces_the_old(estimates):
    estimates.record("a.cu.o", Estimate(10, 3 * GIB))
    estimates.record("a.cu.o", Estimate(20, 2 * GIB))
    assert estimates.measured() == {"a.cu.o": Estimate(20, 2 * GIB)}


def test_memory_estimate_has_a_minimum(tmp_path):
    estimates = Estimates(tmp_path / "vllm.json", 1000)
    estimates.record("a.cu.o", Estimate(10, 1000))
    assert estimates.of("a.cu.o").memory == costs.MIN_MEMORY


def test_failed_compile_at_most_halves_the_memory_estimate(estimates):
    estimates.record("new.cu.o", Estimate(8, 1000))
    assert estimates.measured()["new.cu.o"].memory == GIB // 2
    estimates.record("a.cu.o", Estimate(10, 4 * GIB))
    estimates.record("a.cu.o", Estimate(8, 1000))
    assert estimates.measured()["a.cu.o"].memory == 2 * GIB


def test_measurements_of_another_process_are_kept(estimates):
    other = Estimates(estimates.path, GIB)
    other.record("b.cu.o", Estimate(7, 2 * GIB))
    other.save()
    estimates.record("a.cu.o", Estimate(10, 3 * GIB))
    estimates.save()
    assert Estimates(estimates.path, GIB).measured() == {
        "a.cu.o": Estimate(10, 3 * GIB),
        "b.cu.o": Estimate(7, 2 * GIB),
    }


@pytest.mark.parametrize("measurement", [Estimate(0.1, 1000), Estimate(10, 0)], ids=["too short", "no sample"])
def test_memory_of_a_command_with_too_few_samples_is_not_recorded(estimates, measurement):
    estimates.record("a.cu.o", measurement)
    assert estimates.measured() == {"a.cu.o": Estimate(measurement.seconds, estimates.default_memory)}


def test_test_programs_of_cmake_are_not_recorded(estimates):
    estimates.record("CMakeFiles/cmTC_7a1b2.dir/testCXXCompiler.cxx.o", Estimate(10, GIB))
    estimates.save()
    assert not estimates.measured()
    assert not estimates.path.exists()


@given(st.one_of(st.binary(), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps({"a.cu.o": value, "b.cu.o": [1.5, 2000, 1]}).encode())))  # fmt: skip
def test_invalid_history_is_ignored(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("history") / "vllm.json"
    path.write_bytes(written)
    for estimate in Estimates(path, GIB).measured().values():
        assert estimate.seconds >= 0
        assert estimate.memory > 0


def test_valid_row_is_read_beside_invalid_rows(tmp_path):
    path = tmp_path / "vllm.json"
    path.write_text(
        json.dumps(
            {"a": [1e400, 1, 1], "b": [-1, 2, 1], "c": ["1", "2", 3], "d": [1, 1], "e": None, "f": [2.5, 4000, 2.5]}
        )
    )
    assert Estimates(path, GIB).measured() == {"f": Estimate(2.5, 4000)}


def test_failed_write_of_the_history_is_ignored(tmp_path):
    (tmp_path / "file").write_text("")
    estimates = Estimates(tmp_path / "file" / "vllm.json", GIB)
    estimates.record("a.cu.o", Estimate(10, GIB))
    estimates.save()
    assert estimates.of("a.cu.o").seconds == 10
