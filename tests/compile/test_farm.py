"""A farm: a real redis-server, real gates and real commands, of which one compiles each object."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compile.test_object_cache import SOURCES, built, needs_ccache, redis
from tests.compile.test_scheduler import World, ends, until
from tests.support.checkouts import ROOT, small_checkout
from voltforge.commands import chores
from voltforge.compile import farm, scheduler
from voltforge.compile.costs import Need
from voltforge.compile.farm import Farm
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline

MIB = 1 << 20
ONE = ("build", "one.o")
WITH = {"its CUDA toolkit or g++": "12.4", "its locked environment": "a"}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where hosts meet, with a password."""
    with redis(tmp_path, "--requirepass", "secret") as port:
        yield f"redis://:secret@127.0.0.1:{port}"


@pytest.fixture
def hosts(address: str) -> tuple[Farm, Farm]:
    return Farm(address, "alpha"), Farm(address, "beta")


# --- claims ---


def test_what_one_host_has_claimed_another_leaves_to_it(hosts):
    alpha, beta = hosts
    assert alpha.claim(ONE) == ""
    assert beta.claim(ONE) == "alpha"
    assert beta.holders([ONE, ("build", "other.o"), ("another build", "one.o")]) == ["alpha", "", ""]


def test_what_is_done_is_free_for_all_at_once(hosts):
    alpha, beta = hosts
    alpha.claim(ONE)
    alpha.done(ONE, 20.0)
    assert beta.holders([ONE]) == [""]
    assert [beta.claim(ONE), beta.claim(ONE)] == ["", ""]


def test_what_a_host_that_died_had_claimed_another_gets(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "LEASE", 0.5)
    alpha.claim(ONE)
    assert beta.claim(ONE) == "alpha"
    until(lambda: beta.claim(ONE) == "")


def test_a_host_that_lives_keeps_what_it_has_claimed(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "LEASE", 1.0)
    monkeypatch.setattr(farm, "RENEW", 0.1)
    alpha.claim(ONE)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        alpha.renew([ONE])
        assert beta.claim(ONE) == "alpha"
        time.sleep(0.05)


def test_who_compiled_how_much_is_counted_and_what_came_from_a_cache_is_not(hosts):
    alpha, beta = hosts
    alpha.done(ONE, 20.0)
    alpha.done(("build", "two.o"), 3.0)
    beta.done(("build", "three.o"), 1.5)
    beta.done(("build", "hit.o"), 0.1)
    assert dict(alpha.shares("build")) == {"alpha": 2, "beta": 1}


# --- servers that fail ---


