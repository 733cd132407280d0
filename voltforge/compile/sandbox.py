"""What a build can see: its tree, environment and toolchain at fixed paths, a read-only system, no network."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from voltforge.compile.toolchain import COMPILERS
from voltforge.errors import VoltforgeError
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

CHOICES = ("auto", "require", "off")
ROOT = Path("/build")
"""Where a build finds its folders: nvcc writes a hash of the path into device code, so it must not vary."""
MOVED = "moved.json"
"""The note in :data:`ROOT` that says where each folder was moved from; nothing for a copy."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/gnu")
"""The parts of the machine that compilers and interpreters live in, shown read-only where they exist."""
UNSHARE = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--user", "--map-current-user", "--keep-caps", "--mount", "--net", "--ipc", "--uts"),
    *("--pid", "--fork", "--kill-child", "--"),
)
"""New namespaces by util-linux, and an end of all that is inside with whoever started it."""
VIEW = """\
set -e
mount -t tmpfs -o mode=755 view /sys
for entry in /*; do
    case $entry in /sys | /proc | "$1") continue ;; esac
    if [ -L "$entry" ]; then
        cp -P "$entry" "/sys$entry"
    elif [ -d "$entry" ]; then
        mkdir "/sys$entry"
        mount --rbind "$entry" "/sys$entry"
    fi
done
mkdir /sys/proc
mount -t proc proc /sys/proc 2>/dev/null || mount --rbind /proc /sys/proc
hostname build 2>/dev/null || :
shift
while [ "$1" != -- ]; do
    mkdir -p "/sys$2"
    mount --rbind "$1" "/sys$2"
    shift 2
done
cwd=$2
shift 2
exec unshare --root=/sys --wd="$cwd" -- setpriv --inh-caps=-all --ambient-caps=-all --bounding-set=-all -- "$@"
"""
"""What runs in them first: it shows the machine as it is, but for the folders at :data:`ROOT`.

Its words are ROOT, each folder and its place, ``--``, where to start, and the program. The new root is put together
at /sys, which every machine has and no build needs. Where parts of /proc are hidden, as in containers, the kernel
allows no new one.
"""


