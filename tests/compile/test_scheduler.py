"""The gate: real commands ask it for leave, by the launcher that CMake puts before compilers."""

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
from voltforge.compile import scheduler
from voltforge.compile.costs import Need, Needs
from voltforge.compile.jobs import Memory
from voltforge.compile.scheduler import LAUNCHER, Gate, Job, following
from voltforge.errors import VoltforgeError

MIB = 1 << 20
PATIENT = 60
"""Seconds to wait for what comes at once on a machine that is not busy."""


class World:
    """A gate and the commands that ask at it."""

    def __init__(self, folder: Path, jobs: int = 2, free: int = 10**12, build: str = "", **stated: Need) -> None:
        self.free, self.build = free, build
        needs = Needs(folder / "history" / "vllm.json", 100 * MIB, {f"{name}.o": need for name, need in stated.items()})
        self.gate = Gate(folder / "gate", jobs, {"vllm": needs}, lambda: Memory(self.free, 0))
        self.needs = needs
        self.begun: list[subprocess.Popen[str]] = []

    def ask(self, name: str, code: str = "input()", *, compiles: bool = False) -> subprocess.Popen:
        """A command for an object, which by default runs until it is told to end; one that compiles is given ``-c``."""
        self.gate.open()
        python = [sys.executable, "-I", "-S"]
        runs = [*python, "-c"] if compiles else [sys.executable, "-ISc"]
        command = [*python, self.gate.folder / LAUNCHER.name, *runs, code, "-o", name]
        told = {"GATE": str(self.gate.folder), "PACKAGE": "vllm", "BUILD": self.build}
        environ = {**os.environ, **{f"VOLTFORGE_{name}": value for name, value in told.items()}}
        child = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.begun.append(child)
        return child

    def comes_to(self, running: int, waiting: int) -> None:
        until(lambda: (self.gate.status.running, self.gate.status.waiting) == (running, waiting))

    def running(self) -> list[str]:
        """The objects that were let through."""
        return sorted(job.name.removesuffix(".o") for job in self.gate._running)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends(child: subprocess.Popen) -> int:
    """Tell a command to end."""
    child.communicate("\n", timeout=PATIENT)
    return child.returncode


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def new(jobs: int = 2, free: int = 10**12, **stated: Need) -> World:
        made.append(World(tmp_path, jobs, free, **stated))
        return made[-1]

    yield new
    for child in [child for world in made for child in world.begun]:
        child.kill()
        child.communicate()


# --- who is let through ---


def test_no_more_run_at_once_than_there_are_jobs(worlds):
    world = worlds(jobs=2)
    children = [world.ask(f"{number}.o") for number in range(4)]
    world.comes_to(running=2, waiting=2)
    first = world.running()
    assert ends(children[int(first[0])]) == 0
    world.comes_to(running=2, waiting=1)
    assert first[1] in world.running()


def test_the_longest_known_is_let_through_first(worlds):
    world = worlds(jobs=1, first=Need(5, MIB), short=Need(1, MIB), long=Need(80, MIB), middle=Need(30, MIB))
    children = {"first": world.ask("first.o")}
    world.comes_to(running=1, waiting=0)
    children |= {name: world.ask(f"{name}.o") for name in ("short", "long", "middle")}
    world.comes_to(running=1, waiting=3)
    for name, then in (("first", ["long"]), ("long", ["middle"]), ("middle", ["short"]), ("short", [])):
        ends(children[name])
        until(lambda then=then: world.running() == then)


def test_heavy_ones_do_not_run_together_and_light_ones_go_beside_them(worlds):
    world = worlds(8, 1000 * MIB, one=Need(9, 600 * MIB), other=Need(8, 600 * MIB), light=Need(1, 100 * MIB))
    one = world.ask("one.o")
    world.comes_to(running=1, waiting=0)
    world.ask("other.o")
    world.ask("light.o")
    world.comes_to(running=2, waiting=1)
    assert world.running() == ["light", "one"]
    ends(one)
    world.comes_to(running=2, waiting=0)
    assert world.running() == ["light", "other"]


def test_what_a_job_already_holds_is_not_counted_twice(worlds):
    world = worlds(8, 1000 * MIB, grown=Need(9, 600 * MIB), other=Need(8, 500 * MIB))
    world.ask("grown.o", f"held = bytearray({700 * MIB}); input()")
    until(lambda: world.gate.status.memory > 700 * MIB)
    world.ask("other.o")
    world.comes_to(running=2, waiting=0)


