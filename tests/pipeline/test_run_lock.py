"""One run at a time per checkout: a second run waits and names the first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voltforge.pipeline.run_lock import RunLock

TAKE = """
import sys, time
from pathlib import Path
from voltforge.pipeline.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), sys.argv[2])
print("waited" if lock.take() else "taken", flush=True)
time.sleep(float(sys.argv[3]))
"""


def run(file: Path, command: str, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", TAKE, str(file), command, str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "build" / ".run-lock"


def test_a_second_run_waits_and_names_the_first(file: Path) -> None:
    with run(file, "doit wheels", 1) as first:
        assert first.stdout.readline() == "taken\n"
        with run(file, "doit image", 0) as second:
            message, result = second.stdout.readline(), second.stdout.readline()
        assert f"waiting for doit wheels (process {first.pid}, since " in message
        assert message.endswith("), which is running in this checkout\n")
        assert result == "waited\n"


def test_a_killed_run_releases_the_lock(file: Path) -> None:
    with run(file, "doit wheels", 60) as first:
        assert first.stdout.readline() == "taken\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    started = time.monotonic()
    with run(file, "doit image", 0) as second:
        assert second.stdout.read() == "taken\n"
    assert time.monotonic() - started < 30


def test_a_run_that_holds_the_lock_does_not_wait_for_itself(file: Path) -> None:
    lock = RunLock(file, "doit wheels")
    assert not lock.take()
    assert not lock.take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0"])
def test_unreadable_content_of_the_lock_file_is_ignored(file: Path, content: str) -> None:
    with run(file, "doit wheels", 1) as first:
        assert first.stdout.readline() == "taken\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, content.encode())
        os.close(descriptor)
        with run(file, "doit image", 0) as second:
            assert "waiting for another run, which" in second.stdout.readline()
