"""Progress and the first error are read from the output of a build."""

from __future__ import annotations

from pathlib import Path

from voltforge.compile.build_log import BuildProgress, first_error
from voltforge.compile.costs import Estimates
from voltforge.compile.jobs import Memory
from voltforge.compile.scheduler import Scheduler, Status
from voltforge.system.process import Usage
from voltforge.system.progress import ProgressState


def test_progress_shows_step_object_and_memory() -> None:
    progress = BuildProgress("saxpy")
    assert progress.see("-- Detecting CXX", Usage()) == ProgressState("configuring", memory=0)
    line = "[3/41] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o"
    assert progress.see(line, Usage(now=1_500_000_000)) == ProgressState(
        "cache_kernels.cu.o", 3, 41, memory=1_500_000_000
    )
    assert progress.see("", Usage(now=1)) == ProgressState("cache_kernels.cu.o", 3, 41, memory=1)


def test_progress_of_scheduled_builds_shows_jobs_memory_and_remaining_time(tmp_path: Path) -> None:
    (tmp_path / "saxpy.json").write_text('{"a.cu.o": [10, 500000000, 1], "b.cu.o": [30, 500000000, 1]}')
    scheduler = Scheduler(
        tmp_path / "gate", 2, {"saxpy": Estimates(tmp_path / "saxpy.json", 1)}, lambda: Memory(1, 12_000_000_000)
    )
    progress = BuildProgress("saxpy", scheduler)
    line = "[2/8] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o"
    scheduler.status = Status(running=1, waiting=2, remote=1)  # a place is free: the two wait for memory
    beyond, mean = 8 - 2 - 1 - 2 - 1, 20
    assert progress.see(line, Usage(now=5)) == ProgressState(
        "cache_kernels.cu.o", 2, 8, jobs=1, waiting=2, elsewhere=1, memory=5, limit=12_000_000_000,
        left=beyond * mean / 2,
    )  # fmt: skip
    scheduler.status = Status(running=2, waiting=2)  # no place is free
    assert (progress.see("", Usage()).jobs, progress.see("", Usage()).waiting) == (2, 0)
    scheduler.memory = lambda: None
    assert progress.see("", Usage()).limit is None


def test_progress_shows_cache_hits(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path / "gate", 2, {"saxpy": Estimates(tmp_path / "saxpy.json", 1)})
    progress = BuildProgress("saxpy", scheduler, tmp_path / "log")
    assert progress.see("", Usage()).hits is None
    (tmp_path / "log").write_text("# a.cu\ndirect_cache_hit\n# b.cu\ncache_miss\n")
    assert progress.see("[1/2] Building CUDA object a.cu.o", Usage()).hits is None  # it is looked for twice a second
    seen = progress.see("", Usage())
    assert (seen.hits, seen.misses) == (1, 1)


def test_only_the_first_error_of_a_long_log_is_printed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = ["[1/2] Building CUDA object a.cu.o", "a.h(3): warning #177-D: declared but never referenced"]
    lines += ["FAILED: a.cu.o", "nvcc -c a.cu", 'a.cu(7): error: identifier "foo" is undefined', "  foo();"]
    lines += ["b.cu(9): error: a later one"] + [f"noise {number}" for number in range(10_000)] + ["Error: exit 1"]
    log.write_text("\n".join(lines))
    shown = first_error(log).splitlines()
    assert shown[:2] == ["FAILED: a.cu.o", 'a.cu(7): error: identifier "foo" is undefined']
    assert len(shown) < 20


def test_the_last_lines_are_printed_if_no_line_looks_like_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(100)))
    assert first_error(tmp_path / "log").endswith("line 99")
    assert first_error(tmp_path / "absent") == "(there is no log)"