def test_a_job_waits_until_memory_is_free_again(worlds):
    world = worlds(8, 1000 * MIB)
    world.ask("a.o")
    world.comes_to(running=1, waiting=0)
    world.free = 50 * MIB
    world.ask("b.o")
    world.comes_to(running=1, waiting=1)
    world.free = 1000 * MIB
    world.comes_to(running=2, waiting=0)


def test_one_always_runs_however_little_memory_there_is_and_it_is_told_once(worlds, capsys):
    world = worlds(8, MIB, big=Need(9, 600 * MIB))
    assert ends(world.ask("big.o")) == 0
    assert ends(world.ask("big.o")) == 0
    assert capsys.readouterr().out == "  big.o is expected to take 629.1 MB, where 1.0 MB can be had: it runs alone\n"


def test_where_the_memory_is_not_known_the_jobs_alone_count(worlds):
    world = worlds(jobs=2, big=Need(9, 10**13))
    world.gate.memory = lambda: None
    for name in ("big.o", "a.o", "b.o"):
        world.ask(name)
    world.comes_to(running=2, waiting=1)


def test_a_persons_limit_counts_what_this_process_holds_as_well(worlds):
    world = worlds(8)
    world.gate.limit = 1000 * MIB
    world.ask("a.o", f"held = bytearray({600 * MIB}); input()")
    world.comes_to(running=1, waiting=0)
    until(lambda: world.gate._used > 600 * MIB)
    world.ask("b.o", "input()")
    world.gate.needs["vllm"].stated = {"c.o": Need(9, 500 * MIB)}
    world.ask("c.o")
    world.comes_to(running=2, waiting=1)
    assert world.running() == ["a", "b"]


SIZES = st.integers(0, 100)
JOBS = st.lists(st.builds(lambda seconds, memory: Job(None, 0, need=Need(seconds, memory)), SIZES, SIZES), max_size=6)


@given(JOBS, JOBS, st.integers(1, 8), st.none() | st.integers(-50, 150))
def test_who_is_next_fits_is_the_longest_that_does_and_there_is_one_where_nothing_runs(waiting, running, jobs, room):
    job = following(waiting, running, jobs, room)
    if job is None:
        assert not waiting or running
        full, fits = len(running) >= jobs, [one for one in waiting if room is None or one.need.memory <= room]
        assert not waiting or full or not fits
        return
    assert len(running) < jobs
    if room is None or job.need.memory <= room:
        assert all(one.need.seconds <= job.need.seconds for one in waiting if room is None or one.need.memory <= room)
    else:
        assert not running
        assert all(one.need.memory >= job.need.memory for one in waiting)


# --- what is learnt ---


def test_what_an_object_took_is_measured_with_its_children_and_known_the_next_time(worlds):
    world = worlds()
    held = f"import time; held = bytearray({200 * MIB}); time.sleep(1.2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    assert ends(world.ask("a.o", code)) == 0
    world.comes_to(running=0, waiting=0)
    need = world.needs.measured()["a.o"]
    assert 1.2 <= need.seconds < PATIENT
    assert 200 * MIB < need.memory < 400 * MIB
    world.gate.keep()
    assert Needs(world.needs.path, 1).of("a.o").memory == int(need.memory * 1.25)


def test_the_peak_between_two_looks_counts(worlds, monkeypatch):
    monkeypatch.setattr(scheduler, "TICK", 1.0)
    world = worlds()
    ends(world.ask("a.o", f"held = bytearray({300 * MIB}); del held; import time; time.sleep(3)"))
    world.comes_to(running=0, waiting=0)
    assert world.needs.measured()["a.o"].memory > 300 * MIB


def test_the_time_left_is_that_of_what_runs_and_waits_and_comes_shared_by_the_jobs(worlds, tmp_path):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "vllm.json").write_text('{"a.o": [1000, 9, 1], "b.o": [400, 9, 1], "c.o": [400, 9, 1]}')
    world = worlds(jobs=2)
    assert world.gate.left("vllm", beyond=4) == 4 * 600 / 2
    for name in ("a", "b", "c"):
        world.ask(f"{name}.o")
    world.comes_to(running=2, waiting=1)
    assert 1000 - PATIENT < world.gate.left("vllm") <= 1000  # the longest alone
    assert 2100 - PATIENT < world.gate.left("vllm", beyond=4) <= 2100


