"""The sandbox of a build: fixed paths, a read-only system, no network."""

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
"""The folder under which a build sees its folders. nvcc writes a hash of the path into device code, so it is fixed."""
MOVED = "moved.json"
"""A note in :data:`ROOT` that names the original place of each moved folder; empty for a copy."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/gnu")
"""The parts of the system that compilers and interpreters live in, shown read-only if they exist."""
UNSHARE = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--user", "--map-current-user", "--keep-caps", "--mount", "--net", "--ipc", "--uts"),
    *("--pid", "--fork", "--kill-child", "--"),
)
"""New namespaces by util-linux; everything inside ends with the process that started it."""
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
"""The script that runs first inside: it shows the machine as it is, with the folders at :data:`ROOT`.

Its arguments are ROOT, each folder and its place, ``--``, the working directory and the program. The new root is
assembled at /sys, which every machine has and no build needs. The kernel refuses a new /proc where parts of it are
hidden, as in containers.
"""


@dataclass(frozen=True)
class Sandbox:
    """A way to run a build: fully isolated, without network only, or without isolation."""

    kind: str
    """``bubblewrap``, ``no network`` (util-linux's unshare) or ``none``."""
    moves: bool = False
    """With ``none``: whether the build's folders are moved to :data:`ROOT` while it runs."""

    @property
    def hermetic(self) -> bool:
        """True if a build sees only its declared inputs."""
        return self.kind == "bubblewrap"

    def place(self, name: str, real: Path) -> Path:
        """Return the path at which the build sees the folder ``real`` named ``name``."""
        return real if self.kind == "none" and not self.moves else ROOT / name

    @contextlib.contextmanager
    def shown(self, writable: Mapping[str, Path], readable: Mapping[str, Path]) -> Iterator[None]:
        """Keep the folders at their places for the length of the block, where that needs more than a mount.

        Writable folders are moved there and back. The others can be in use elsewhere and are copied by links.
        Concurrent builds take turns.

        Raises:
            OSError: a folder cannot be moved or copied; all are back at their original places.
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
        """Return ``argv`` wrapped to run inside.

        The folders have the names that :meth:`place` knows; ``cwd`` is a path inside.
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
        for interpreter in {
            Path(sys.base_prefix),
            Path(sys.base_prefix).resolve(),
        }:
            if not any(interpreter.is_relative_to(folder) for folder in SYSTEM):
                view += ["--ro-bind", str(interpreter), str(interpreter)]
        for option, folders in (("--ro-bind", readable), ("--bind", writable)):
            for name, real in folders.items():
                view += [option, str(real.absolute()), str(self.place(name, real))]
        return [*view, "--remount-ro", "/", "--chdir", str(cwd), "--", *words]


@functools.cache
def available() -> Sandbox:
    """Return the strongest sandbox that works on this machine, by trying them."""
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
    """Return the sandbox for ``sandbox=``.

    Raises:
        VoltforgeError: the choice is unknown, or it is ``require`` and bubblewrap does not work.
    """
    if choice not in CHOICES:
        raise VoltforgeError(f"sandbox={choice} is not a valid choice", hint=f"one of {', '.join(CHOICES)}")
    if choice == "off":
        return Sandbox("none")
    sandbox = available()
    if choice == "require" and not sandbox.hermetic:
        raise VoltforgeError(
            "sandbox=require: bubblewrap cannot create a namespace here",
            hint="apt-get install bubblewrap, and allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)",
        )
    return sandbox


def obstacle(work: Path, readable: Mapping[str, Path]) -> str:
    """Return why :meth:`Sandbox.shown` cannot move folders from ``work`` or link the others; empty if it can, by
    trying.
    """
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
    """Move folders back to ``work`` that a killed run left at :data:`ROOT`."""
    origins = (files.read_json(ROOT / MOVED) or {}).values()
    if any(origin and Path(origin).is_relative_to(work.absolute()) for origin in origins):
        with contextlib.suppress(OSError), _root():  # the caller reports foreign files itself
            pass


@contextlib.contextmanager
def _root() -> Iterator[None]:
    """Create :data:`ROOT`, empty, for this process alone. Folders that a killed run left there are moved back first.

    Raises:
        OSError: it cannot be created, belongs to another user, or holds foreign files.
    """
    if not os.access(ROOT if ROOT.exists() else ROOT.parent, os.W_OK):  # no killed run left anything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ROOT)
    with _locked(ROOT.parent):  # flock a neighbour of ROOT, so that ROOT can be removed
        ROOT.mkdir(exist_ok=True)
        try:
            if ROOT.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EACCES, "it belongs to another user", ROOT)
            if (ROOT / MOVED).exists():
                _wait_for_the_orphaned()
                _give_back()
            if strangers := [name for name in os.listdir(ROOT) if not name.startswith(f".{MOVED}")]:
                raise FileExistsError(errno.EEXIST, f"{strangers[0]} exists there", ROOT)
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
    """Wait for compilers that survived a killed run: they would write into the folders of the next build."""
    told = False
    while pids := [
        one.pid for one in psutil.process_iter(["cwd"]) if Path(one.info["cwd"] or "/").is_relative_to(ROOT)
    ]:
        if not told:
            console.note(f"waiting for processes of a killed build at {ROOT}: {', '.join(map(str, pids))}")
        told = True
        time.sleep(0.2)


def _give_back() -> None:
    """Move each folder of the note back if its original place is free; remove it otherwise, and remove copies."""
    for name, origin in (files.read_json(ROOT / MOVED) or {}).items():
        if not (ROOT / name).exists():
            continue
        if origin and Path(origin).parent.is_dir() and not os.path.lexists(origin):
            (ROOT / name).rename(origin)
        else:
            files.remove(ROOT / name)
    (ROOT / MOVED).unlink(missing_ok=True)


def _copy(real: Path, place: Path) -> None:
    """Copy a folder by links: CMake resolves the real path of folders, and gcc that of headers.

    Links to compilers are symbolic, because the toolchain is recognized by their ctime, which a hard link changes.
    """

    def link(source: str, target: str) -> None:
        compiler = str(Path(source).relative_to(real)) in COMPILERS
        (os.symlink if compiler else os.link)(source, target)

    shutil.copytree(real, place, symlinks=True, copy_function=link)
