"""The number of jobs is bounded by the cores and by the memory that is really free."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.compile import jobs
from voltforge.compile.jobs import Memory
from voltforge.errors import VoltforgeError

GIB = 1 << 30
SYSTEM = Memory(20 * GIB, 24 * GIB)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 24 GiB, 20 of them free."""
    there = psutil.virtual_memory()._replace(available=SYSTEM.free, total=SYSTEM.limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)


class Groups:
    """Control groups in the kernel's layout, made up, because only an administrator can set real ones."""

    def __init__(self, folder: Path) -> None:
        self.mount, self.own = folder / "cgroup", folder / "own"

    def are(self, *lines: str) -> None:
        self.own.write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, limit: str, used: int, cache: int, version: int = 2) -> None:
        names, prefix = (("memory.max", "memory.current"), "") if version == 2 else (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")  # fmt: skip
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {cache}\nactive_file 3\n")

    def memory(self) -> Memory | None:
        return jobs.memory(self.mount, self.own)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_only_the_cores_of_this_process_count():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert jobs.cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert jobs.cores() == len(mine)


def test_the_system_memory_counts_without_a_control_group(groups):
    assert groups.memory() == SYSTEM


def test_a_smaller_limit_of_a_control_group_counts(groups):
    groups.are("0::/build")
    groups.write("build", str(2 * GIB), GIB, 1000)
    assert groups.memory() == Memory(GIB + 1000, 2 * GIB)


def test_a_smaller_limit_of_an_outer_control_group_counts(groups):
    groups.are("0::/user/build")
    groups.write("user/build", "max", GIB, 0)
    groups.write("user", str(3 * GIB), GIB, 0)
    assert groups.memory() == Memory(2 * GIB, 3 * GIB)


def test_the_smallest_of_several_limits_counts(groups):
    groups.are("0::/user/build")
    groups.write("user/build", str(8 * GIB), GIB, 0)
    groups.write("user", str(6 * GIB), 5 * GIB, 0)
    assert groups.memory() == Memory(GIB, 6 * GIB)


def test_a_container_reads_its_group_at_the_root(groups):
    groups.are("0::/what/the/host/calls/it")
    groups.write("", str(2 * GIB), GIB, 0)
    assert groups.memory() == Memory(GIB, 2 * GIB)


def test_control_groups_of_version_1_count(groups):
    groups.are("4:memory:/build", "3:cpuset:/", "0::/")
    groups.write("memory/build", str(2 * GIB), GIB, 500, version=1)
    groups.write("memory", str(2**63 - 4096), 4 * GIB, 0, version=1)
    assert groups.memory() == Memory(GIB + 500, 2 * GIB)


def test_groups_of_other_controllers_are_ignored(groups):
    groups.are("4:cpu,cpuacct:/build")
    groups.write("cpu,cpuacct/build", "1000", 10, 0)
    assert groups.memory() == SYSTEM


def test_a_control_group_without_a_limit_is_ignored(groups):
    groups.write("", "max", 10**15, 0)
    assert groups.memory() == SYSTEM


def test_a_control_group_that_is_full_leaves_nothing(groups):
    groups.write("", "1000", 5000, 0)
    assert groups.memory() == Memory(0, 1000)


@pytest.mark.parametrize("content", ["", "nonsense", "-", "1 2"])
def test_unreadable_control_group_files_are_ignored(groups, content):
    groups.write("", "1000", 5, 0)
    for path in groups.mount.iterdir():
        path.write_text(content)
    assert groups.memory() == SYSTEM


@pytest.mark.parametrize("error", [OSError("no /proc/meminfo"), KeyError("MemTotal"), ValueError("odd")])
def test_memory_is_unknown_if_no_source_reports_it(groups, monkeypatch, error):
    def odd() -> None:
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", odd)
    assert groups.memory() is None
    groups.write("", "5000", 1000, 0)
    assert groups.memory() == Memory(4000, 5000)


def test_an_eighth_of_the_memory_or_a_gibibyte_stays_free():
    assert Memory(4 * GIB, 4 * GIB).room == 7 * GIB // 2
    assert Memory(20 * GIB, 24 * GIB).room == 19 * GIB


def test_a_limit_of_the_user_bounds_the_memory():
    assert SYSTEM.within(6 * GIB, 2 * GIB) == Memory(4 * GIB, 6 * GIB)
    assert SYSTEM.within(6 * GIB, 7 * GIB) == Memory(0, 6 * GIB)
    assert SYSTEM.within(100 * GIB, 0) == SYSTEM


@pytest.mark.parametrize("text", ["1", "7", "1024"])
def test_a_chosen_number_is_used(text):
    assert jobs.chosen(text) == int(text)
    assert jobs.count(text, GIB) == (int(text), "as chosen")


@given(st.text(min_size=1))
def test_text_that_is_not_a_number_is_refused(text):
    if text.isascii() and text.isdecimal() and len(text) < 20:
        assert jobs.chosen(text) in (None, int(text))
        return
    with pytest.raises(VoltforgeError) as caught:
        jobs.chosen(text)
    assert caught.value.what == f"jobs={text} is not a number"
    assert caught.value.hint == "jobs=N with N from 1 to 1024"


@pytest.mark.parametrize("text", ["-1", "2.5", "all", " 2", "٣", "9" * 5000])
def test_words_and_huge_numbers_are_refused(text):
    with pytest.raises(VoltforgeError, match="is not a number"):
        jobs.count(text, GIB)


@pytest.mark.parametrize("text", ["0", "1025", "10000"])
def test_a_number_out_of_range_is_reported_and_ignored(text, capsys):
    assert jobs.count(text, GIB) == jobs.count("", GIB)
    assert capsys.readouterr().out == (
        f"! jobs={text} is not between 1 and 1024 and is ignored: this machine decides the number of jobs\n"
    )


@pytest.mark.parametrize(
    ("free", "cores", "expected"),
    [
        (100 * GIB, 8, (8, "by cores")),
        (7 * GIB, 8, (4, "by memory, 1.61 GB per job")),
        (4 * GIB, 2, (2, "by cores")),
        (GIB, 8, (1, "by memory, 1.61 GB per job")),
        (0, 1, (1, "by memory, 1.61 GB per job")),
    ],
)
def test_cores_and_memory_bound_the_jobs_and_some_memory_stays_free(monkeypatch, free, cores, expected):
    monkeypatch.setattr(jobs, "memory", lambda: Memory(free, 200 * GIB))
    monkeypatch.setattr(jobs, "cores", lambda: cores)
    assert jobs.count("", 3 * GIB // 2) == expected


def test_the_cores_decide_if_the_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(jobs, "memory", lambda: None)
    assert jobs.count("", GIB) == (jobs.cores(), "by cores; the free memory is unknown")


def test_the_number_of_jobs_is_between_one_and_the_cores():
    count, why = jobs.count("", GIB)
    assert 1 <= count <= jobs.cores()
    assert why.startswith(("by cores", "by memory"))
