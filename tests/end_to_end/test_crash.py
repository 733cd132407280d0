"""After a run is killed at any moment, the next run completes it and never uses incomplete files.

A small CUDA package goes all the way from its sdist on a server to a kept wheel, again and again; each run is ended at
another moment (tests/scripts/killed.py), and what the next one leaves is compared with what an undisturbed one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from _pytest.mark import ParameterSet

from tests.scripts.killed import Point, as_json, runs
from tests.support.checkouts import ROOT, small_checkout
from tests.support.processes import family
from tests.support.samples import cubin_hashes
from tests.support.selection import rotated
from tests.support.servers import Fault, Server, serving
from voltforge.compile import sandbox
from voltforge.system import files
from voltforge.wheel import wheelfile

pytestmark = pytest.mark.slow
SDIST = "/saxpy-1.0.tar.gz"
KINDS = ("fetch", "tree", "environment", "build", "check", "wheels")
"""The stages whose work is begun again after a crash, in order."""
SAID = {
    "fetch": "fetch", "unpack": "tree", "environment": "environment", "build": "build", "check": "check",
    "kept": "wheels",
}  # fmt: skip
"""The stages by the first word that each says when it does its work."""
WORK = "build/work"
"""The folder in which packages are compiled."""
PLACES = {
    "build/downloads/": "fetch", "build/trees/": "tree", "build/environments/saxpy-verify/": "check",
    "build/environments/": "environment", f"{WORK}/": "build", "build/wheels/": "build", "build/logs/": "build",
    "wheelhouse/": "wheels",
}  # fmt: skip
"""The files of each stage."""
PATCH = """\
Subject: the sign
---
--- a/csrc/saxpy.cu
+++ b/csrc/saxpy.cu
@@ -6,3 +6,3 @@
     int i = blockIdx.x * blockDim.x + threadIdx.x;
-    if (i < n) y[i] = a * x[i] + y[i];
+    if (i < n) y[i] = x[i] * a {sign} y[i];
 }}
"""
BOOT = Path("/proc/sys/kernel/random/boot_id")
HOLDER = "sleep"
"""The program that holds a mount namespace."""
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): what a killed run leaves running becomes a child of this process, and can be found and ended."""


@dataclass(frozen=True)
class Way:
    """A way to end a run."""

    name: str
    """The name under which it is counted."""
    signal: signal.Signals
    keeps: float | None = None
    """For a power cut: how much is left of the files that were written last and not synced."""


KILLED = Way("SIGKILL", signal.SIGKILL)
INTERRUPTED = Way("SIGINT", signal.SIGINT)
CUT = Way("power cut", signal.SIGKILL, 0.5)
EMPTIED = Way("power cut", signal.SIGKILL, 0.0)


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    status: int
    output: str
    journal: dict = field(default_factory=dict)

    @property
    def ran(self) -> set[str]:
        """The stages that it worked on."""
        return {SAID[word] for word in re.findall(r"^\* (\w+)", self.output, re.MULTILINE) if word in SAID}

    def sentence(self) -> str:
        """The one problem that it told, and what to try."""
        assert self.status not in (0, -signal.SIGKILL), self.output
        assert "Traceback" not in self.output, self.output
        assert len(re.findall(r"^x ", self.output, re.MULTILINE)) == 1, self.output
        return "x " + re.split(r"^x ", self.output, flags=re.MULTILINE)[1]


