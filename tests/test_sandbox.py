"""What a sandboxed build sees, tried from the inside: its folders, a read-only system, no network, no home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.rights import NOBODY
from tests.servers import Server, serving
from voltforge import sandbox
from voltforge.errors import VoltforgeError
from voltforge.process import ProgramFailed, run
from voltforge.sandbox import Sandbox, available, choose

PYTHON = os.path.realpath(sys.executable)
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"

# Many containers forbid namespaces, and the README promises to build there too; CI installs bubblewrap and runs these.
needs_bubblewrap = pytest.mark.skipif(
    not available().hermetic, reason="bubblewrap cannot make a namespace on this machine"
)


def can_unshare() -> bool:
    words = Sandbox("no network").command(["true"], writable={}, readable={}, cwd=Path("/"))
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture
def rooms(tmp_path) -> dict[str, Path]:
    """A folder to read and one to write."""
    folders = {"tree": tmp_path / "work" / "tree", "environment": tmp_path / "some" / "environment"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    return folders


@pytest.fixture
def inside(rooms) -> Callable[..., str]:
    """Run words inside, with the two folders, and give what they print."""

    def run_inside(*words: str) -> str:
        argv = Sandbox("bubblewrap").command(
            words,
            writable={"tree": rooms["tree"]},
            readable={"environment": rooms["environment"]},
            cwd=Path("/build/tree"),
        )
        return run(argv, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}).output

    return run_inside


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        one.files["/"] = b"reached"
        yield one


# --- bubblewrap ---


@needs_bubblewrap
def test_the_folders_are_where_they_always_are(inside, rooms):
    assert inside("pwd") == "/build/tree"
    assert inside("cat", "/build/tree/file", "/build/environment/file") == "treeenvironment"
    box = Sandbox("bubblewrap")
    assert [str(box.place(name, real)) for name, real in rooms.items()] == ["/build/tree", "/build/environment"]


@needs_bubblewrap
def test_what_is_written_into_a_writable_folder_stays(inside, rooms):
    inside("sh", "-c", "echo object > /build/tree/new.o")
    assert (rooms["tree"] / "new.o").read_text() == "object\n"
    assert (rooms["tree"] / "new.o").stat().st_uid == os.getuid()


@needs_bubblewrap
@pytest.mark.parametrize(
    "place",
    ["/build/environment", "/build", "/", "/usr", "/usr/local", "/etc", "/var", "/home", "/root", "/build/dist"],
)
def test_nothing_can_be_written_elsewhere(inside, place):
    with pytest.raises(ProgramFailed) as caught:
        inside("sh", "-c", f"mkdir -p {place} && touch {place}/evil")
    assert "Read-only file system" in caught.value.output or "Permission denied" in caught.value.output


@needs_bubblewrap
def test_scratch_space_is_private_and_gone_afterwards(inside):
    with tempfile.NamedTemporaryFile(dir="/tmp") as outside:
        assert inside("sh", "-c", "ls -A /tmp; echo x > /tmp/mine; cat /tmp/mine") == "home\nx"
        assert Path(outside.name).exists()
    assert inside("ls", "-A", "/tmp") == "home"
    assert not Path("/tmp/mine").exists()


@needs_bubblewrap
def test_the_network_is_within_reach_outside_and_out_of_reach_inside(inside, server):
    assert run([PYTHON, "-c", ASK, server.url]).output == "reached"
    with pytest.raises(ProgramFailed) as caught:
        inside(PYTHON, "-c", ASK, server.url)
    assert "Connection refused" in caught.value.output or "unreachable" in caught.value.output
    assert len(server.asked) == 1


@needs_bubblewrap
def test_home_and_the_checkout_cannot_be_seen(inside, repository):
    home = Path.home()
    seen = inside(
        PYTHON,
        "-c",
        f"import os; print([os.path.exists(path) for path in {[str(repository), str(home / '.bashrc')]!r}])",
    )
    assert seen == "[False, False]"
    # Of the home folder only the way to the interpreter is there, where it lives below.
    names = inside("sh", "-c", f"ls -A {home} 2>/dev/null || true").split()
    assert names in (
        [],
        [Path(sys.base_prefix).resolve().relative_to(home).parts[0]]
        if Path(sys.base_prefix).is_relative_to(home)
        else [],
    )


@needs_bubblewrap
def test_no_other_process_can_be_seen_and_the_build_is_always_the_first(inside):
    assert inside("sh", "-c", "echo $$") == "1"
    assert (
        inside(PYTHON, "-c", "import os; print(sorted(name for name in os.listdir('/proc') if name.isdecimal()))")
        == "['1']"
    )


@needs_bubblewrap
def test_the_machine_has_no_name_of_its_own_inside(inside):
    assert inside("uname", "-n") == "build"


@needs_bubblewrap
def test_nothing_can_be_mounted_and_no_rights_are_left(inside):
    with pytest.raises(ProgramFailed):
        inside("mount", "-o", "remount,rw", "/usr")
    capabilities = re.findall(r"^Cap(?:Prm|Eff|Bnd):\s*(\w+)", inside("cat", "/proc/self/status"), re.MULTILINE)
    assert {int(value, 16) for value in capabilities} == {0}


@needs_bubblewrap
def test_the_interpreter_and_the_compiler_work_inside(inside):
    assert inside(PYTHON, "-c", "import ssl, sqlite3, sys; print(sys.version_info[:2])") == str(sys.version_info[:2])
    inside("sh", "-c", "echo 'int main(void) { return 0; }' > a.c && gcc a.c -o a && ./a")


@needs_bubblewrap
def test_a_program_of_two_builds_in_different_places_sees_no_difference(tmp_path):
    seen = set()
    for name in ("one", "two/deeper"):
        tree = tmp_path / name
        tree.mkdir(parents=True)
        argv = Sandbox("bubblewrap").command(["env"], writable={"tree": tree}, readable={}, cwd=Path("/build/tree"))
        seen.add(run(argv, cwd=tree, env={"PATH": "/usr/bin:/bin"}).output)
    assert len(seen) == 1


@needs_bubblewrap
def test_a_failure_inside_has_the_status_of_the_program(inside):
    with pytest.raises(ProgramFailed) as caught:
        inside("sh", "-c", "echo why; exit 7")
    assert (caught.value.status, caught.value.output) == (7, "why")


@needs_bubblewrap
def test_everything_inside_ends_with_the_program_that_started_it(tmp_path):
    """Even when that is killed, and can end nothing any more."""
    mark = str(tmp_path / "mark")
    words = Sandbox("bubblewrap").command(
        ["sh", "-c", 'sh -c "sleep 600; :" "$0" & setsid sh -c "sleep 600; :" "$0" & wait', mark],
        writable={"tree": tmp_path}, readable={}, cwd=Path("/"),
    )  # fmt: skip
    work = "import sys; from voltforge.process import run; run(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", work, *words])

    def alive() -> int:
        return sum(mark in (one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))

    assert in_time(lambda: alive() >= 5)  # Python, bwrap twice, and the shells
    child.kill()
    child.wait()
    assert in_time(lambda: alive() == 0)


def in_time(so: Callable[[], bool]) -> bool:
    """Whether it becomes so; a minute is more than enough."""
    deadline = time.monotonic() + 60
    while not so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return so()


@needs_bubblewrap
def test_an_ordinary_user_gets_the_same(server, monkeypatch):
    """As root these tests would miss what only root may do."""
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")  # root's own interpreter may be out of that user's reach
    host, port = server.url.removeprefix("http://").split(":")
    try_all = f"touch new; touch /usr/evil /build/evil; exec 3<>/dev/tcp/{host}/{port}"
    with tempfile.TemporaryDirectory() as room:
        user = {}
        if os.geteuid() == 0:
            os.chown(room, NOBODY, NOBODY)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        argv = Sandbox("bubblewrap").command(
            ["bash", "-c", try_all], writable={"tree": Path(room)}, readable={}, cwd=Path("/build/tree")
        )
        done = subprocess.run(argv, **user, capture_output=True, text=True, check=False)
        assert os.listdir(room) == ["new"]
    assert done.stderr.count("Read-only file system") == 2
    assert "Connection refused" in done.stderr


# --- the weaker kinds ---


# The same for util-linux's unshare(1), which CI has.
@pytest.mark.skipif(not can_unshare(), reason="unshare(1) cannot make a network namespace on this machine")
def test_without_bubblewrap_at_least_the_network_is_out_of_reach(server, tmp_path):
    box = Sandbox("no network")
    words = [PYTHON, "-c", ASK, server.url]
    argv = box.command(words, writable={"tree": tmp_path}, readable={}, cwd=tmp_path)
    assert run(words).output == "reached"
    with pytest.raises(ProgramFailed) as caught:
        run(argv)
    assert "Connection refused" in caught.value.output or "unreachable" in caught.value.output
    user = run(box.command(["id", "-u"], writable={}, readable={}, cwd=tmp_path)).output
    assert user == str(os.getuid())


def test_only_bubblewrap_shows_what_was_declared_and_nothing_else(tmp_path):
    assert [Sandbox(kind).hermetic for kind in ("bubblewrap", "no network", "none")] == [True, False, False]
    for kind in ("no network", "none"):
        assert Sandbox(kind).place("tree", tmp_path) == tmp_path


def test_without_any_sandbox_the_words_are_as_they_were(tmp_path):
    words = ["make", "-j", "2", tmp_path]
    assert Sandbox("none").command(words, writable={}, readable={}, cwd=tmp_path) == [str(word) for word in words]


# --- choosing ---


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[..., None]:
    """A machine that has these tools, with what they do as shell scripts. Fakes: a real machine has what it has."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()

    def made(**tools: str) -> None:
        for name, script in tools.items():
            (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (bin_folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(bin_folder))
        available.cache_clear()

    yield made
    monkeypatch.undo()
    available.cache_clear()


@pytest.mark.parametrize(
    ("tools", "kind"),
    [
        ({}, "none"),
        ({"bwrap": "exit 0", "unshare": "exit 0"}, "bubblewrap"),
        ({"bwrap": "echo 'No permissions to create new namespace'; exit 1", "unshare": "exit 0"}, "no network"),
        ({"unshare": "exit 0"}, "no network"),
        ({"bwrap": "exit 1", "unshare": "exit 1"}, "none"),
    ],
)
def test_the_strongest_sandbox_that_works_is_taken(machine, tools, kind):
    machine(**tools)
    assert choose("auto") == Sandbox(kind)


def test_off_is_none_even_where_there_is_a_better_one():
    assert choose("off") == Sandbox("none")


def test_require_is_refused_where_bubblewrap_does_not_work(machine):
    machine(unshare="exit 0")
    with pytest.raises(VoltforgeError) as caught:
        choose("require")
    assert caught.value.what == "sandbox=require, but bubblewrap cannot make a namespace here"
    assert "bubblewrap" in caught.value.hint


@needs_bubblewrap
def test_require_is_granted_where_bubblewrap_works():
    assert choose("require") == Sandbox("bubblewrap")


@pytest.mark.parametrize("choice", ["", "yes", "bubblewrap", "AUTO"])
def test_any_other_choice_is_refused_with_the_ones_there_are(choice):
    with pytest.raises(VoltforgeError) as caught:
        choose(choice)
    assert (caught.value.what, caught.value.hint) == (f"sandbox={choice} is no choice", "one of auto, require, off")


@needs_bubblewrap
def test_an_interpreter_below_a_link_is_seen_by_both_its_names(tmp_path, monkeypatch):
    """As where the home folder is a link, or uv keeps its interpreters."""
    real = tmp_path / "python-3.1.4"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "python").write_text("here")
    (tmp_path / "python-3.1").symlink_to(real)
    monkeypatch.setattr(sandbox.sys, "base_prefix", str(tmp_path / "python-3.1"))
    words = ["cat", str(real / "bin" / "python"), str(tmp_path / "python-3.1" / "bin" / "python")]
    argv = Sandbox("bubblewrap").command(words, writable={}, readable={}, cwd=Path("/"))
    assert run(argv).output == "herehere"
