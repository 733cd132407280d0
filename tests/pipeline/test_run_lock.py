"""One run at a time in a checkout: a second one waits, and says for whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voltforge.pipeline.run_lock import Turn

TAKE = """
import sys, time
from pathlib import Path
from voltforge.pipeline.run_lock import Turn
turn = Turn(Path(sys.argv[1]), sys.argv[2])
print("waited" if turn.take() else "taken", flush=True)
time.sleep(float(sys.argv[3]))
"""


def run(file: Path, command: str, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", TAKE, str(file), command, str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "build" / ".turn"


def test_the_second_waits_for_the_first_and_says_so(file: Path) -> None:
    with run(file, "doit wheels", 1) as first:
        assert first.stdout.readline() == "taken\n"
        with run(file, "doit image", 0) as second:
            told, then = second.stdout.readline(), second.stdout.readline()
        assert f"waits for doit wheels (process {first.pid}, since " in told
        assert told.endswith("), which is at work in this checkout\n")
        assert then == "waited\n"


def test_a_killed_run_holds_nobody_up(file: Path) -> None:
    with run(file, "doit wheels", 60) as first:
        assert first.stdout.readline() == "taken\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    started = time.monotonic()
    with run(file, "doit image", 0) as second:
        assert second.stdout.read() == "taken\n"
    assert time.monotonic() - started < 30


def test_a_run_takes_its_turn_once(file: Path) -> None:
    turn = Turn(file, "doit wheels")
    assert not turn.take()
    assert not turn.take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0"])
def test_a_note_that_makes_no_sense_is_no_trouble(file: Path, content: str) -> None:
    with run(file, "doit wheels", 1) as first:
        assert first.stdout.readline() == "taken\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, content.encode())
        os.close(descriptor)
        with run(file, "doit image", 0) as second:
            assert "waits for another run, which" in second.stdout.readline()
