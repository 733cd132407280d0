"""A sandboxed build sees its folders, a read-only system, no network and no home; tried from the inside."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from tests.support.checkouts import PACKAGES, small_checkout
from tests.support.rights import NOBODY
from tests.support.servers import Server, serving
from tests.support.tally import Tally
from voltforge.compile import sandbox
from voltforge.compile.build import Build
from voltforge.compile.sandbox import Sandbox, available, choose
from voltforge.compile.toolchain import HostCompiler, Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.environment import Environment
from voltforge.sources.tree import Tree
from voltforge.system import files
from voltforge.system.process import ProgramFailed, run

PYTHON = os.path.realpath(sys.executable)
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"

# Many containers forbid namespaces, and the README promises to build there too; CI installs bubblewrap and runs these.
needs_bubblewrap = pytest.mark.skipif(
    not available().hermetic, reason="bubblewrap cannot make a namespace on this machine"
)


def can_unshare() -> bool:
    words = Sandbox("no network").command(["true"], writable={}, readable={}, cwd=Path("/"))
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True, check=False).returncode == 0


# The same for util-linux's unshare(1), which CI has.
needs_unshare = pytest.mark.skipif(not can_unshare(), reason="unshare(1) cannot make namespaces on this machine")


@pytest.fixture
def inside(build_folders) -> Callable[..., str]:
    """Run a command inside, with the two folders, and return its output."""

    def run_inside(*words: str) -> str:
        argv = Sandbox("bubblewrap").command(
            words,
            writable={"tree": build_folders["tree"]},
            readable={"environment": build_folders["environment"]},
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
def test_folders_are_at_their_fixed_paths(inside, build_folders):
    assert inside("pwd") == "/build/tree"
    assert inside("cat", "/build/tree/file", "/build/environment/file") == "treeenvironment"
    box = Sandbox("bubblewrap")
    assert [str(box.place(name, real)) for name, real in build_folders.items()] == ["/build/tree", "/build/environment"]


@needs_bubblewrap
def test_files_written_into_a_writable_folder_stay(inside, build_folders):
    inside("sh", "-c", "echo object > /build/tree/new.o")
    assert (build_folders["tree"] / "new.o").read_text() == "object\n"
    assert (build_folders["tree"] / "new.o").stat().st_uid == os.getuid()


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
def test_the_network_is_unreachable_inside_and_reachable_outside(inside, server):
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
def test_the_build_sees_no_other_process_and_has_pid_1(inside):
    assert inside("sh", "-c", "echo $$") == "1"
    assert (
        inside(PYTHON, "-c", "import os; print(sorted(name for name in os.listdir('/proc') if name.isdecimal()))")
        == "['1']"
    )


@needs_bubblewrap
def test_the_host_name_is_hidden_inside(inside):
    assert inside("uname", "-n") == "build"


@needs_bubblewrap
def test_nothing_can_be_mounted_and_no_capabilities_are_left(inside):
    with pytest.raises(ProgramFailed):
        inside("mount", "-o", "remount,rw", "/usr")
    capabilities = re.findall(r"^Cap(?:Prm|Eff|Bnd):\s*(\w+)", inside("cat", "/proc/self/status"), re.MULTILINE)
    assert {int(value, 16) for value in capabilities} == {0}


@needs_bubblewrap
def test_the_interpreter_and_the_compiler_work_inside(inside):
    assert inside(PYTHON, "-c", "import ssl, sqlite3, sys; print(sys.version_info[:2])") == str(sys.version_info[:2])
    inside("sh", "-c", "echo 'int main(void) { return 0; }' > a.c && gcc a.c -o a && ./a")


@needs_bubblewrap
def test_builds_in_different_folders_see_the_same_paths(tmp_path):
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


@pytest.mark.parametrize(
    "kind", [pytest.param("bubblewrap", marks=needs_bubblewrap), pytest.param("no network", marks=needs_unshare)]
)
@pytest.mark.parametrize("user", [None, NOBODY])
def test_processes_inside_end_with_the_program_that_started_them(kind, user, monkeypatch):
    """Also after SIGKILL, which leaves no time to clean up."""
    if user and os.geteuid() != 0:
        pytest.skip("only root can become another user; the case without a user covers an ordinary one, and CI is root")
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
    mark = secrets.token_hex()
    words = Sandbox(kind).command(
        ["sh", "-c", 'sh -c "sleep 600; :" "$0" & setsid sh -c "sleep 600; :" "$0" & wait', mark],
        writable={}, readable={}, cwd=Path("/"),
    )  # fmt: skip
    rights = {"user": user, "group": user, "extra_groups": []} if user else {}
    child = subprocess.Popen(["sh", "-c", '"$@"; :', "sh", *words], **rights)

    def alive() -> int:
        return sum(mark in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))

    assert in_time(lambda: alive() >= 5)  # the starter, bwrap twice or unshare, and the shells
    child.kill()
    child.wait()
    assert in_time(lambda: alive() == 0)


def in_time(so: Callable[[], bool]) -> bool:
    """Wait until a condition holds, for a minute at most; return whether it does."""
    deadline = time.monotonic() + 60
    while not so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return so()


@needs_bubblewrap
def test_an_ordinary_user_gets_the_same_sandbox(server, monkeypatch):
    """These tests run as root, which can do what an ordinary user cannot."""
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


# --- weaker sandboxes ---


@needs_unshare
def test_without_bubblewrap_the_network_is_still_unreachable(server, tmp_path):
    box = Sandbox("no network")
    words = [PYTHON, "-c", ASK, server.url]
    argv = box.command(words, writable={"tree": tmp_path}, readable={}, cwd=tmp_path)
    assert run(words).output == "reached"
    with pytest.raises(ProgramFailed) as caught:
        run(argv)
    assert "Connection refused" in caught.value.output or "unreachable" in caught.value.output
    user = run(box.command(["id", "-u"], writable={}, readable={}, cwd=tmp_path)).output
    assert user == str(os.getuid())


@needs_unshare
@pytest.mark.parametrize("user", [None, NOBODY])
def test_without_bubblewrap_folders_are_still_at_their_fixed_paths(user):
    if user and os.geteuid() != 0:
        pytest.skip("only root can become another user; the case without a user covers an ordinary one, and CI is root")
    look = "pwd; cat /build/environment/file; echo object > new.o; uname -n; echo $$; grep CapEff /proc/self/status"
    with tempfile.TemporaryDirectory() as room:
        tree, environment = Path(room, "tree"), Path(room, "environment")
        for folder in (tree, environment):
            folder.mkdir()
            (folder / "file").write_text(f"{folder.name}\n")
        rights = {}
        if user:
            for folder in (room, tree):
                os.chown(folder, user, user)
            rights = {"user": user, "group": user, "extra_groups": []}
        argv = Sandbox("no network").command(
            ["sh", "-c", look], writable={"tree": tree}, readable={"environment": environment}, cwd=Path("/build/tree")
        )
        done = subprocess.run(argv, **rights, cwd=room, capture_output=True, text=True, check=True)
        assert (tree / "new.o").read_text() == "object\n"
    where, file, name, pid, rights_left = done.stdout.splitlines()
    assert (where, file, pid) == ("/build/tree", "environment", "1")
    assert name == "build" or not shutil.which("hostname")
    assert int(rights_left.split()[1], 16) == 0


@needs_unshare
def test_without_bubblewrap_a_container_with_a_masked_proc_is_enough(tmp_path):
    words = Sandbox("no network").command(["pwd"], writable={"tree": tmp_path}, readable={}, cwd=Path("/build/tree"))
    hide = 'mount -t tmpfs hidden /proc/sys/kernel && exec "$@"'
    done = run(["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-c", hide, "sh", *words])
    assert done.output == "/build/tree"


def test_only_bubblewrap_shows_declared_inputs_alone():
    assert [Sandbox(kind).hermetic for kind in ("bubblewrap", "no network", "none")] == [True, False, False]
    assert not Sandbox("none", moves=True).hermetic


def test_a_folder_has_the_same_path_in_every_sandbox_that_can_map_it(tmp_path):
    places = [kind.place("tree", tmp_path) for kind in (Sandbox("bubblewrap"), Sandbox("no network"))]
    assert [*places, Sandbox("none", moves=True).place("tree", tmp_path)] == [Path("/build/tree")] * 3
    assert Sandbox("none").place("tree", tmp_path) == tmp_path


def test_without_a_sandbox_the_command_is_unchanged(tmp_path):
    words = ["make", "-j", "2", tmp_path]
    for box in (Sandbox("none"), Sandbox("none", moves=True)):
        assert box.command(words, writable={}, readable={}, cwd=tmp_path) == [str(word) for word in words]


# --- choosing a sandbox ---


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[..., None]:
    """A machine with these tools, as shell scripts. They are fakes, because a real machine has its own."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()

    def made(**tools: str) -> None:
        for name, script in {"setpriv": 'shift 3; exec "$@"', **tools}.items():
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
def test_the_strongest_sandbox_that_works_is_chosen(machine, tools, kind):
    machine(**tools)
    assert choose("auto") == Sandbox(kind)