@dataclass(frozen=True)
class Sandbox:
    """One way to run a build: with a view of its own, or only without the network, or as it is."""

    kind: str
    """``bubblewrap``, ``no network`` (util-linux's unshare) or ``none``."""
    moves: bool = False
    """With ``none``: whether a build's folders are moved to :data:`ROOT` for the time of its run."""

    @property
    def hermetic(self) -> bool:
        """Whether a build sees only what was declared."""
        return self.kind == "bubblewrap"

    def place(self, name: str, real: Path) -> Path:
        """Where the build will see the folder ``real``, which it knows as ``name``."""
        return real if self.kind == "none" and not self.moves else ROOT / name

    @contextlib.contextmanager
    def shown(self, writable: Mapping[str, Path], readable: Mapping[str, Path]) -> Iterator[None]:
        """For the time of the block the folders are where :meth:`place` says, if that takes more than a mount.

        Those that are writable are moved there and back. The others, which may be in use elsewhere, are copied by
        links. Two builds do not meet, the later one waits.

        Raises:
            OSError: a folder cannot be moved or copied; all are back in their places.
        """
        if not self.moves:
            yield
            return
        with _root():
            origins = {name: str(real.absolute()) for name, real in writable.items()}
            files.write_json(ROOT / MOVED, origins | dict.fromkeys(readable, ""))
            try:
                for name, real in writable.items():
                    real.rename(ROOT / name)
                for name, real in readable.items():
                    _copy(real, ROOT / name)
                yield
            finally:
                _give_back()

    def command(
        self, argv: Sequence[str | Path], *, writable: Mapping[str, Path], readable: Mapping[str, Path], cwd: Path
    ) -> list[str]:
        """``argv`` wrapped so that it runs inside.

        The folders go by the names that :meth:`place` knows; ``cwd`` is as seen inside.
        """
        words = [str(word) for word in argv]
        if self.kind == "none":
            return words
        if self.kind == "no network":
            binds = [(real.absolute(), self.place(name, real)) for name, real in {**readable, **writable}.items()]
            return [*UNSHARE, "sh", "-c", VIEW, "view", str(ROOT), *(str(path) for bind in binds for path in bind),
                    "--", str(cwd), *words]  # fmt: skip
        view = ["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        view += ["--hostname", "build"]
        for folder in SYSTEM:
            if Path(folder).is_symlink():
                view += ["--symlink", str(Path(folder).readlink()), folder]
            elif Path(folder).is_dir():
                view += ["--ro-bind", folder, folder]
        view += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/tmp/home"]
        for interpreter in {Path(sys.base_prefix), Path(sys.base_prefix).resolve()}:  # an environment may name either
            if not any(interpreter.is_relative_to(folder) for folder in SYSTEM):
                view += ["--ro-bind", str(interpreter), str(interpreter)]
        for option, folders in (("--ro-bind", readable), ("--bind", writable)):
            for name, real in folders.items():
                view += [option, str(real.absolute()), str(self.place(name, real))]
        return [*view, "--remount-ro", "/", "--chdir", str(cwd), "--", *words]


@functools.cache
def available() -> Sandbox:
    """The strongest sandbox that this machine allows, found by trying."""
    for sandbox in (Sandbox("bubblewrap"), Sandbox("no network")):
        tool = "bwrap" if sandbox.hermetic else "unshare"
        if shutil.which(tool):
            try:
                run(sandbox.command(["true"], writable={}, readable={}, cwd=Path("/")), timeout=20)
            except ProgramFailed:
                continue
            return sandbox
    return Sandbox("none")


def choose(choice: str) -> Sandbox:
    """The sandbox that ``sandbox=`` asks for.

    Raises:
        VoltforgeError: the choice is unknown, or ``require`` where bubblewrap cannot run.
    """
    if choice not in CHOICES:
        raise VoltforgeError(f"sandbox={choice} is no choice", hint=f"one of {', '.join(CHOICES)}")
    if choice == "off":
        return Sandbox("none")
    sandbox = available()
    if choice == "require" and not sandbox.hermetic:
        raise VoltforgeError(
            "sandbox=require, but bubblewrap cannot make a namespace here",
            hint="apt-get install bubblewrap, and allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)",
        )
    return sandbox


def obstacle(work: Path, readable: Mapping[str, Path]) -> str:
    """Why :meth:`Sandbox.shown` cannot move folders from ``work`` or link the others; empty if it can, as was tried."""
    try:
        with _root():
            files.write_json(ROOT / MOVED, {"probe": ""})
            try:
                _try(work, readable, ROOT / "probe")
            finally:
                _give_back()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _try(work: Path, readable: Mapping[str, Path], probe: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as empty:
        Path(empty).rename(probe)
    for name, real in readable.items():
        found = (path for path in real.rglob("*") if path.is_file() and not path.is_symlink())
        if one := next(found, None):
            os.link(one, probe / name)


def recover(work: Path) -> None:
    """Give back what a killed run moved away from ``work``."""
    origins = (files.read_json(ROOT / MOVED) or {}).values()
    if any(origin and Path(origin).is_relative_to(work.absolute()) for origin in origins):
        with contextlib.suppress(OSError), _root():  # who looks on its own account at what else is there
            pass


@contextlib.contextmanager
def _root() -> Iterator[None]:
    """:data:`ROOT` for this process alone, made and empty; what a killed run left there is given back first.

    Raises:
        OSError: it cannot be made, belongs to another, or holds something else.
    """
    if not os.access(ROOT if ROOT.exists() else ROOT.parent, os.W_OK):  # no reason to wait, then
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ROOT)
    with _locked(ROOT.parent):  # not itself, so that it can be removed
        ROOT.mkdir(exist_ok=True)
        try:
            if ROOT.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EACCES, "it belongs to another user", ROOT)
            if (ROOT / MOVED).exists():
                _wait_for_the_orphaned()
                _give_back()
            if strangers := [name for name in os.listdir(ROOT) if not name.startswith(f".{MOVED}")]:
                raise FileExistsError(errno.EEXIST, f"{strangers[0]} is there", ROOT)
            yield
        finally:
            with contextlib.suppress(OSError):
                ROOT.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(f"waiting for another build at {ROOT}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _wait_for_the_orphaned() -> None:
    """A run that was killed could not end its compilers; they would write into the next build's folders."""
    told = False
    while pids := [
        one.pid for one in psutil.process_iter(["cwd"]) if Path(one.info["cwd"] or "/").is_relative_to(ROOT)
    ]:
        if not told:
            console.note(f"waiting for what a killed build left running at {ROOT}: {', '.join(map(str, pids))}")
        told = True
        time.sleep(0.2)


def _give_back() -> None:
    """Move each folder of the note back, if its place is free; else remove it, as the copies."""
    for name, origin in (files.read_json(ROOT / MOVED) or {}).items():
        if not (ROOT / name).exists():
            continue
        if origin and Path(origin).parent.is_dir() and not os.path.lexists(origin):
            (ROOT / name).rename(origin)
        else:
            files.remove(ROOT / name)
    (ROOT / MOVED).unlink(missing_ok=True)


def _copy(real: Path, place: Path) -> None:
    """Copy a folder by links: CMake looks for the real path of folders, and gcc for that of headers.

    Those of compilers are symbolic, for the toolchain knows them by their ctime, which a hard link changes.
    """

    def link(source: str, target: str) -> None:
        compiler = str(Path(source).relative_to(real)) in COMPILERS
        (os.symlink if compiler else os.link)(source, target)

    shutil.copytree(real, place, symlinks=True, copy_function=link)
