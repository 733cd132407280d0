"""What objects take: measured here, else stated by the recipe, else the recipe's memory per job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.compile import costs
from voltforge.compile.costs import Need, Needs

GIB = 1 << 30
SCAN = "CMakeFiles/_C.dir/csrc/mamba/selective_scan_fwd.cu.o"


@pytest.fixture
def known(tmp_path: Path) -> Needs:
    return Needs(tmp_path / "history" / "vllm.json", GIB, {"*selective_scan_fwd.cu.o": Need(84, 2 * GIB)})


def test_of_an_object_that_nobody_knows_the_recipes_memory_per_job_is_expected(known):
    assert known.of("a.cu.o") == Need(costs.SECONDS, GIB)


def test_what_the_recipe_states_counts_until_it_was_measured(known):
    assert known.of(SCAN) == Need(84, 2 * GIB)
    known.learn(SCAN, Need(50, GIB))
    assert known.of(SCAN) == Need(50, int(GIB * costs.MARGIN))


def test_what_was_measured_is_known_to_the_next_run(known):
    known.learn("a.cu.o", Need(12.3456, 3 * GIB))
    known.keep()
    assert Needs(known.path, GIB).measured() == {"a.cu.o": Need(12.346, 3 * GIB)}


def test_what_came_from_a_cache_takes_as_long_as_before_when_it_is_compiled(known):
    known.learn("a.cu.o", Need(40, 3 * GIB))
    known.learn("a.cu.o", Need(0.1, 1000))
    assert known.measured() == {"a.cu.o": Need(40, 3 * GIB)}
    assert known.last() == {"a.cu.o": 0.1}
    known.keep()
    assert Needs(known.path, GIB).last() == {"a.cu.o": 0.1}
    known.learn("a.cu.o", Need(20, 2 * GIB))
    assert known.measured() == {"a.cu.o": Need(20, 2 * GIB)}


def test_the_last_measurement_counts(known):
    known.learn("a.cu.o", Need(10, 3 * GIB))
    known.learn("a.cu.o", Need(20, 2 * GIB))
    assert known.measured() == {"a.cu.o": Need(20, 2 * GIB)}


def test_no_compiler_is_expected_to_hold_nearly_nothing(tmp_path):
    known = Needs(tmp_path / "vllm.json", 1000)
    known.learn("a.cu.o", Need(10, 1000))
    assert known.of("a.cu.o").memory == costs.LEAST


def test_a_compile_that_failed_halves_what_is_expected_at_most(known):
    known.learn("new.cu.o", Need(8, 1000))
    assert known.measured()["new.cu.o"].memory == GIB // 2
    known.learn("a.cu.o", Need(10, 4 * GIB))
    known.learn("a.cu.o", Need(8, 1000))
    assert known.measured()["a.cu.o"].memory == 2 * GIB


def test_what_another_process_learnt_meanwhile_stays(known):
    other = Needs(known.path, GIB)
    other.learn("b.cu.o", Need(7, 2 * GIB))
    other.keep()
    known.learn("a.cu.o", Need(10, 3 * GIB))
    known.keep()
    assert Needs(known.path, GIB).measured() == {"a.cu.o": Need(10, 3 * GIB), "b.cu.o": Need(7, 2 * GIB)}


@pytest.mark.parametrize("need", [Need(0.1, 1000), Need(10, 0)], ids=["it ended at once", "it was not seen"])
def test_of_the_memory_of_what_was_hardly_seen_nothing_is_learnt(known, need):
    known.learn("a.cu.o", need)
    assert known.measured() == {"a.cu.o": Need(need.seconds, known.otherwise)}


def test_what_cmake_compiles_to_see_whether_it_can_is_not_learnt(known):
    known.learn("CMakeFiles/cmTC_7a1b2.dir/testCXXCompiler.cxx.o", Need(10, GIB))
    known.keep()
    assert not known.measured()
    assert not known.path.exists()


@given(st.one_of(st.binary(), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps({"a.cu.o": value, "b.cu.o": [1.5, 2000, 1]}).encode())))  # fmt: skip
def test_a_history_that_makes_no_sense_is_passed_over(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("history") / "vllm.json"
    path.write_bytes(written)
    for need in Needs(path, GIB).measured().values():
        assert need.seconds >= 0
        assert need.memory > 0


def test_a_line_that_makes_sense_counts_beside_others_that_do_not(tmp_path):
    path = tmp_path / "vllm.json"
    path.write_text(
        json.dumps(
            {"a": [1e400, 1, 1], "b": [-1, 2, 1], "c": ["1", "2", 3], "d": [1, 1], "e": None, "f": [2.5, 4000, 2.5]}
        )
    )
    assert Needs(path, GIB).measured() == {"f": Need(2.5, 4000)}


def test_a_disk_that_does_not_take_the_history_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    known = Needs(tmp_path / "file" / "vllm.json", GIB)
    known.learn("a.cu.o", Need(10, GIB))
    known.keep()
    assert known.of("a.cu.o").seconds == 10