def test_off_means_no_sandbox_even_if_one_works():
    assert choose("off") == Sandbox("none")


def test_require_fails_without_bubblewrap(machine):
    machine(unshare="exit 0")
    with pytest.raises(VoltforgeError) as caught:
        choose("require")
    assert caught.value.what == "sandbox=require: bubblewrap cannot create a namespace here"
    assert "bubblewrap" in caught.value.hint


@needs_bubblewrap
def test_require_succeeds_with_bubblewrap():
    assert choose("require") == Sandbox("bubblewrap")


@pytest.mark.parametrize("choice", ["", "yes", "bubblewrap", "AUTO"])
def test_an_unknown_choice_is_refused_with_the_valid_ones(choice):
    with pytest.raises(VoltforgeError) as caught:
        choose(choice)
    assert caught.value.what == f"sandbox={choice} is not a valid choice"
    assert caught.value.hint == "sandbox=auto or sandbox=require or sandbox=off"


@needs_bubblewrap
def test_an_interpreter_below_a_link_is_visible_under_both_names(tmp_path, monkeypatch):
    """A home folder can be a link, and uv's interpreters are below one."""
    real = tmp_path / "python-3.1.4"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "python").write_text("here")
    (tmp_path / "python-3.1").symlink_to(real)
    monkeypatch.setattr(sandbox.sys, "base_prefix", str(tmp_path / "python-3.1"))
    words = ["cat", str(real / "bin" / "python"), str(tmp_path / "python-3.1" / "bin" / "python")]
    argv = Sandbox("bubblewrap").command(words, writable={}, readable={}, cwd=Path("/"))
    assert run(argv).output == "herehere"


