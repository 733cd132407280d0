"""How many jobs run at once: bounded by cores and by the memory that can really be had."""

from __future__ import annotations

import os

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge import jobs
from voltforge.errors import VoltforgeError

GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path):
    """A control group's files as cgroup v2 lays them out. Made up, for only an administrator could set real ones."""

    def write(limit: str, used: int, cache: int) -> object:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 3\n")
        return tmp_path

    return write


def test_the_cores_are_those_that_this_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert jobs.cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert jobs.cores() == len(mine)


def test_without_a_control_group_the_systems_memory_counts(tmp_path):
    free = jobs.free_memory(tmp_path / "absent")
    assert 0.5 < free / psutil.virtual_memory().available < 2


def test_a_control_group_that_leaves_less_counts(cgroup):
    assert jobs.free_memory(cgroup(str(200_000_000), 150_000_000, 20_000_000)) == 70_000_000


def test_a_control_group_without_a_limit_does_not_count(cgroup):
    assert jobs.free_memory(cgroup("max", 10**15, 0)) > 0


def test_a_control_group_that_is_full_leaves_nothing(cgroup):
    assert jobs.free_memory(cgroup("1000", 5000, 0)) == 0


@pytest.mark.parametrize("content", ["", "nonsense", "-"])
def test_control_group_files_that_make_no_sense_do_not_count(tmp_path, content):
    for name in ("memory.max", "memory.current", "memory.stat"):
        (tmp_path / name).write_text(content)
    assert jobs.free_memory(tmp_path) > 0


@pytest.mark.parametrize("asked", ["1", "7", "1024"])
def test_a_number_that_is_asked_for_is_taken(asked):
    assert jobs.count(asked, GIB) == (int(asked), "as asked")


@given(st.text(min_size=1))
def test_anything_else_is_refused_with_a_sentence(asked):
    if asked.isdecimal() and 1 <= int(asked) <= 1024:
        assert jobs.count(asked, GIB) == (int(asked), "as asked")
        return
    with pytest.raises(VoltforgeError) as caught:
        jobs.count(asked, GIB)
    assert caught.value.what == f"jobs={asked} is no number of jobs"


@pytest.mark.parametrize("asked", ["0", "1025", "-1", "2.5", "all", " 2"])
def test_numbers_out_of_bounds_and_words_are_refused(asked):
    with pytest.raises(VoltforgeError, match="is no number of jobs"):
        jobs.count(asked, GIB)


@pytest.mark.parametrize(
    ("free", "cores", "expected"),
    [
        (100 * GIB, 8, (8, "by cores")),
        (7 * GIB, 8, (4, "by memory, 1.5 GiB a job")),
        (4 * GIB, 2, (2, "by cores")),
        (GIB, 8, (1, "by memory, 1.5 GiB a job")),
        (0, 1, (1, "by memory, 1.5 GiB a job")),
    ],
)
def test_cores_and_memory_bound_the_jobs_and_a_rest_is_left_to_the_machine(monkeypatch, free, cores, expected):
    monkeypatch.setattr(jobs, "free_memory", lambda: free)
    monkeypatch.setattr(jobs, "cores", lambda: cores)
    assert jobs.count("", 3 * GIB // 2) == expected


def test_on_this_machine_it_is_at_least_one_and_at_most_the_cores():
    count, why = jobs.count("", GIB)
    assert 1 <= count <= jobs.cores()
    assert why.startswith(("by cores", "by memory"))
