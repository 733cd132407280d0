"""Hosts share compile work through a real redis-server, with real schedulers and real commands."""

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
from tests.compile.test_scheduler import SchedulerHarness, end_command, until
from tests.support.checkouts import ROOT, small_checkout
from voltforge.commands import farm as farm_command
from voltforge.compile import farm, scheduler
from voltforge.compile.costs import Estimate
from voltforge.compile.farm import Farm
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline

MIB = 1 << 20
KEY = ("build", "one.o")
MADE_WITH = {"its CUDA toolkit or g++": "12.4", "its locked environment": "a"}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a redis server with a password."""
    with redis(tmp_path, "--requirepass", "secret") as port:
        yield f"redis://:secret@127.0.0.1:{port}"


@pytest.fixture
def hosts(address: str) -> tuple[Farm, Farm]:
    return Farm(address, "alpha"), Farm(address, "beta")


# --- claims ---


def test_second_host_cannot_claim_a_claimed_object(hosts):
    alpha, beta = hosts
    assert alpha.claim(KEY) == ""
    assert beta.claim(KEY) == "alpha"
    assert beta.holders([KEY, ("build", "other.o"), ("another build", "one.o")]) == ["alpha", "", ""]


def test_object_that_is_done_needs_no_claim(hosts):
    alpha, beta = hosts
    alpha.claim(KEY)
    alpha.mark_done(KEY, 20.0)
    assert beta.holders([KEY]) == [""]
    assert [beta.claim(KEY), beta.claim(KEY)] == ["", ""]


def test_claim_of_a_dead_host_expires(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "CLAIM_SECONDS", 0.5)
    alpha.claim(KEY)
    assert beta.claim(KEY) == "alpha"
    until(lambda: beta.claim(KEY) == "")


def test_renewed_claim_does_not_expire(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "CLAIM_SECONDS", 1.0)
    monkeypatch.setattr(farm, "RENEW_SECONDS", 0.1)
    alpha.claim(KEY)
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        alpha.renew_claims([KEY])
        assert beta.claim(KEY) == "alpha"
        time.sleep(0.05)


def test_compiles_are_counted_by_host_without_cache_hits(hosts):
    alpha, beta = hosts
    alpha.mark_done(KEY, 20.0)
    alpha.mark_done(("build", "two.o"), 3.0)
    beta.mark_done(("build", "three.o"), 1.5)
    beta.mark_done(("build", "hit.o"), 0.1)
    assert dict(alpha.compiled_by_host("build")) == {"alpha": 2, "beta": 1}


# --- failing servers ---


def test_unreachable_server_is_ignored_with_one_warning(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = Farm(f"redis://:secret@127.0.0.1:{probe.getsockname()[1]}")
        for number in range(5):
            assert alone.claim(("build", f"{number}.o")) == ""
            assert alone.holders([KEY]) == [""]
            alone.mark_done(KEY, 1.0)
    output = capsys.readouterr().out
    assert output.count("this host compiles all objects itself") == 1
    assert "secret" not in output


def test_full_server_is_ignored(tmp_path, capsys):
    with redis(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as port:
        full = Farm(f"redis://127.0.0.1:{port}")
        assert [full.claim(("build", f"{number}.o")) for number in range(4)] == [""] * 4
    assert "this host compiles all objects itself" in capsys.readouterr().out


def test_wrong_password_is_an_error(address):
    with pytest.raises(VoltforgeError, match="does not answer"):
        Farm(address.replace("secret", "wrong")).check_connection()


def test_invalid_host_entry_is_ignored(hosts):
    alpha, _ = hosts
    for number, row in enumerate(
        ["", "[]", "{", '{"name": 1}', '{"name":"x","package":"y","build":"z","made_with":3}']
    ):
        alpha._redis.set(f"voltforge:host:{number}", row)
        alpha._redis.sadd(farm.HOSTS, f"voltforge:host:{number}")
    assert alpha.hosts() == []


def test_entry_of_a_dead_host_is_removed(hosts, monkeypatch):
    alpha, beta = hosts
    monkeypatch.setattr(farm, "CLAIM_SECONDS", 0.3)
    with alpha.register("vllm", MADE_WITH):
        until(lambda: bool(beta.hosts()))
        until(lambda: not beta.hosts())  # the entry expires, because it is renewed only every RENEW_SECONDS
        assert alpha._redis.smembers(farm.HOSTS) == set()


# --- hosts ---


def test_host_is_listed_while_it_builds(hosts):
    alpha, beta = hosts
    with alpha.register("vllm", MADE_WITH):
        until(lambda: bool(beta.hosts()))
        (seen,) = beta.hosts()
        assert (seen.name, seen.package, seen.build) == ("alpha", "vllm", farm.build_id("vllm", MADE_WITH))
    assert beta.hosts() == []


def test_host_with_another_compiler_causes_a_warning(hosts, capsys):
    alpha, beta = hosts
    with alpha.register("vllm", MADE_WITH):
        until(lambda: bool(beta.hosts()))
        output: list[str] = []

        def warned() -> bool:
            output.append(capsys.readouterr().out)
            return "alpha cannot share objects of vllm: it differs in its CUDA toolkit or g++" in "".join(output)

        with beta.register("vllm", {**MADE_WITH, "its CUDA toolkit or g++": "12.8"}):
            until(warned)


# --- schedulers ---


@pytest.fixture
def schedulers(tmp_path: Path, hosts: tuple[Farm, Farm]) -> Iterator[tuple[SchedulerHarness, SchedulerHarness]]:
    """The schedulers of two hosts, with one slot each."""
    stated = {"long": Estimate(80, MIB), "short": Estimate(1, MIB)}
    harnesses = []
    for host in hosts:
        (tmp_path / host.name).mkdir()
        harnesses.append(SchedulerHarness(tmp_path / host.name, 1, build="build", **stated))
        harnesses[-1].scheduler.start(host)
    yield harnesses[0], harnesses[1]
    for child in [child for harness in harnesses for child in harness.children]:
        child.kill()
        child.communicate()


def test_one_host_compiles_the_longest_object_and_the_other_the_next(schedulers):
    alpha, beta = schedulers
    first = alpha.launch("long.o", compiles=True)
    alpha.wait_for(running=1, waiting=0)
    late = beta.launch("long.o", compiles=True)
    beta.launch("short.o", compiles=True)
    until(lambda: beta.running() == ["short"])
    until(lambda: beta.scheduler.status.remote == 1)
    assert late.poll() is None
    assert end_command(first) == 0
    until(lambda: beta.scheduler.status.remote == 0)


@pytest.mark.parametrize(
    ("name", "compiles"), [("_C.abi3.so", False), ("CMakeFiles/cmTC_01234.dir/testCCompiler.c.o", True)]
)
def test_links_and_test_programs_of_cmake_run_on_every_host(schedulers, name, compiles):
    alpha, beta = schedulers
    alpha.launch(name, compiles=compiles)
    beta.launch(name, compiles=compiles)
    alpha.wait_for(running=1, waiting=0)
    beta.wait_for(running=1, waiting=0)


def test_queue_with_other_hosts_is_limited_by_memory(schedulers, tmp_path):
    alpha, _ = schedulers
    alone = SchedulerHarness(tmp_path / "alone", 1).scheduler
    assert alone.ninja_jobs == 1 + scheduler.QUEUE_LENGTH
    for free, queue in (
        (10**12, scheduler.MAX_QUEUE_LENGTH),
        (8 * 500 * scheduler.QUEUED_JOB_BYTES, 500),
        (8 * scheduler.QUEUED_JOB_BYTES, scheduler.QUEUE_LENGTH),
    ):
        alpha.free = free
        assert alpha.scheduler.ninja_jobs == 1 + queue


# --- builds ---


def checkouts(root: Path, address: str) -> list[Pipeline]:
    return [small_checkout(root / name, Settings(ccache=address, jobs="1")) for name in ("first", "second")]


BUILD = """
import sys; from pathlib import Path
from voltforge.pipeline.checkout import Settings; from voltforge.pipeline.pipeline import Pipeline
from tests.compile.test_object_cache import built
built(Pipeline.load(Path(sys.argv[1]), Settings(ccache=sys.argv[2], jobs="1")))
"""


def start_build(pipeline: Pipeline) -> subprocess.Popen:
    """Start a build of the small package in its own process group."""
    words = [sys.executable, "-c", BUILD, str(pipeline.root), pipeline.settings.ccache]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


@needs_ccache
@pytest.mark.slow
def test_two_hosts_compile_each_object_once(tmp_path, toolchain, address):
    pipelines = checkouts(tmp_path, address)
    assert [build.wait(600) for build in [start_build(pipeline) for pipeline in pipelines]] == [0, 0]
    first, second = (pipeline.package(pipeline.recipes["saxpy"]).stages["build"].result() for pipeline in pipelines)
    assert first.sha256 == second.sha256
    assert first.objects.misses + second.objects.misses == SOURCES
    assert first.objects.hits + second.objects.hits == SOURCES
    assert sum(first.hosts.values()) >= SOURCES - 1  # the object of C code may take less than a second


@needs_ccache
@pytest.mark.slow
def test_killed_host_does_not_change_the_wheel_of_another(tmp_path, toolchain, address):
    first, second = checkouts(tmp_path, address)
    killed, watch = start_build(first), Farm(address)
    try:
        until(lambda: any(".cu.o" in key for key in watch._redis.scan_iter("voltforge:*")))
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    alone = small_checkout(tmp_path / "alone", Settings(ccache="off"))
    assert built(second)["sha256"] == built(alone)["sha256"]


# --- commands ---


@pytest.mark.parametrize("setting", ["", "off", "http://127.0.0.1/objects"])
def test_farm_without_a_redis_server_is_an_error(saxpy, setting):
    with pytest.raises(VoltforgeError, match="ccache= names no Redis server"):
        farm_command.show_hosts(Pipeline.load(saxpy.root, Settings(ccache=setting)))


def test_farm_lists_the_hosts(saxpy, address, hosts, capsys):
    alpha, beta = hosts
    pipeline = Pipeline.load(saxpy.root, Settings(ccache=address))
    farm_command.show_hosts(pipeline)
    assert "no host builds at redis://***@127.0.0.1" in capsys.readouterr().out
    with alpha.register("vllm", MADE_WITH):
        alpha.mark_done((farm.build_id("vllm", MADE_WITH), "one.o"), 9.0)
        until(lambda: bool(beta.hosts()))
        farm_command.show_hosts(pipeline)
    assert re.search(r"alpha\W+vllm\W+1\W", capsys.readouterr().out)


def test_help_builds_the_package_of_another_host_once(saxpy, address, hosts, monkeypatch):
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

    with alpha.register("saxpy", MADE_WITH), alpha.register("unknown", MADE_WITH):
        until(lambda: len(alpha.hosts()) == 2)
        monkeypatch.setattr(subprocess, "call", call)
        monkeypatch.setattr(time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            farm_command.help_hosts(Pipeline.load(saxpy.root, Settings(ccache=address)))
        monkeypatch.undo()
    assert [words[3:] for words in called] == [[f"ccache={address}", "build:saxpy"]]