@dataclass
class Place:
    """A checkout of the package saxpy whose sdist is on a server, and runs of doit in it."""

    root: Path
    server: Server
    inside: tuple[str, ...] = ()
    """The words that run a program where the checkout is: in a mount namespace."""
    seen: Path = Path()
    """The checkout as this process sees it."""
    sound: bool = False
    """True if the last run succeeded."""
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen = self.seen if self.inside else self.root
        taken = ("VOLTFORGE_", "FORCE_COLOR", "PYTHONDONTWRITEBYTECODE")
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(taken)}
        self.environ |= {"PYTHONPATH": str(ROOT), "VOLTFORGE_MIRRORS": self.server.url}

    def make(self) -> None:
        """A new checkout, in which nothing was done yet."""
        files.remove(self.root)
        small_checkout(self.root)
        for name in ("dodo.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        toolchain = self.root / "build/stages/toolchain.json"
        content = toolchain.read_bytes()
        toolchain.unlink()  # it was a link to that of the real checkout
        toolchain.write_bytes(content)
        sdist = self.root / "build/downloads" / SDIST[1:]
        self.server.files[SDIST] = sdist.read_bytes()
        sdist.unlink()
        self.patch("+")

    def patch(self, sign: str) -> None:
        """Patch the source, to itself or to another."""
        folder = self.seen / "patches/saxpy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0001-sign.patch").write_text(PATCH.format(sign=sign))

    def words(self, *words: str, point: Point | None = None) -> list[str]:
        """The command line of a run."""
        runner = [str(ROOT / "tests/scripts/killed.py"), as_json(point)] if point else ["-m", "doit"]
        return [*self.inside, sys.executable, *runner, *(words or ("wheels:saxpy",))]

    def run(self, *words: str, point: Point | None = None) -> Ended:
        """Run doit to its end, or to that of the point."""
        log, journal = self.root.parent / "output.txt", self.root.parent / "journal.json"
        journal.unlink(missing_ok=True)
        point = point and replace(point, journal=str(journal))
        with log.open("wb") as sink:  # no pipe: what outlives a killed run would hold it open
            child = subprocess.run(
                self.words(*words, point=point), cwd=None if self.inside else self.root, env=self.environ, timeout=180,
                stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, check=False,
            )  # fmt: skip
        return Ended(child.returncode, log.read_text(), files.read_json(journal) or {})

    def kill(self, point: Point, way: Way, *words: str) -> Ended:
        """Run doit until it is ended at the point in that way."""
        began = time.time_ns()
        ended = self.run(*words, point=replace(point, way=way.signal.name))
        assert ended.journal, f"never came to {point}:\n{ended.output}"
        assert "Traceback" not in ended.output, ended.output
        interrupted = (130, -signal.SIGINT)
        assert ended.status in (interrupted if way.signal == signal.SIGINT else (-way.signal,)), ended.output
        if way.keeps is not None:
            end_family()
            damaged = cut(self.seen, ended.journal, began, way.keeps)
            rebooted(self.seen)
            ended.journal["damaged"] = damaged
        return ended

    def finished(self) -> set[str]:
        """The stages that have a record."""
        records = {kind: self.seen / f"build/stages/{kind}-saxpy.json" for kind in KINDS[:-1]}
        done = {kind for kind, path in records.items() if files.read_json(path)}
        kept = [path for path in (self.seen / "wheelhouse/receipts").glob("*.json") if files.read_json(path)]
        return done | ({"wheels"} if kept else set())

    def hurt(self, ended: Ended) -> set[str]:
        """The stages that a power cut damaged a file of."""
        return {
            next((kind for prefix, kind in PLACES.items() if name.startswith(prefix)), "none")
            for name in ended.journal.get("damaged", [])
        }

    def reset(self, kind: str, *, compiled: bool = False) -> None:
        """Forget that the stage and those after it ran, and delete the compiled objects. Other files of theirs stay.

        A build that finds all objects compiled would not notice a broken environment.
        """
        later = KINDS[KINDS.index(kind) :]
        for one in later:
            (self.seen / f"build/stages/{one}-saxpy.json").unlink(missing_ok=True)
        files.remove(self.seen / "wheelhouse")
        if "fetch" in later:
            files.remove(self.seen / "build/downloads")
        if kind in ("environment", "build") and not compiled:
            files.remove(self.seen / "build/work")
            files.remove(self.seen / "build/cache")

    def settle(self, good: dict[str, str]) -> None:
        """Come back to what an undisturbed run leaves."""
        self.patch("+")
        ended = self.run()
        assert (ended.status, self.picture()) == (0, good), ended.output
        self.sound = True

    def receipt(self) -> str:
        """The text of the only receipt."""
        [path] = (self.seen / "wheelhouse/receipts").glob("*.json")
        return path.read_text()

    def picture(self) -> dict[str, str]:
        """Return the hash of each file that pip sees, the names of the others, and the receipt."""
        house, found = self.seen / "wheelhouse", {}
        receipt = json.loads(self.receipt())
        found["receipt"] = f"{receipt['key']} {receipt['results']['sha256']}"
        for path in sorted(path for path in house.rglob("*") if path.is_file() and path.parent.name != "receipts"):
            name = path.relative_to(house).as_posix()
            if not re.search(r"(^|/)\.", name):  # its statement tells times
                found[name] = "there" if name.endswith(".intoto.jsonl") else files.sha256(path)
        return found


