"""Running real programs: what they print, what they use, how they fail, and that nothing of them stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from voltforge.system import process
from voltforge.system.process import ProgramFailed, run

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
"""A program that does not hear SIGTERM."""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that have ``mark`` among their words."""
    found = []
    for living in psutil.process_iter(["cmdline", "status"]):
        if mark in (living.info["cmdline"] or []) and living.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(living)
    return found


@pytest.fixture
def mark(request, tmp_path):
    """A word by which a test finds its processes again; whatever has it in the end is killed."""
    word = str(tmp_path / "mark")
    yield word
    for living in marked(word):
        with contextlib.suppress(psutil.Error):
            living.kill()


# --- what it prints ---


def test_both_streams_are_returned_in_order():
    assert run(["sh", "-c", "echo one; echo two >&2; printf three"]).output == "one\ntwo\nthree"


def test_watcher_gets_each_line_at_once(tmp_path):
    told, flag = [], tmp_path / "flag"

    def watch(line, usage):
        told.append(line)
        if line == "ready":
            flag.touch()

    run(
        ["sh", "-c", 'echo ready; until [ -e "$0" ]; do sleep 0.05; done; echo seen', str(flag)],
        watch=watch,
        timeout=60,
    )
    assert [line for line in told if line] == ["ready", "seen"]


def test_a_watcher_is_called_while_a_program_is_silent():
    ticks = []
    run(["sleep", "1.2"], watch=lambda line, usage: ticks.append((line, usage.wall)))
    assert [line for line, _ in ticks] == [""] * len(ticks)
    assert len(ticks) >= 2


def test_the_log_holds_the_command_and_every_line_as_it_was(tmp_path):
    log = tmp_path / "new" / "folder" / "log"
    run(["printf", r"a\r\nb\377\n\nc"], log=log)
    assert log.read_bytes() == rb"$ printf 'a\r\nb\377\n\nc'" + b"\na\r\nb\xff\n\nc"


def test_a_second_program_appends_to_the_same_log(tmp_path):
    for word in ("one", "two"):
        run(["echo", word], log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "$ echo one\none\n$ echo two\ntwo\n"


def test_with_a_log_only_the_last_lines_are_kept_in_memory(tmp_path):
    log, many = tmp_path / "log", process.TAIL + 500
    done = run(["seq", str(many)], log=log)
    assert done.output.splitlines() == [str(number) for number in range(501, many + 1)]
    assert log.read_text().splitlines()[1:] == [str(number) for number in range(1, many + 1)]


def test_large_output_is_returned_whole():
    lines = run(["seq", "300000"]).output.splitlines()
    assert (len(lines), lines[0], lines[-1]) == (300000, "1", "300000")


def test_a_line_of_many_megabytes_is_one_line():
    told = []
    code = "import sys; sys.stdout.write('x' * 30_000_000)"
    done = run(python(code), watch=lambda line, _: told.append(len(line)) if line else None, timeout=60)
    assert (len(done.output), told) == (30_000_000, [30_000_000])


def test_output_that_is_not_utf_8_is_replaced():
    assert run(["printf", r"caf\351\n"]).output == "caf\ufffd"


def test_program_has_no_standard_input():
    assert run(["cat"]).output == ""


def test_the_program_gets_the_given_folder_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAK", "1")
    seen = run(["sh", "-c", "pwd; env"], cwd=tmp_path, env={"PATH": os.environ["PATH"], "ONLY": "this"}).output
    assert seen.splitlines()[0] == str(tmp_path)
    assert "ONLY=this" in seen
    assert "LEAK" not in seen


# --- how it fails ---


def test_a_failure_holds_the_status_the_command_and_the_last_lines(tmp_path):
    with pytest.raises(ProgramFailed) as caught:
        run(["sh", "-c", "echo because; exit 7"], log=tmp_path / "log")
    failed = caught.value
    assert (failed.status, failed.output, failed.log) == (7, "because", tmp_path / "log")
    assert failed.argv == ("sh", "-c", "echo because; exit 7")
    assert failed.what == f"sh failed with status 7; its log is {tmp_path / 'log'}"


def test_an_allowed_status_is_not_a_failure():
    assert run(["sh", "-c", "echo no; exit 1"], ok=(0, 1)).output == "no"


@pytest.mark.parametrize(("number", "name"), [("KILL", "SIGKILL"), ("SEGV", "SIGSEGV"), ("40", "signal 40")])
def test_error_names_the_signal_that_ended_the_program(number, name):
    with pytest.raises(ProgramFailed, match=f"was ended by {name}") as caught:
        run(["bash", "-c", f"kill -{number} $$"])
    assert caught.value.status < 0


@pytest.mark.parametrize(
    ("words", "folder", "why"),
    [
        (["no-such-program"], None, "could not be started: No such file or directory"),
        (["true"], Path("/no/such/folder"), "could not be started in /no/such/folder: No such file or directory"),
        (["/etc/passwd"], None, "could not be started: Permission denied"),
        (["echo", "a\0b"], None, "could not be started: embedded null byte"),
    ],
)
def test_program_that_cannot_start_is_an_error_with_the_reason(words, folder, why):
    with pytest.raises(ProgramFailed) as caught:
        run(words, cwd=folder)
    assert caught.value.status is None
    assert caught.value.what == f"{Path(words[0]).name} {why}"


def test_a_program_is_ended_with_its_children_after_the_timeout(mark):
    with pytest.raises(ProgramFailed, match=r"was ended after 0\.6 s") as caught:
        run(["sh", "-c", 'echo begun; sh -c "sleep 600; :" "$0" & sleep 600', mark], timeout=0.6)
    assert (caught.value.status, caught.value.output) == (None, "begun")
    assert marked(mark) == []


def test_a_program_that_closes_its_output_is_ended_after_the_timeout():
    with pytest.raises(ProgramFailed, match="was ended after"):
        run(["sh", "-c", "exec >&- 2>&-; sleep 600"], timeout=0.6)


# --- what stays behind ---


def test_background_child_is_ended_without_delay(mark):
    start = time.monotonic()
    assert run(["sh", "-c", 'sh -c "sleep 600; :" "$0" & echo done', mark]).output == "done"
    assert marked(mark) == []
    assert time.monotonic() - start < 60


def test_daemon_with_open_output_does_not_block(mark):
    start = time.monotonic()
    assert run(["sh", "-c", 'setsid sh -c "sleep 600; :" "$0" & echo done', mark]).output == "done"
    assert time.monotonic() - start < 60


def test_an_error_of_the_watcher_ends_the_program(mark):
    def watch(line, usage):
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="begun"):
        run(["sh", "-c", "echo begun; sleep 600; :", mark], watch=watch)
    assert marked(mark) == []


