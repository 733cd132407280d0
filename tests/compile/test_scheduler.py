"""The scheduler grants slots to real commands, which send requests through the launcher."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cgroup import Limited, limited
from tests.support.checkouts import ROOT
from voltforge.compile import scheduler as scheduler_module
from voltforge.compile.costs import Estimate, Estimates
from voltforge.compile.jobs import Memory
from voltforge.compile.scheduler import LAUNCHER, Job, Scheduler, next_job
from voltforge.errors import VoltforgeError

MIB = 1 << 20
TIMEOUT = 60
"""Seconds to wait for a state that an idle machine reaches at once."""


class SchedulerHarness:
    """A scheduler, and commands that send it requests through the launcher."""

    def __init__(self, folder: Path, jobs: int = 2, free: int = 10**12, build: str = "", **stated: Estimate) -> None:
        self.free, self.build = free, build
        estimates = Estimates(
            folder / "history" / "vllm.json", 100 * MIB, {f"{name}.o": estimate for name, estimate in stated.items()}
        )
        self.scheduler = Scheduler(folder / "gate", jobs, {"vllm": estimates}, lambda: Memory(self.free, 0))
        self.estimates = estimates
        self.children: list[subprocess.Popen[str]] = []

    def launch(self, name: str, code: str = "input()", *, compiles: bool = False) -> subprocess.Popen:
        """Start a command for an object. By default it runs until :func:`end_command`; a compile gets ``-c``."""
        self.scheduler.start()
        python = [sys.executable, "-I", "-S"]
        runs = [*python, "-c"] if compiles else [sys.executable, "-ISc"]
        command = [*python, self.scheduler.folder / LAUNCHER.name, *runs, code, "-o", name]
        variables = {"GATE": str(self.scheduler.folder), "PACKAGE": "vllm", "BUILD": self.build}
        environ = {**os.environ, **{f"VOLTFORGE_{name}": value for name, value in variables.items()}}
        child = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.children.append(child)
        return child

    def wait_for(self, running: int, waiting: int) -> None:
        """Wait until so many commands run, and so many wait."""
        until(lambda: (self.scheduler.status.running, self.scheduler.status.waiting) == (running, waiting))

    def running(self) -> list[str]:
        """The names of the running objects."""
        return sorted(job.name.removesuffix(".o") for job in self.scheduler._running)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end_command(child: subprocess.Popen) -> int:
    """End a command and return its status."""
    child.communicate("\n", timeout=TIMEOUT)
    return child.returncode


@pytest.fixture
def new_harness(tmp_path: Path) -> Iterator[Callable[..., SchedulerHarness]]:
    harnesses: list[SchedulerHarness] = []

    def new(jobs: int = 2, free: int = 10**12, **stated: Estimate) -> SchedulerHarness:
        harnesses.append(SchedulerHarness(tmp_path, jobs, free, **stated))
        return harnesses[-1]

    yield new
    for child in [child for harness in harnesses for child in harness.children]:
        child.kill()
        child.communicate()


# --- grants ---


def test_running_commands_never_exceed_the_slots(new_harness):
    harness = new_harness(jobs=2)
    children = [harness.launch(f"{number}.o") for number in range(4)]
    harness.wait_for(running=2, waiting=2)
    first = harness.running()
    assert end_command(children[int(first[0])]) == 0
    harness.wait_for(running=2, waiting=1)
    assert first[1] in harness.running()


def test_longest_job_starts_first(new_harness):
    harness = new_harness(
        jobs=1, first=Estimate(5, MIB), short=Estimate(1, MIB), long=Estimate(80, MIB), middle=Estimate(30, MIB)
    )
    children = {"first": harness.launch("first.o")}
    harness.wait_for(running=1, waiting=0)
    children |= {name: harness.launch(f"{name}.o") for name in ("short", "long", "middle")}
    harness.wait_for(running=1, waiting=3)
    for name, then in (("first", ["long"]), ("long", ["middle"]), ("middle", ["short"]), ("short", [])):
        end_command(children[name])
        until(lambda then=then: harness.running() == then)


def test_large_jobs_wait_for_memory_while_a_small_job_starts(new_harness):
    harness = new_harness(
        8, 1000 * MIB, first=Estimate(9, 600 * MIB), second=Estimate(8, 600 * MIB), light=Estimate(1, 100 * MIB)
    )
    first = harness.launch("first.o")
    harness.wait_for(running=1, waiting=0)
    harness.launch("second.o")
    harness.launch("light.o")
    harness.wait_for(running=2, waiting=1)
    assert harness.running() == ["first", "light"]
    end_command(first)
    harness.wait_for(running=2, waiting=0)
    assert harness.running() == ["light", "second"]


def test_memory_that_a_job_already_holds_is_not_counted_twice(new_harness):
    harness = new_harness(8, 1000 * MIB, grown=Estimate(9, 600 * MIB), next=Estimate(8, 500 * MIB))
    harness.launch("grown.o", f"held = bytearray({700 * MIB}); input()")
    until(lambda: harness.scheduler.status.memory > 700 * MIB)
    harness.launch("next.o")
    harness.wait_for(running=2, waiting=0)


def test_job_waits_until_memory_is_free(new_harness):
    harness = new_harness(8, 1000 * MIB)
    harness.launch("a.o")
    harness.wait_for(running=1, waiting=0)
    harness.free = 50 * MIB
    harness.launch("b.o")
    harness.wait_for(running=1, waiting=1)
    harness.free = 1000 * MIB
    harness.wait_for(running=2, waiting=0)


def test_one_job_runs_with_too_little_memory_and_prints_one_note(new_harness, capsys):
    harness = new_harness(8, MIB, big=Estimate(9, 600 * MIB))
    assert end_command(harness.launch("big.o")) == 0
    assert end_command(harness.launch("big.o")) == 0
    assert capsys.readouterr().out == "  big.o runs alone: it is expected to take 629.1 MB, and 1.0 MB are free\n"


def test_unknown_memory_limits_nothing_but_the_slots(new_harness):
    harness = new_harness(jobs=2, big=Estimate(9, 10**13))
    harness.scheduler.memory = lambda: None
    for name in ("big.o", "a.o", "b.o"):
        harness.launch(name)
    harness.wait_for(running=2, waiting=1)


def test_memory_limit_includes_this_process_and_its_children(new_harness):
    harness = new_harness(8)
    harness.scheduler.limit = 1000 * MIB
    harness.launch("a.o", f"held = bytearray({600 * MIB}); input()")
    harness.wait_for(running=1, waiting=0)
    until(lambda: harness.scheduler._run_memory > 600 * MIB)
    harness.launch("b.o", "input()")
    harness.scheduler.estimates["vllm"].stated = {"c.o": Estimate(9, 500 * MIB)}
    harness.launch("c.o")
    harness.wait_for(running=2, waiting=1)
    assert harness.running() == ["a", "b"]


SIZES = st.integers(0, 100)
JOBS = st.lists(
    st.builds(lambda seconds, memory: Job(None, 0, estimate=Estimate(seconds, memory)), SIZES, SIZES), max_size=6
)


@given(JOBS, JOBS, st.integers(1, 8), st.none() | st.integers(-50, 150))
def test_next_job_is_the_longest_that_fits_or_the_smallest_if_nothing_runs(queue, running, jobs, room):
    job = next_job(queue, running, jobs, room)
    fitting = [queued for queued in queue if room is None or queued.estimate.memory <= room]
    if job is None:
        assert not queue or running
        assert not queue or len(running) >= jobs or not fitting
        return
    assert len(running) < jobs
    if job in fitting:
        assert all(other.estimate.seconds <= job.estimate.seconds for other in fitting)
    else:
        assert not running
        assert not fitting
        assert all(other.estimate.memory >= job.estimate.memory for other in queue)


# --- measurements ---


def test_time_and_memory_with_children_are_measured_and_saved(new_harness):
    harness = new_harness()
    held = f"import time; held = bytearray({200 * MIB}); time.sleep(1.2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    assert end_command(harness.launch("a.o", code)) == 0
    harness.wait_for(running=0, waiting=0)
    estimate = harness.estimates.measured()["a.o"]
    assert 1.2 <= estimate.seconds < TIMEOUT
    assert 200 * MIB < estimate.memory < 400 * MIB
    harness.scheduler.save()
    assert Estimates(harness.estimates.path, 1).of("a.o").memory == int(estimate.memory * 1.25)


def test_peak_between_two_samples_is_measured(new_harness, monkeypatch):
    monkeypatch.setattr(scheduler_module, "SAMPLE_INTERVAL", 1.0)
    harness = new_harness()
    end_command(harness.launch("a.o", f"held = bytearray({300 * MIB}); del held; import time; time.sleep(3)"))
    harness.wait_for(running=0, waiting=0)
    assert harness.estimates.measured()["a.o"].memory > 300 * MIB


def test_remaining_time_counts_running_queued_and_unqueued_jobs(new_harness, tmp_path):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "vllm.json").write_text('{"a.o": [1000, 9, 1], "b.o": [400, 9, 1], "c.o": [400, 9, 1]}')
    harness = new_harness(jobs=2)
    assert harness.scheduler.remaining_seconds("vllm", unqueued=4) == 4 * 600 / 2
    for name in ("a", "b", "c"):
        harness.launch(f"{name}.o")
    harness.wait_for(running=2, waiting=1)
    assert 1000 - TIMEOUT < harness.scheduler.remaining_seconds("vllm") <= 1000  # the longest alone
    assert 2100 - TIMEOUT < harness.scheduler.remaining_seconds("vllm", unqueued=4) <= 2100


def test_remaining_time_of_a_first_build_is_unknown(new_harness):
    harness = new_harness()
    harness.launch("a.o")
    harness.wait_for(running=1, waiting=0)
    assert harness.scheduler.remaining_seconds("vllm") is None


# --- failures ---


@pytest.mark.parametrize("running", [True, False], ids=["running", "queued"])
def test_killed_job_frees_its_slot(new_harness, running):
    harness = new_harness(jobs=1)
    first = harness.launch("a.o")
    harness.wait_for(running=1, waiting=0)
    second = harness.launch("b.o")
    harness.wait_for(running=1, waiting=1)
    (first if running else second).kill()
    harness.wait_for(running=1, waiting=0)
    assert harness.running() == (["b"] if running else ["a"])


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"\xff\xfe\n", b"nobody\tx.o\n", b"x" * 100_000],
    ids=["empty", "not text", "unknown package", "too long"],
)
def test_invalid_request_does_not_stop_other_jobs(new_harness, request_bytes):
    harness = new_harness(jobs=2)
    harness.scheduler.start()
    with socket.socket(socket.AF_UNIX) as client:
        with scheduler_module.socket_address(harness.scheduler.folder, "socket") as address:
            client.connect(address)
        with contextlib.suppress(OSError):
            client.sendall(request_bytes)
        assert end_command(harness.launch("a.o")) == 0
    harness.wait_for(running=0, waiting=0)


def test_socket_works_in_a_folder_with_a_long_path(tmp_path):
    harness = SchedulerHarness(tmp_path / ("x" * 100) / ("y" * 100))
    assert end_command(harness.launch("a.o")) == 0


def test_stale_socket_of_a_killed_run_is_replaced(new_harness):
    harness = new_harness()
    harness.scheduler.folder.mkdir()
    with (
        scheduler_module.socket_address(harness.scheduler.folder, "socket") as address,
        socket.socket(socket.AF_UNIX) as old,
    ):
        old.bind(address)
    assert end_command(harness.launch("a.o")) == 0


def test_folder_that_cannot_hold_a_socket_is_an_error_with_a_hint(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_module, "START_TIMEOUT", 0.5)
    (tmp_path / "gate" / "lock").mkdir(parents=True)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(VoltforgeError, match="the scheduler cannot listen on") as caught:
        SchedulerHarness(tmp_path).scheduler.start()
    assert caught.value.hint


def test_two_processes_of_a_run_share_one_scheduler(new_harness, tmp_path):
    harness = new_harness(jobs=1)
    harness.launch("a.o")
    harness.wait_for(running=1, waiting=0)
    if not (child := os.fork()):
        status = 1
        with contextlib.suppress(BaseException):
            other = SchedulerHarness(tmp_path, jobs=8)
            other.launch("b.o", "print()").wait(1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = 0 if other.children and other.children[0].poll() is None else 1
        other.children[0].kill()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_background_process_of_a_command_does_not_keep_the_slot(new_harness):
    harness = new_harness(jobs=1)
    daemon = "import os, sys, time\nif not os.fork():\n    time.sleep(5)\n"
    assert harness.launch("a.o", daemon).wait(TIMEOUT) == 0
    assert end_command(harness.launch("b.o")) == 0


def test_scheduler_that_crashes_ends_the_waiting_launchers(new_harness, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    harness = new_harness(jobs=1)
    harness.launch("a.o")
    harness.wait_for(running=1, waiting=0)
    waiting = harness.launch("b.o")
    harness.wait_for(running=1, waiting=1)
    monkeypatch.setattr(scheduler_module, "sample_memory", lambda *_: 1 / 0)
    assert waiting.wait(TIMEOUT) == 1
    assert "b.o is not built" in waiting.stdout.read()


# --- the launcher ---


def launched(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "VOLTFORGE_GATE": str(folder), "VOLTFORGE_PACKAGE": "vllm"}
    command = [sys.executable, "-I", "-S", LAUNCHER, *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT)


def test_launcher_does_not_change_the_command(new_harness):
    harness = new_harness()
    harness.scheduler.start()
    words = "sh", "-c", 'echo "$0" "$@"; grep SigIgn /proc/self/status; exit 7', "a  b", "*", "-o", "a.o"
    bare, done = (
        subprocess.run(words, capture_output=True, text=True),
        launched(*words, folder=harness.scheduler.folder),
    )
    assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout)
    assert done.stdout.startswith("a  b * -o a.o\nSigIgn:")


def test_launcher_puts_ccache_before_compilers_but_not_before_linkers(new_harness, monkeypatch):
    harness = new_harness()
    harness.scheduler.start()
    monkeypatch.setenv("VOLTFORGE_CCACHE", "echo")
    assert launched("true", "-c", "a.c", "-o", "a.o", folder=harness.scheduler.folder).stdout == "true -c a.c -o a.o\n"
    assert launched("true", "a.o", "-o", "a.so", folder=harness.scheduler.folder).stdout == ""


def test_missing_compiler_is_reported_with_status_127(new_harness):
    harness = new_harness()
    harness.scheduler.start()
    done = launched("/nowhere/nvcc", "-o", "a.o", folder=harness.scheduler.folder)
    assert (done.returncode, done.stdout) == (127, "error: /nowhere/nvcc cannot be run: No such file or directory\n")


def test_launcher_fails_without_a_scheduler(tmp_path):
    done = launched("true", "-o", "a.o", folder=tmp_path / "gone")
    assert done.returncode == 1
    assert done.stdout.startswith("error: a.o is not built: no answer from the scheduler (")
    assert not done.stderr


def test_launcher_connects_again_when_the_scheduler_closes_the_connection(new_harness, monkeypatch):
    """The process with the scheduler can end before another process of the same run."""
    harness = new_harness()
    harness.scheduler.folder.mkdir()
    with (
        scheduler_module.socket_address(harness.scheduler.folder, "socket") as address,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(address)
        listener.listen()
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", LAUNCHER, "true", "-o", "a.o"],
            env={**os.environ, "VOLTFORGE_GATE": str(harness.scheduler.folder), "VOLTFORGE_PACKAGE": "vllm"},
        )
        connection, _ = listener.accept()
        connection.close()
    harness.scheduler.start()
    assert child.wait(TIMEOUT) == 0


# --- under a real limit ---

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from voltforge.compile.scheduler import Scheduler
from voltforge.compile.costs import Estimate, Estimates
folder, scheduled = Path(sys.argv[1]), sys.argv[2] == "scheduled"
scheduler = Scheduler(folder / "gate", 8, {"heavy": Estimates(folder / "history.json", 300 << 20)})
scheduler.start()
launcher = f"{sys.executable} -I -S {folder / 'gate/launcher.py'}" if scheduled else ""
rule = f"rule c\\n  command = {launcher} {sys.executable} -I -S -c '{sys.argv[3]}' -o $out\\n"
names = [f"{number}.o" for number in range(8)]
(folder / "build.ninja").write_text(rule + "".join(f"build {name}: c\\n" for name in names))
environ = {"VOLTFORGE_GATE": str(folder / "gate"), "VOLTFORGE_PACKAGE": "heavy", "PATH": "/usr/bin:/bin"}
status = subprocess.call(["ninja", "-C", folder, "-j", "8", "-k", "0"], env=environ)
while scheduler.status.running:
    time.sleep(0.05)
scheduler.save()
sys.exit(status)
"""
COMPILER = f"import sys, time; held = bytearray({250 << 20}); time.sleep(1.5); open(sys.argv[2], chr(119))"
"""It holds 250 MiB for more than a second."""


def built(folder: Path, group: Limited, mode: str) -> tuple[int, int]:
    """Build eight objects with eight jobs in a control group. Return the status and the peak memory in bytes."""
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    folder.mkdir()
    words = [sys.executable, "-c", SCRIPT, folder, mode, COMPILER]
    child = subprocess.Popen(words, env=environ, preexec_fn=group.enter, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, group.held)
        time.sleep(0.02)
    return child.returncode, peak


@pytest.mark.slow
def test_build_fits_a_memory_limit_only_with_the_scheduler(tmp_path):
    limit = 1 << 30
    with contextlib.ExitStack() as held:
        try:
            group = held.enter_context(limited(limit))
        except OSError as error:  # only an administrator can make one, and not in every container
            pytest.skip(f"no control group can be made here: {error}")
        status, peak = built(tmp_path / "gate", group, "scheduled")
        assert (status, group.killed) == (0, 0)
        assert 500 << 20 < peak < limit
        assert len(Estimates(tmp_path / "gate" / "history.json", 1).measured()) == 8
        status, _ = built(tmp_path / "stock", group, "unscheduled")
        assert status
        assert group.killed