def test_where_nothing_was_built_before_no_time_is_left_to_tell(worlds):
    world = worlds()
    world.ask("a.o")
    world.comes_to(running=1, waiting=0)
    assert world.gate.left("vllm") is None


# --- what goes wrong ---


@pytest.mark.parametrize("through", [True, False], ids=["that was let through", "that waits"])
def test_a_job_that_is_killed_takes_no_place(worlds, through):
    world = worlds(jobs=1)
    first = world.ask("a.o")
    world.comes_to(running=1, waiting=0)
    second = world.ask("b.o")
    world.comes_to(running=1, waiting=1)
    (first if through else second).kill()
    world.comes_to(running=1, waiting=0)
    assert world.running() == (["b"] if through else ["a"])


@pytest.mark.parametrize(
    "said", [b"", b"\xff\xfe\n", b"nobody\tx.o\n", b"x" * 100_000], ids=["nothing", "bytes", "another package", "much"]
)
def test_who_talks_nonsense_stops_nobody(worlds, said):
    world = worlds(jobs=2)
    world.gate.open()
    with socket.socket(socket.AF_UNIX) as stranger:
        with scheduler.at(world.gate.folder, "socket") as address:
            stranger.connect(address)
        with contextlib.suppress(OSError):
            stranger.sendall(said)
        assert ends(world.ask("a.o")) == 0
    world.comes_to(running=0, waiting=0)


def test_a_folder_may_have_a_long_name(tmp_path):
    world = World(tmp_path / ("x" * 100) / ("y" * 100))
    assert ends(world.ask("a.o")) == 0


def test_a_socket_that_a_killed_run_left_is_replaced(worlds):
    world = worlds()
    world.gate.folder.mkdir()
    with scheduler.at(world.gate.folder, "socket") as address, socket.socket(socket.AF_UNIX) as old:
        old.bind(address)
    assert ends(world.ask("a.o")) == 0


def test_a_folder_that_holds_no_socket_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "PATIENCE", 0.5)
    (tmp_path / "gate" / "lock").mkdir(parents=True)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(VoltforgeError, match="nobody opens the gate at") as caught:
        World(tmp_path).gate.open()
    assert caught.value.hint


def test_two_processes_of_a_run_have_one_gate(worlds, tmp_path):
    world = worlds(jobs=1)
    world.ask("a.o")
    world.comes_to(running=1, waiting=0)
    if not (child := os.fork()):
        status = 1
        with contextlib.suppress(BaseException):
            other = World(tmp_path, jobs=8)
            other.ask("b.o", "print()").wait(1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = 0 if other.begun and other.begun[0].poll() is None else 1
        other.begun[0].kill()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_a_compiler_leaves_running_keeps_no_place(worlds):
    world = worlds(jobs=1)
    daemon = "import os, sys, time\nif not os.fork():\n    time.sleep(5)\n"
    assert world.ask("a.o", daemon).wait(PATIENT) == 0
    assert ends(world.ask("b.o")) == 0


def test_a_gate_that_breaks_lets_nobody_wait_for_ever(worlds, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    world = worlds(jobs=1)
    world.ask("a.o")
    world.comes_to(running=1, waiting=0)
    waiting = world.ask("b.o")
    world.comes_to(running=1, waiting=1)
    monkeypatch.setattr(scheduler, "_processes", lambda: 1 / 0)
    assert waiting.wait(PATIENT) == 1
    assert "nobody lets b.o be compiled" in waiting.stdout.read()


# --- the launcher ---


def launched(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "VOLTFORGE_GATE": str(folder), "VOLTFORGE_PACKAGE": "vllm"}
    command = [sys.executable, "-I", "-S", LAUNCHER, *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENT)


def test_the_command_runs_as_if_nothing_stood_before_it(worlds):
    world = worlds()
    world.gate.open()
    words = "sh", "-c", 'echo "$0" "$@"; grep SigIgn /proc/self/status; exit 7', "a  b", "*", "-o", "a.o"
    bare, done = subprocess.run(words, capture_output=True, text=True), launched(*words, folder=world.gate.folder)
    assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout)
    assert done.stdout.startswith("a  b * -o a.o\nSigIgn:")


def test_a_cache_stands_before_what_compiles_and_not_before_what_links(worlds, monkeypatch):
    world = worlds()
    world.gate.open()
    monkeypatch.setenv("VOLTFORGE_CCACHE", "echo")
    assert launched("true", "-c", "a.c", "-o", "a.o", folder=world.gate.folder).stdout == "true -c a.c -o a.o\n"
    assert launched("true", "a.o", "-o", "a.so", folder=world.gate.folder).stdout == ""


def test_a_command_that_is_not_there_is_a_sentence(worlds):
    world = worlds()
    world.gate.open()
    done = launched("/nowhere/nvcc", "-o", "a.o", folder=world.gate.folder)
    assert (done.returncode, done.stdout) == (127, "error: /nowhere/nvcc cannot be run: No such file or directory\n")


def test_without_a_gate_nothing_is_compiled_for_nobody_would_count_it(tmp_path):
    done = launched("true", "-o", "a.o", folder=tmp_path / "gone")
    assert done.returncode == 1
    assert done.stdout.startswith("error: nobody lets a.o be compiled, ")
    assert not done.stderr


def test_a_gate_that_closes_is_looked_for_again(worlds, monkeypatch):
    """As when the process that had it ends before another of the same run."""
    world = worlds()
    world.gate.folder.mkdir()
    with scheduler.at(world.gate.folder, "socket") as address, socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", LAUNCHER, "true", "-o", "a.o"],
            env={**os.environ, "VOLTFORGE_GATE": str(world.gate.folder), "VOLTFORGE_PACKAGE": "vllm"},
        )
        connection, _ = door.accept()
        connection.close()
    world.gate.open()
    assert child.wait(PATIENT) == 0


