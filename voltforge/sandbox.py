"""What a build can see: its tree, environment and toolchain at fixed paths, a read-only system, no network."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.process import ProgramFailed, run

CHOICES = ("auto", "require", "off")
ROOT = Path("/build")
"""Where a sandboxed build finds its folders: nvcc writes a hash of the path into device code, so it must not vary."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/gnu")
"""The parts of the machine that compilers and interpreters live in, shown read-only where they exist."""


@dataclass(frozen=True)
class Sandbox:
    """One way to run a build: with a view of its own, or only without the network, or as it is."""

    kind: str
    """``bubblewrap``, ``no network`` (util-linux's unshare) or ``none``."""

    @property
    def hermetic(self) -> bool:
        """Whether a build sees only what was declared."""
        return self.kind == "bubblewrap"

    def place(self, name: str, real: Path) -> Path:
        """Where the build will see the folder ``real``, which it knows as ``name``."""
        return ROOT / name if self.hermetic else real

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
            return [*_unshare(), *words]
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


def _unshare() -> list[str]:
    return ["unshare", "--user", "--map-current-user", "--net", "--"]