def end_family() -> None:
    """End what the killed runs left running, by id."""
    while left := [process for process, name in family(psutil.Process()).items() if name != HOLDER]:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def cut(root: Path, journal: dict, began: int, keeps: float) -> list[str]:
    """Damage what a power cut may: the three files of this run that were written last of those that were not synced.

    Times stay, as they do in a journal of metadata. doit's own memory, which decides nothing, is left alone.
    """
    synced = {tuple(state) for state in journal["synced"]}
    found = []
    for folder in ("build", "wheelhouse"):
        for parent, _, names in os.walk(root / folder):
            for path in (Path(parent, name) for name in names if not name.startswith("doit.sqlite")):
                state = path.lstat()
                safe = (state.st_ino, state.st_size, state.st_mtime_ns) in synced
                safe = safe or state.st_mtime_ns < max(began, journal["everything"])
                if path.is_file() and not path.is_symlink() and state.st_size and not safe and state.st_nlink == 1:
                    found.append((state.st_mtime_ns, path))
    newest = sorted(found)[-3:]
    for when, path in newest:
        os.truncate(path, int(path.stat().st_size * keeps))
        os.utime(path, ns=(when, when))
    return [path.relative_to(root).as_posix() for _, path in newest]


def rebooted(root: Path) -> None:
    """Make every note of this boot one of another."""
    now, other = BOOT.read_text().strip(), str(uuid.UUID(int=7))
    for folder in ("work", "stages", "trees", "environments", "."):
        for path in (root / "build" / folder).glob("*" if folder == "." else "**/*" if folder == "work" else "*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 16:
                text = path.read_bytes()
                if now.encode() in text:
                    path.write_bytes(text.replace(now.encode(), other.encode()))


# --- what is looked at after each crash ---


def whole(place: Place, good: dict[str, str]) -> None:
    """Assert that every file with its final name is complete, and that the index lists only existing files."""
    house = place.seen / "wheelhouse"
    for path in [*house.glob("*.whl"), *(place.seen / "build/wheels").glob("*/*.whl")]:
        if not path.name.startswith("."):
            assert files.sha256(path) == good[path.name], f"{path.name} has its final name and is not whole"
    for page in house.glob("simple/*/index.json"):
        for file in json.loads(page.read_text())["files"]:
            assert files.sha256(house / file["filename"]) == file["hashes"]["sha256"]


def recovered(place: Place, good: dict[str, str], ended: Ended, *, older: bool = False) -> None:
    """The next run ends well, with the same bytes, and repeats nothing that was finished."""
    if not older:
        whole(place, good)
    finished = place.finished() - ({"wheels"} if older else set())
    again = place.run()
    end_family()
    told = f"after {ended.journal['reached']}, damaged {ended.journal.get('damaged')}:\n{again.output}"
    assert (again.status, place.picture()) == (0, good), told
    repeated = finished & again.ran - place.hurt(ended)
    assert not repeated, f"{repeated} repeated {told}"
    place.sound = True


# --- where it happens ---


@pytest.fixture(scope="module", autouse=True)
def reaper() -> Iterator[None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    end_family()
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crash") / "checkout"


@pytest.fixture(scope="module")
def good(root: Path, server: Server, toolchain: object) -> dict[str, str]:
    """Return the result of an undisturbed run in another checkout, or at the same path if there is no sandbox."""
    place = Place(root.parent / "another" if sandbox.available().hermetic else root, server)
    place.make()
    ended = place.run()
    assert ended.status == 0, ended.output
    assert ended.ran == set(KINDS)
    found = place.picture()
    assert {"receipt", "simple/saxpy/index.html", "simple/saxpy/index.json"} < found.keys()
    files.remove(place.root)
    return found


@pytest.fixture(scope="module")
def one(root: Path, server: Server, good: dict[str, str]) -> Iterator[Place]:
    place = Place(root, server)
    yield place
    files.remove(root)


@pytest.fixture
def place(one: Place, good: dict[str, str]) -> Iterator[Place]:
    """The checkout that all these tests share, after a good run: a new one if the last test did not leave it so."""
    if not one.sound:
        one.make()
        ended = one.run()
        assert (ended.status, one.picture()) == (0, good), ended.output
    one.sound = False
    yield one
    end_family()
    one.server.faults.clear()


# --- killed ---


def record(kind: str) -> str:
    return "wheelhouse/receipts/saxpy-*.json" if kind == "wheels" else f"build/stages/{kind}-saxpy.json"


@pytest.mark.parametrize("ways", [(KILLED,), *rotated([(INTERRUPTED,), (CUT, EMPTIED)])], ids=lambda ways: ways[0].name)
def test_runs_killed_around_every_record_end_in_the_same_bytes(
    one: Place, good: dict[str, str], ways: tuple[Way, ...], counted
) -> None:
    """One and the same checkout, from nothing, at ever later points: each run begins where the last was ended."""
    one.make()
    one.sound = False
    for number, kind in enumerate(KINDS):
        for after in (False, True):
            before, way = one.finished(), ways[(number + after) % len(ways)]
            ended = one.kill(Point("rename", record(kind), after=after), way)
            assert not before & ended.ran - one.hurt(ended), ended.output
            assert (kind in one.finished()) == after
            whole(one, good)
    recovered(one, good, ended)
    counted(f"kill points recovered: {ways[0].name}", 2 * len(KINDS))


BUILD = "*bin/python -m build --wheel*"
MIDDLES = {
    "the source is half here": ("fetch", Point("write", "build/downloads/*.part", seconds=0.3)),
    "the source takes its name": ("fetch", Point("rename", "build/downloads/*.tar.gz")),
    "a file is unpacked": ("tree", Point("write", "build/trees/*/csrc/saxpy.cu", after=True)),
    "a patch was applied": ("tree", Point("start", "patch *", nth=2, after=True)),
    "the old tree has gone aside": ("tree", Point("rename", "build/trees/.saxpy*.old", after=True)),
    "the tree takes its name": ("tree", Point("rename", "build/trees/saxpy", after=True)),
    "an environment is begun": ("environment", Point("start", "*/uv venv *", seconds=0.02)),
    "packages are installed": ("environment", Point("start", "*/uv pip install *", seconds=0.1)),
    "the environment takes its name": ("environment", Point("rename", "build/environments/saxpy", after=True)),
    "sources are brought to the build": ("build", Point("write", f"{WORK}/*/tree/csrc/saxpy.cu", after=True)),
    "CMake looks around": ("build", Point("start", BUILD, program="cmake", seconds=0.3)),
    "nvcc compiles": ("build", Point("start", BUILD, program="cicc")),
    "an object is there": ("build", Point("start", BUILD, file=f"{WORK}/*/tree/build/temp*/**/*.cu.o")),
    "it is linked": ("build", Point("start", BUILD, file=f"{WORK}/*/tree/build/temp*/_C.abi3.so")),
    "it is packed": ("build again", Point("start", BUILD, file=f"{WORK}/*/dist/*")),
    "it is stripped": ("build again", Point("start", "*/strip *")),
    "the wheel is written": ("build again", Point("write", "build/wheels/*/.saxpy*", after=True)),
    "the wheel has its name": ("build again", Point("rename", "build/wheels/*/saxpy*.whl", after=True)),
    "it is installed to be looked at": ("check", Point("start", "*/uv pip install *--no-index*", seconds=0.005)),
    "it is imported": ("check", Point("start", "* saxpy._C", seconds=0.02)),
    "what was looked at is removed": ("check", Point("remove", "build/environments/saxpy-verify/*", nth=100)),
}
"""The points at which a run is ended: its first stage, and the point in it."""
CHOSEN = {
    "SIGKILL": (KILLED, {*MIDDLES}),
    "SIGINT": (INTERRUPTED, {
        "the source is half here", "a file is unpacked", "the old tree has gone aside", "packages are installed",
        "nvcc compiles", "it is packed", "the wheel is written", "what was looked at is removed",
    }),
    "cut": (CUT, {
        "a file is unpacked", "the tree takes its name", "the environment takes its name", "an object is there",
        "the wheel has its name",
    }),
    "emptied": (EMPTIED, {
        "packages are installed", "sources are brought to the build", "nvcc compiles", "it is linked",
    }),
}  # fmt: skip


def moments(*names: str) -> list[ParameterSet]:
    """The points at which runs are ended in some of the ways of :data:`CHOSEN`."""
    return [
        pytest.param(*MIDDLES[moment], CHOSEN[name][0], id=f"{name}-{moment}")
        for name in names
        for moment in MIDDLES
        if moment in CHOSEN[name][1]
    ]


MOMENTS = [*moments("SIGKILL"), *rotated(moments("SIGINT", "cut", "emptied"))]


@pytest.mark.parametrize(("state", "point", "way"), MOMENTS)
def test_killed_run_is_recovered_at(
    place: Place, good: dict[str, str], state: str, point: Point, way: Way, counted
) -> None:
    kind = state.split()[0]
    place.reset(kind, compiled="again" in state)
    if point.what.endswith(".part"):
        place.server.faults[SDIST] = [Fault(cut=100, stall=True)]
        place.server.sent.clear()
    ended = place.kill(point, way)
    assert kind not in place.finished()
    recovered(place, good, ended)
    if point.what.endswith(".part"):
        assert [start for _, start, _ in place.server.sent] == [0, 100], "what had come was asked for again"
    counted(f"kill points recovered: {way.name}")


STEPS = 4
"""Between two changes of the wheelhouse at which a run is ended."""


@pytest.mark.parametrize(
    ("ways", "first"),
    [
        pytest.param((KILLED,), 1, id="SIGKILL"),
        *rotated([pytest.param((INTERRUPTED,), 2, id="SIGINT"), pytest.param((CUT, EMPTIED), 3, id="cut")]),
    ],
)
def test_new_wheel_replaces_the_old_after_a_kill_at_any_point(
    place: Place, good: dict[str, str], ways: tuple[Way, ...], first: int, counted
) -> None:
    """At every fourth change to the wheelhouse, counted from another one for each way."""
    house, older = place.root / "wheelhouse", place.root.parent / "older"
    place.patch("-")
    assert place.run().status == 0
    files.remove(older)
    house.rename(older)
    place.patch("+")
    assert place.run("build:saxpy").status == 0
    assert place.run("check:saxpy").status == 0
    shutil.copytree(older, house)
    counting = place.run(point=Point("change", "wheelhouse*", way="count"))
    assert (counting.status, place.picture()) == (0, good)
    points = range(first, counting.journal["events"] + 1, STEPS)
    assert len(points) > 8
    for nth in points:
        files.remove(house)
        shutil.copytree(older, house)
        ended = place.kill(Point("change", "wheelhouse*", nth=nth), ways[nth // STEPS % len(ways)])
        recovered(place, good, ended, older=True)
    files.remove(older)
    counted(f"kill points recovered: {ways[0].name}", len(points))


def test_surviving_compilers_of_a_killed_run_do_not_affect_the_next(place: Place, counted) -> None:
    words = "sandbox=off", "wheels:saxpy"
    place.reset("build")
    assert place.run(*words).status == 0
    undisturbed = place.picture()
    for point in (MIDDLES["CMake looks around"][1], MIDDLES["nvcc compiles"][1]):
        place.reset("build")
        place.kill(point, KILLED, *words)
        again = place.run(*words)
        assert (again.status, place.picture()) == (0, undisturbed), again.output
    counted("kill points recovered: SIGKILL", 2)


# --- a full disk, and one that may only be read ---


@contextlib.contextmanager
def namespace(place: Place, script: str) -> Iterator[Place]:
    """The same checkout in a mount namespace of its own, where ``script`` has mounted something: sh(1), root is $1."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *user, "--mount", "--propagation", "private", "sh", "-ec", f"{script}\nexec {HOLDER} 600", "sh"]
    holder = subprocess.Popen([*words, place.root], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while holder.poll() is None and psutil.Process(holder.pid).name() != HOLDER:
            time.sleep(0.01)
        if holder.poll() is not None:  # many containers forbid mounts; CI's machine does not
            pytest.skip(f"nothing can be mounted here: {holder.stderr.read().strip()}")
        enter = [
            "nsenter",
            f"--target={holder.pid}",
            "--mount",
            *(["--user", "--preserve-credentials"] if user else []),
        ]
        inside = (*enter, "--", "env", "-C", str(place.root))
        yield replace(place, inside=inside, seen=Path(f"/proc/{holder.pid}/root{place.root}"))
    finally:
        holder.kill()
        holder.communicate()


SMALL = """\
size=$(du --summarize --block-size=1M "$1" | cut -f1)
mkdir -p "$1/../small"
mount -t tmpfs -o size="$((size + 200))m" small "$1/../small"
cp -a "$1/." "$1/../small"
mount --bind "$1/../small" "$1"
"""
FULL = {
    "the source is fetched": ("fetch", Point("write", "build/downloads/*.part")),
    "a file is unpacked": ("tree", Point("write", "build/trees/*/csrc/saxpy.cu")),
    "a patch is applied": ("tree", Point("start", "patch *", nth=2)),
    "packages are installed": ("environment", Point("start", "*/uv pip install *")),
    "sources are brought to the build": ("build", Point("write", f"{WORK}/*/tree/csrc/saxpy.cu")),
    "nvcc compiles": ("build", Point("start", BUILD, program="cicc")),
    "the wheel is written": ("build again", Point("write", "build/wheels/*/.saxpy*")),
    "it is installed to be looked at": ("check", Point("start", "*/uv pip install *saxpy-verify*")),
    "it is copied into the wheelhouse": ("wheels", Point("write", "wheelhouse/.saxpy*")),
    "the index is written": ("wheels", Point("write", "wheelhouse/.simple*/saxpy/.index.html*")),
    "a record is written": ("wheels", Point("write", "wheelhouse/receipts/.saxpy*")),
}


@pytest.fixture(scope="module")
def small(one: Place, good: dict[str, str]) -> Iterator[Place]:
    """A good checkout on a disk of its own with little room."""
    one.make()
    ended = one.run()
    assert (ended.status, one.picture()) == (0, good), ended.output
    with namespace(one, SMALL) as place:
        yield place


@pytest.mark.parametrize(("state", "point"), FULL.values(), ids=FULL)
def test_full_disk_is_reported_and_recovered_at(
    small: Place, good: dict[str, str], state: str, point: Point, counted
) -> None:
    small.reset(state.split()[0], compiled="again" in state)
    ended = small.run(point=replace(point, way="fill"))
    (small.seen / "ballast").unlink()
    said = ended.sentence()
    assert "No space left" in said
    assert re.search(r"^  try: .*\b(room|space)\b", said, re.MULTILINE), said
    assert state.split()[0] not in small.finished()
    recovered(small, good, ended)
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


def test_read_only_wheelhouse_is_reported_and_the_build_is_kept(place: Place, good: dict[str, str], counted) -> None:
    place.patch("-")
    with namespace(
        place, 'mount --bind "$1/wheelhouse" "$1/wheelhouse"; mount -o remount,ro,bind "$1/wheelhouse"'
    ) as it:
        ended = it.run()
        assert re.search(r"wheelhouse.*: Read-only file system\n  try: ", ended.sentence())
    assert place.picture() == good
    again = place.run()
    assert (again.status, again.ran) == (0, {"wheels"}), again.output
    assert place.picture() != good
    place.settle(good)
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


# --- the clock, the others, and what is changed under a run's feet ---


def test_changed_source_is_compiled_after_the_clock_was_set_back(place: Place, good: dict[str, str], counted) -> None:
    """To a clock that was set back, all that was made before is of the future."""
    day = 86_400 * 10**9
    for folder in ("build/work", "build/trees"):
        for path in (place.root / folder).rglob("*"):
            when = path.lstat().st_mtime_ns + day
            os.utime(path, ns=(when, when), follow_symlinks=False)
    before = code(place)
    place.patch("-")
    assert place.run().status == 0
    assert code(place) != before, "the wheel has the old device code"
    made = place.picture()
    place.reset("tree")
    files.remove(place.root / "build/work")
    files.remove(place.root / "build/cache")
    assert place.run().status == 0
    assert place.picture() == made
    place.settle(good)
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


def code(place: Place) -> list[tuple[int, str, str]]:
    """The device code of the wheel that was kept."""
    [kept] = (place.root / "wheelhouse").glob("*.whl")
    content = place.root.parent / "content"
    files.remove(content)
    wheelfile.unpack(kept, content)
    return cubin_hashes(content / "saxpy/_C.abi3.so")


@contextlib.contextmanager
def compiling(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A run whose compiler is at work when the block begins."""
    run = subprocess.Popen(
        place.words(), cwd=place.root, env=place.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while run.poll() is None and not runs("cicc", psutil.Process(run.pid)):
        time.sleep(0.005)
    assert run.poll() is None, run.communicate()[0]
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def test_second_concurrent_run_waits_and_then_reuses_everything(place: Place, good: dict[str, str], counted) -> None:
    place.reset("build")
    with compiling(place) as first:
        second = place.run()
        output = first.communicate(timeout=60)[0]
        assert (first.returncode, second.status) == (0, 0), output + second.output
    [waits] = [line for line in second.output.splitlines() if "waiting for" in line]
    assert "wheels:saxpy" in waits
    assert re.search(rf"\b{first.pid}\b", waits)
    assert second.ran == set()
    assert Ended(0, output).ran == {"build", "check", "wheels"}
    assert place.picture() == good
    place.sound = True
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


def changed_while_compiling(place: Place, path: Path, old: str, new: str) -> str:
    """Change a file while a run compiles; assert that nothing was kept and return the output."""
    place.reset("build")
    with compiling(place) as run:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        output = run.communicate(timeout=60)[0]
    said = Ended(run.returncode, output).sentence()
    assert "changed during the run" in said
    assert "build" not in place.finished()
    assert not [*(place.root / "wheelhouse").glob("*.whl")]
    return said


def test_patch_changed_during_compilation_is_reported_and_used_next(
    place: Place, good: dict[str, str], counted
) -> None:
    before = code(place)
    patch = place.root / "patches/saxpy/0001-sign.patch"
    assert patch.name in changed_while_compiling(place, patch, "x[i] * a + y", "x[i] * a - y")
    assert place.run().status == 0
    assert code(place) != before
    assert files.sha256(patch) in place.receipt()
    place.settle(good)
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


def test_source_changed_during_compilation_is_reported_and_unpacked_again(
    place: Place, good: dict[str, str], counted
) -> None:
    source = place.root / "build/trees/saxpy/csrc/saxpy.cu"
    assert "tree:saxpy" in changed_while_compiling(place, source, "x[i] * a + y", "x[i] * a - y")
    again = place.run()
    assert (again.status, place.picture()) == (0, good), again.output
    place.sound = True
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")


def test_recipe_changed_during_compilation_is_used_by_the_next_run(place: Place, good: dict[str, str], counted) -> None:
    recipe, new = place.root / "recipes/saxpy.toml", "nvidia/cuda_runtime/../cuda_runtime/lib"
    place.reset("build")
    with compiling(place) as run:
        recipe.write_text(recipe.read_text().replace("nvidia/cuda_runtime/lib", new))
        output = run.communicate(timeout=60)[0]
    assert (run.returncode, place.picture()) == (0, good), output
    again = place.run()
    assert again.status == 0, again.output
    assert new in place.receipt()
    recipe.write_text(recipe.read_text().replace("cuda_runtime/../", ""))
    place.settle(good)
    counted("other faults explained and recovered (full disk, read-only wheelhouse, clock, two runs, changed files)")