def test_without_a_server_all_is_let_through_and_it_is_said_once(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = Farm(f"redis://:secret@127.0.0.1:{probe.getsockname()[1]}")
        for number in range(5):
            assert alone.claim(("build", f"{number}.o")) == ""
            assert alone.holders([ONE]) == [""]
            alone.done(ONE, 1.0)
    said = capsys.readouterr().out
    assert said.count("all is compiled here") == 1
    assert "secret" not in said


def test_a_server_that_is_full_stops_nobody(tmp_path, capsys):
    with redis(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as port:
        full = Farm(f"redis://127.0.0.1:{port}")
        assert [full.claim(("build", f"{number}.o")) for number in range(4)] == [""] * 4
    assert "all is compiled here" in capsys.readouterr().out


def test_a_wrong_password_is_a_sentence(address):
    with pytest.raises(VoltforgeError, match="does not answer"):
        Farm(address.replace("secret", "wrong")).reached()


def test_hosts_that_say_nonsense_are_passed_over(hosts):
    alpha, _ = hosts
    for number, row in enumerate(
        ["", "[]", "{", '{"name": 1}', '{"name":"x","package":"y","build":"z","made_with":3}']
    ):
        alpha._redis.set(f"voltforge:host:{number}", row)
        alpha._redis.sadd(farm.HOSTS, f"voltforge:host:{number}")
    assert alpha.hosts() == []


def test_a_host_that_died_is_forgotten(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "LEASE", 0.3)
    with alpha.taking_part("vllm", WITH):
        until(lambda: bool(beta.hosts()))
        until(lambda: not beta.hosts())  # it says no more for seconds, as one that died
        assert alpha._redis.smembers(farm.HOSTS) == set()


# --- who is there ---


def test_a_host_is_seen_while_it_builds(hosts):
    alpha, beta = hosts
    with alpha.taking_part("vllm", WITH):
        until(lambda: bool(beta.hosts()))
        (seen,) = beta.hosts()
        assert (seen.name, seen.package, seen.build) == ("alpha", "vllm", farm.named("vllm", WITH))
    assert beta.hosts() == []


def test_a_host_with_another_compiler_is_named_and_what_it_has_otherwise(hosts, capsys):
    alpha, beta = hosts
    with alpha.taking_part("vllm", WITH):
        until(lambda: bool(beta.hosts()))
        said: list[str] = []

        def told() -> bool:
            said.append(capsys.readouterr().out)
            return "alpha builds vllm too, but differs in its CUDA toolkit or g++: " in "".join(said)

        with beta.taking_part("vllm", {**WITH, "its CUDA toolkit or g++": "12.8"}):
            until(told)


# --- gates ---


@pytest.fixture
def gates(tmp_path: Path, hosts: tuple[Farm, Farm]) -> Iterator[tuple[World, World]]:
    """The gates of two hosts, one job each."""
    stated = {"long": Need(80, MIB), "short": Need(1, MIB)}
    made = []
    for host in hosts:
        (tmp_path / host.name).mkdir()
        made.append(World(tmp_path / host.name, 1, build="build", **stated))
        made[-1].gate.open(host)
    yield made[0], made[1]
    for child in [child for world in made for child in world.begun]:
        child.kill()
        child.communicate()


def test_the_longest_is_compiled_by_one_host_and_the_next_by_the_other(gates):
    alpha, beta = gates
    first = alpha.ask("long.o", compiles=True)
    alpha.comes_to(running=1, waiting=0)
    late = beta.ask("long.o", compiles=True)
    beta.ask("short.o", compiles=True)
    until(lambda: beta.running() == ["short"])
    until(lambda: beta.gate.status.elsewhere == 1)
    assert late.poll() is None
    assert ends(first) == 0
    until(lambda: beta.gate.status.elsewhere == 0)


@pytest.mark.parametrize(
    ("name", "compiles"), [("_C.abi3.so", False), ("CMakeFiles/cmTC_01234.dir/testCCompiler.c.o", True)]
)
def test_what_is_linked_and_what_cmake_tries_every_host_does_itself(gates, name, compiles):
    alpha, beta = gates
    alpha.ask(name, compiles=compiles)
    beta.ask(name, compiles=compiles)
    alpha.comes_to(running=1, waiting=0)
    beta.comes_to(running=1, waiting=0)


def test_with_other_hosts_more_stand_and_wait_as_memory_allows(gates, tmp_path):
    alpha, _ = gates
    alone = World(tmp_path / "alone", 1).gate
    assert alone.window == 1 + scheduler.WINDOW
    for free, waiting in (
        (10**12, scheduler.WIDEST),
        (8 * 500 * scheduler.WAITER, 500),
        (8 * scheduler.WAITER, scheduler.WINDOW),
    ):
        alpha.free = free
        assert alpha.gate.window == 1 + waiting


# --- builds ---


def checkouts(root: Path, address: str) -> list[Pipeline]:
    return [small_checkout(root / name, Settings(ccache=address, jobs="1")) for name in ("one", "other")]


BUILD = """
import sys; from pathlib import Path
from voltforge.pipeline.checkout import Settings; from voltforge.pipeline.pipeline import Pipeline
from tests.test_objects import built
built(Pipeline.load(Path(sys.argv[1]), Settings(ccache=sys.argv[2], jobs="1")))
"""


def building(pipeline: Pipeline) -> subprocess.Popen:
    """A process that builds the small package, and what it starts, as a group."""
    words = [sys.executable, "-c", BUILD, str(pipeline.root), pipeline.settings.ccache]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


@needs_ccache
@pytest.mark.slow
def test_two_hosts_that_build_at_the_same_time_compile_each_object_once(tmp_path, toolchain, address):
    made = checkouts(tmp_path, address)
    assert [host.wait(600) for host in [building(one) for one in made]] == [0, 0]
    first, second = (one.package(one.recipes["saxpy"]).stage("build").results() for one in made)
    assert first["sha256"] == second["sha256"]
    assert first["objects"]["misses"] + second["objects"]["misses"] == SOURCES
    assert first["objects"]["hits"] + second["objects"]["hits"] == SOURCES
    assert sum(first["hosts"].values()) >= SOURCES - 1  # the one in C may take less than a second


@needs_ccache
@pytest.mark.slow
def test_a_host_that_is_killed_while_it_compiles_delays_the_others_and_changes_nothing(tmp_path, toolchain, address):
    one, other = checkouts(tmp_path, address)
    killed, watch = building(one), Farm(address)
    try:
        until(lambda: any(".cu.o" in key for key in watch._redis.scan_iter("voltforge:*")))
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    alone = small_checkout(tmp_path / "alone", Settings(ccache="off"))
    assert built(other)["sha256"] == built(alone)["sha256"]


# --- what a person asks ---


@pytest.mark.parametrize("setting", ["", "off", "http://127.0.0.1/objects"])
def test_to_ask_for_a_farm_without_a_redis_server_is_a_sentence(saxpy, setting):
    with pytest.raises(VoltforgeError, match="ccache= names no redis server"):
        chores.farm(Pipeline.load(saxpy.root, Settings(ccache=setting)))


def test_the_hosts_of_a_farm_are_listed(saxpy, address, hosts, capsys):
    alpha, beta = hosts
    asked = Pipeline.load(saxpy.root, Settings(ccache=address))
    chores.farm(asked)
    assert "nobody builds anything at redis://***@127.0.0.1" in capsys.readouterr().out
    with alpha.taking_part("vllm", WITH):
        alpha.done((farm.named("vllm", WITH), "one.o"), 9.0)
        until(lambda: bool(beta.hosts()))
        chores.farm(asked)
    assert re.search(r"alpha\W+vllm\W+1\W", capsys.readouterr().out)


def test_who_helps_builds_what_another_host_builds_and_each_build_once(saxpy, address, hosts, monkeypatch):
    alpha, _ = hosts
    called: list[list[str]] = []

    def call(words: list[str], cwd: Path) -> int:
        called.append(words)
        return 0

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    with alpha.taking_part("saxpy", WITH), alpha.taking_part("stranger", WITH):
        until(lambda: len(alpha.hosts()) == 2)
        monkeypatch.setattr(subprocess, "call", call)
        monkeypatch.setattr(time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            chores.help_farm(Pipeline.load(saxpy.root, Settings(ccache=address)))
        monkeypatch.undo()
    assert [words[3:] for words in called] == [[f"ccache={address}", "build:saxpy"]]