# --- a build that reads all it can ---

NAME_SERVER = """
import socket, sys
line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
line.bind(("127.0.0.1", 0))
print(line.getsockname()[1], flush=True)
while True:
    data, whoever = line.recvfrom(512)
    print(f"was asked {len(data)} bytes", flush=True)
    answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4\\xc0\\0\\2\\1"
    line.sendto(data[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + data[12:] + answer, whoever)
"""
"""A server that answers every query with the address 192.0.2.1 (RFC 1035)."""


@dataclass(frozen=True)
class Attempt:
    """An attempt of a build: a function of tests/packages/curious/setup.py and its arguments."""

    what: str
    words: tuple[object, ...]
    by_root: bool = False
    """True if only root succeeds even without a sandbox."""


class World:
    """The surroundings of a build: listeners, homes, a checkout, a process."""

    def __init__(self, user: int, held: contextlib.ExitStack) -> None:
        self.user = user
        self.held = held
        self.rights = {} if user == os.geteuid() else {"user": user, "group": user, "extra_groups": []}
        self.secret = secrets.token_hex()
        homes = Path("/home") if os.access("/home", os.W_OK) else Path("/var/tmp")
        self.home = self.folder(Path.home() if user == os.geteuid() and os.access(Path.home(), os.W_OK) else homes)
        self.other_home = self.folder(homes)
        self.checkout = self.folder(Path("/var/tmp"))  # not below /tmp, which is another one inside
        self.shared = [self.folder(Path(where)) for where in ("/tmp", "/dev/shm")]
        self.network = [self.listening(socket.AF_INET, ("127.0.0.1", 0)),
                        self.listening(socket.AF_UNIX, f"\0{self.secret}"),
                        self.listening(socket.AF_UNIX, str(self.checkout / "socket"))]  # fmt: skip
        self.names = held.enter_context(self.started([PYTHON, "-c", NAME_SERVER], {}))
        self.name_port = int(self.names.stdout.readline())
        variables = {**os.environ, "SECRET": f"{self.secret} of the environment"}
        self.process = held.enter_context(
            self.started(["sleep", f"600.{secrets.randbits(64)}"], {"env": variables, **self.rights})
        )

    def folder(self, where: Path) -> Path:
        """A folder of the user with a secret in it, for the length of the test."""
        made = Path(self.held.enter_context(tempfile.TemporaryDirectory(prefix="voltforge-test-", dir=where)))
        (made / "secret").write_text(self.secret)
        made.chmod(0o755)
        return made

    def listening(self, family: int, address: object) -> socket.socket:
        """A listener that counts its callers."""
        line = self.held.enter_context(socket.socket(family))
        line.bind(address)
        line.listen()
        line.setblocking(False)
        if family == socket.AF_UNIX and isinstance(address, str) and address.startswith("/"):
            Path(address).chmod(0o777)
        return line

    @contextlib.contextmanager
    def started(self, words: list[str], rights: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(words, stdout=subprocess.PIPE, **rights) as child:
            try:
                yield child
            finally:
                child.kill()

    def callers(self) -> int:
        """Return the number of callers since the last call."""
        count = 0
        for line in self.network:
            with contextlib.suppress(BlockingIOError):
                while True:
                    line.accept()[0].close()
                    count += 1
        asked = os.open(f"/proc/self/fd/{self.names.stdout.fileno()}", os.O_RDONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            count += os.read(asked, 1 << 16).count(b"\n")
        os.close(asked)
        return count

    def attempts(self, places: dict[str, Path]) -> list[Attempt]:
        """The attempts. Each must fail inside the sandbox and succeed outside."""
        port = self.network[0].getsockname()[1]
        return [
            Attempt("network: a TCP connection", ("connect", "127.0.0.1", port)),
            Attempt("network: a UDP packet", ("send", "127.0.0.1", self.name_port)),
            Attempt("network: a DNS lookup", ("look_up", "127.0.0.1", self.name_port, "index.example.org")),
            Attempt("network: a socket without a file", ("connect_by_name", f"\0{self.secret}")),
            Attempt("network: a socket's file", ("connect_by_name", str(self.checkout / "socket"))),
            Attempt("read a file of $HOME", ("read", str(self.home / "secret"))),
            Attempt("read a file of another home", ("read", str(self.other_home / "secret"))),
            Attempt("read a file of the checkout", ("read", str(self.checkout / "secret"))),
            *(Attempt(f"read {folder.parent}", ("read", str(folder / "secret"))) for folder in self.shared),
            Attempt("write to the checkout", ("write", str(self.checkout))),
            Attempt("write to the environment", ("write", str(places["environment"]))),
            Attempt("write to the toolchain", ("write", str(places["toolchain"]))),
            Attempt("write to /usr", ("write", "/usr"), by_root=True),
            Attempt("write to /usr/lib", ("write", "/usr/lib"), by_root=True),
            Attempt("write to /etc", ("write", "/etc"), by_root=True),
            Attempt("write to /", ("write", "/"), by_root=True),
            Attempt("see a process of the machine", ("see_process", self.process.args[1])),
            Attempt("read a variable of its caller", ("read_variable", self.secret)),
        ]


@pytest.fixture(scope="module")
def tools(tmp_path_factory, toolchain) -> Environment:
    """The environment that builds a package without compilers."""
    pipeline = small_checkout(tmp_path_factory.mktemp("tools") / "checkout")
    pipeline.package(pipeline.recipes["saxpy"]).stages["environment"].run()
    return Environment(pipeline.scratch / "environments" / "saxpy")


def interpreter(user: int) -> Path:
    """A Python that this user can run; root's own can be out of reach."""
    for path in (PYTHON, "/usr/bin/python{}.{}".format(*sys.version_info)):
        with contextlib.suppress(OSError):
            if user == os.geteuid() or not subprocess.run([path, "-c", ""], user=user, group=user).returncode:
                return Path(path)
    # A Python in a private home is out of reach for others. CI has Debian's, which everyone can run.
    pytest.skip("an ordinary user cannot run this Python")


def curious(world: World, tools: Environment, saxpy: Pipeline, kind: str) -> Build:
    """A build of tests/packages/curious whose files the user can reach."""
    tree, home, toolkit = (world.checkout / name for name in ("curious", "environment", "toolkit"))
    shutil.copytree(PACKAGES / "curious", tree)
    shutil.copytree(tools.path, home, symlinks=True, ignore=shutil.ignore_patterns("cmake", "nvidia", "ninja"))
    python = interpreter(world.user)
    (home / "bin" / "python").unlink()
    (home / "bin" / "python").symlink_to(python)
    settings = (home / "pyvenv.cfg").read_text()
    (home / "pyvenv.cfg").write_text(re.sub(r"(?m)^home = .*$", f"home = {python.parent}", settings))
    toolkit.mkdir()
    compiler = HostCompiler(Path("/usr/bin/g++"), Path("/usr/bin/gcc"), "12.2.0")
    build = Build(
        saxpy.recipes["saxpy"], Tree(tree, 1_700_000_000), Environment(home),
        Toolchain(toolkit, "distro", "12.4.131", compiler, {}), Sandbox(kind), 1, world.checkout / "work",
    )  # fmt: skip
    for folder in (world.checkout, *world.checkout.rglob("*")):
        os.chown(folder, world.user, world.user if world.rights else -1, follow_symlinks=False)
    return build


def tried(build: Build, world: World) -> None:
    """Build as this user and return the result of each attempt: ``done``, or the error."""
    attempts = [one for one in world.attempts(build.places) if os.geteuid() == 0 or not one.by_root]
    files.write_json(world.checkout / "attempts.json", [attempt.words for attempt in attempts])
    shutil.copy(world.checkout / "attempts.json", build.tree.path)
    log = world.checkout / "log"
    build.compile(log)
    outcomes = re.findall(r"^TRIED \d+ (.*)$", log.read_text(), re.MULTILINE)
    named = zip([attempt.what for attempt in attempts], outcomes, strict=True)
    files.write_json(world.checkout / "outcomes.json", dict(named))


def tried_by(user: int, build: Build, world: World) -> None:
    if user != os.geteuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    tried(build, world)


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("user", [os.geteuid(), NOBODY], ids=["me", "an ordinary user"])
def test_a_curious_build_sees_nothing_inside_and_everything_outside(
    user: int, saxpy: Pipeline, tools: Environment, counted: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    if user != os.geteuid() != 0:
        pytest.skip("only root can become another user; the case without a user covers an ordinary one, and CI is root")
    with contextlib.ExitStack() as held:
        world = World(user, held)
        if world.rights:
            monkeypatch.setattr(sys, "base_prefix", "/usr")  # root's own may be out of reach
        inside = curious(world, tools, saxpy, "bubblewrap")
        for build in (inside, replace(inside, sandbox=Sandbox("none"), work=world.checkout / "outside")):
            child = multiprocessing.get_context("fork").Process(target=tried_by, args=(user, build, world))
            child.start()
            child.join()
            assert child.exitcode == 0
            outcomes = files.read_json(world.checkout / "outcomes.json")
            done = [what for what, outcome in outcomes.items() if outcome == "done"]
            assert done == ([] if build is inside else [*outcomes]), outcomes
            assert world.callers() == (0 if build is inside else 5)
    network = sum(what.startswith("network") for what in outcomes)
    counted("network connections blocked inside the sandbox that succeed outside", network)
    counted("reads and writes blocked inside the sandbox that succeed outside", len(outcomes) - network)