# --- under a real limit ---

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from voltforge.compile.scheduler import Gate
from voltforge.compile.costs import Need, Needs
folder, asks = Path(sys.argv[1]), sys.argv[2] == "asks"
gate = Gate(folder / "gate", 8, {"heavy": Needs(folder / "history.json", 300 << 20)})
gate.open()
launcher = f"{sys.executable} -I -S {folder / 'gate/launcher.py'}" if asks else ""
rule = f"rule c\\n  command = {launcher} {sys.executable} -I -S -c '{sys.argv[3]}' -o $out\\n"
names = [f"{number}.o" for number in range(8)]
(folder / "build.ninja").write_text(rule + "".join(f"build {name}: c\\n" for name in names))
environ = {"VOLTFORGE_GATE": str(folder / "gate"), "VOLTFORGE_PACKAGE": "heavy", "PATH": "/usr/bin:/bin"}
status = subprocess.call(["ninja", "-C", folder, "-j", "8", "-k", "0"], env=environ)
while gate.status.running:
    time.sleep(0.05)
gate.keep()
sys.exit(status)
"""
COMPILER = f"import sys, time; held = bytearray({250 << 20}); time.sleep(1.5); open(sys.argv[2], chr(119))"
"""It holds 250 MiB for more than a second."""


def built(folder: Path, group: Limited, how: str) -> tuple[int, int]:
    """The status of a build of eight objects at eight jobs in a group, and the most that was held, in bytes."""
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    folder.mkdir()
    words = [sys.executable, "-c", SCRIPT, folder, how, COMPILER]
    child = subprocess.Popen(words, env=environ, preexec_fn=group.enter, stdout=subprocess.DEVNULL)
    most = 0
    while child.poll() is None:
        most = max(most, group.held)
        time.sleep(0.02)
    return child.returncode, most


@pytest.mark.slow
def test_under_a_limit_a_build_ends_well_that_is_killed_without_a_gate(tmp_path):
    limit = 1 << 30
    with contextlib.ExitStack() as held:
        try:
            group = held.enter_context(limited(limit))
        except OSError as error:  # only an administrator can make one, and not in every container
            pytest.skip(f"no control group can be made here: {error}")
        status, most = built(tmp_path / "gate", group, "asks")
        assert (status, group.killed) == (0, 0)
        assert 500 << 20 < most < limit
        assert len(Needs(tmp_path / "gate" / "history.json", 1).measured()) == 8
        status, _ = built(tmp_path / "stock", group, "does not ask")
        assert status
        assert group.killed
