"""The sandbox of a build: fixed paths, a read-only system, no network."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.compile import fixed_paths
from voltforge.errors import VoltforgeError
from voltforge.system.process import ProgramFailed, run

CHOICES = ("auto", "require", "off")
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
"""The script that runs first inside: it shows the machine as it is, with the folders at their fixed paths.

Its arguments are ``fixed_paths.ROOT``, each folder and its place, ``--``, the working directory and the program. The
new root is assembled at /sys, which every machine has and no build needs. The kernel refuses a new /proc where parts of
it are hidden, as in containers.
"""


@dataclass(frozen=True)
class Sandbox:
    """A way to run a build: fully isolated, without network only, or without isolation."""

    kind: str
    """``bubblewrap``, ``no network`` (util-linux's unshare) or ``none``."""
    moves: bool = False
    """With ``none``: true if the build's folders are moved to their fixed paths while it runs."""

    @property
    def hermetic(self) -> bool:
        """True if a build sees only its declared inputs."""
        return self.kind == "bubblewrap"

    def place(self, name: str, real: Path) -> Path:
        """Return the path at which the build sees the folder ``real`` named ``name``."""
        return real if self.kind == "none" and not self.moves else fixed_paths.ROOT / name

    def in_place(
        self, writable: Mapping[str, Path], readable: Mapping[str, Path]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the folders are at their places, where that needs more than a mount.

        Raises:
            OSError: on entry, if a folder cannot be moved or copied.
        """
        return fixed_paths.moved(writable, readable) if self.moves else contextlib.nullcontext()

    def command(
        self, argv: Sequence[str | Path], *, writable: Mapping[str, Path], readable: Mapping[str, Path], cwd: Path
    ) -> list[str]:
        """Return ``argv`` wrapped to run inside.

        The keys of ``writable`` and ``readable`` are the names for :meth:`place`; ``cwd`` is a path inside.
        """
        words = [str(word) for word in argv]
        if self.kind == "none":
            return words
        if self.kind == "no network":
            binds = [(real.absolute(), self.place(name, real)) for name, real in {**readable, **writable}.items()]
            arguments = [str(fixed_paths.ROOT), *(str(path) for bind in binds for path in bind), "--", str(cwd)]
            return [*UNSHARE, "sh", "-c", VIEW, "view", *arguments, *words]
        view = ["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        view += ["--hostname", "build"]
        for folder in SYSTEM:
            if Path(folder).is_symlink():
                view += ["--symlink", str(Path(folder).readlink()), folder]
            elif Path(folder).is_dir():
                view += ["--ro-bind", folder, folder]
        view += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/tmp/home"]
        for interpreter in {Path(sys.base_prefix), Path(sys.base_prefix).resolve()}:
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
        raise VoltforgeError(
            f"sandbox={choice} is not a valid choice", hint=" or ".join(f"sandbox={name}" for name in CHOICES)
        )
    if choice == "off":
        return Sandbox("none")
    sandbox = available()
    if choice == "require" and not sandbox.hermetic:
        raise VoltforgeError(
            "sandbox=require: bubblewrap cannot create a namespace here",
            hint="apt-get install bubblewrap, and allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)",
        )
    return sandbox