SCRIPT = """
import sys
from pathlib import Path
from voltforge.system.process import run
try:
    run(sys.argv[2:], log=Path(sys.argv[1]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def begun(log: Path, *words: str) -> subprocess.Popen[str]:
    """A process of its own that is in the middle of run()."""
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(log), *words], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "deaf\n" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.02)
    return child


def test_ctrl_c_ends_every_child_within_two_seconds_even_those_that_ignore_sigterm(tmp_path, mark):
    grandchild = f'"$0" -c "{DEAF}" "$1" & "$0" -c "{DEAF}" "$1"'
    child = begun(tmp_path / "log", "sh", "-c", grandchild, sys.executable, mark)
    assert len(marked(mark)) >= 3
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[0] == "interrupted\n"
    assert time.monotonic() - start < 20
    assert marked(mark) == []


def test_second_ctrl_c_ends_every_child(tmp_path, mark):
    child = begun(tmp_path / "log", *python(DEAF), mark)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert marked(mark) == []


def test_a_child_can_clean_up_before_it_is_killed(tmp_path):
    tidy = tmp_path / "tidy"
    with pytest.raises(ProgramFailed):
        run(["sh", "-c", "trap \"touch '$0'; exit\" TERM; sleep 600 & wait", str(tidy)], timeout=1)
    assert tidy.exists()


# --- what it uses ---


def test_usage_is_measured_over_all_processes():
    spin = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
    hog = f"x = bytearray(80_000_000); {spin}"
    both = f'"$0" -c "{hog}time.sleep(1)" & "$0" -c "{hog}time.sleep(1)"; wait'
    usage = run(["sh", "-c", both, sys.executable]).usage
    assert usage.cpu >= 0.8
    assert usage.wall >= 1.4
    assert 80_000_000 < usage.peak_one < 150_000_000
    assert 160_000_000 < usage.peak < 300_000_000


def test_the_memory_of_this_process_is_not_counted_as_the_programs():
    ballast = bytearray(200_000_000)
    usage = run(["sleep", "0.8"]).usage
    assert len(ballast) > usage.peak > 0


def test_a_short_peak_between_two_samples_is_counted():
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # what a child is charged with from fork(2) on
    size = max(ours, 10**8) + 200_000_000
    usage = run(python(f"x = bytearray({size})")).usage
    assert usage.peak >= size


def test_last_sample_is_the_current_memory():
    held = []
    code = "x = bytearray(120_000_000); import time; time.sleep(1.2); del x; time.sleep(1.2)"
    run(python(code), watch=lambda _, usage: held.append(usage.now))
    assert max(held) > 120_000_000 > held[-1]


def test_the_command_in_the_log_can_be_pasted(tmp_path):
    words = ["printf", "%s\n", "a b", "it's", "$HOME"]
    output = run(words, log=tmp_path / "log").output
    command = re.match(r"\$ (.*?)\n(?=a b)", (tmp_path / "log").read_text(), re.DOTALL)
    assert command
    assert (
        subprocess.run(["sh", "-c", command[1]], capture_output=True, text=True, check=True).stdout.rstrip() == output
    )
