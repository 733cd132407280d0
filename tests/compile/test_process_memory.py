"""The memory of real process trees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from voltforge.compile.process_memory import sample_memory

MIB = 1 << 20
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = bytearray({100 * MIB}); print(flush=True); input()"])
child.wait()
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[str]]:
    """A process whose child holds 100 MiB."""
    child = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    yield child
    child.communicate("\n")


def test_tree_includes_its_children(tree):
    sample = sample_memory([tree.pid], os.getpid())
    assert 100 * MIB < sample.trees[tree.pid] < 200 * MIB
    assert 100 * MIB < sample.peaks[tree.pid] < 200 * MIB
    assert sample.run > sample.trees[tree.pid]
    assert {tree.pid, os.getpid()} <= set(sample.pids)


def test_process_below_two_roots_belongs_to_the_nearer_root(tree):
    sample = sample_memory([os.getpid(), tree.pid], os.getpid())
    assert sample.trees[tree.pid] > 100 * MIB
    assert sample.run == sum(sample.trees.values())


def test_ended_process_has_no_memory():
    ended = subprocess.Popen(["true"])
    ended.wait()
    sample = sample_memory([ended.pid], os.getpid())
    assert (sample.trees, sample.peaks) == ({ended.pid: 0}, {ended.pid: 0})
    assert ended.pid not in sample.pids
