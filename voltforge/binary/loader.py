"""Find the libraries and symbols of a binary as the dynamic loader does (ld.so(8)), without loading anything."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from voltforge.binary.elf import Elf, Symbol
from voltforge.system.process import run


@dataclass(frozen=True)
class Resolution:
    """What the dynamic linker would make of a binary's needs."""

    missing: tuple[str, ...]
    """Libraries that it names and that are found nowhere."""
    lent: tuple[str, ...]
    """Libraries that are found only because something else has loaded them first."""
    beyond: tuple[tuple[str, str], ...]
    """Libraries found nowhere that another library names, as that library's name and the missing one's."""
    unresolved: tuple[Symbol, ...]
    """Symbols that none of the found libraries offers."""


@dataclass(frozen=True)
class Loader:
    """Finds libraries and symbols as ld.so(8) does, without loading anything.

    The caller's LD_LIBRARY_PATH is ignored: what only it makes work, works on this machine only.
    """

    site: Path
    """The site-packages folder that the binaries are installed in, or will be."""
    staged: Path | None = None
    """An unpacked wheel, looked into as if it were installed in ``site``."""
    program: Path | None = None
    """The interpreter: it and what it needs offer their symbols to everything that it loads."""
    lent: tuple[Path, ...] = ()
    """Folders whose libraries the process will have loaded already, whoever needs them."""
    last: tuple[Path, ...] = ()
    """Folders to look into after those of the system, such as one with a stub of the driver."""
    _files: dict[Path, Elf] = field(default_factory=dict, repr=False)

    def resolve(self, member: str) -> Resolution:
        """Look for all that a binary needs; the search goes on until every symbol is found.

        Args:
            member: the binary's path inside ``site``.

        Raises:
            ElfError: the binary, or a library that was found, is malformed.
        """
        binary = _Loaded(self.site / member, self._elf(self.site / member))
        unresolved = set(binary.elf.undefined) - binary.elf.defined
        missing, lent, beyond = [], [], []
        seen = set()
        queue = deque([binary])
        if self.program:
            # Its link is followed as the kernel does, so that its $ORIGIN is where it really is.
            queue.append(_Loaded(self.program.resolve(), self._elf(self.program.resolve())))
        while queue:
            loaded = queue.popleft()
            if loaded is not binary:
                unresolved -= {symbol for symbol in unresolved if _offers(loaded.elf, symbol)}
                if not unresolved:
                    break
            for name in loaded.elf.needed:
                if name in seen:
                    continue
                seen.add(name)
                path, is_lent = self._find(name, loaded)
                if path:
                    queue.append(_Loaded(path, self._elf(path), loaded.passed_on()))
                if loaded is binary:
                    missing += [] if path else [name]
                    lent += [name] if is_lent else []
                elif not path:
                    beyond.append((loaded.path.name, name))
        return Resolution(tuple(missing), tuple(lent), tuple(beyond), tuple(sorted(unresolved, key=str)))

    def _find(self, name: str, loaded: _Loaded) -> tuple[Path | None, bool]:
        for folder in loaded.search():
            if self._at(folder / name).is_file():
                return folder / name, False
        if found := system_libraries().get(name):
            return found, False
        for folder in self.last:
            if (folder / name).is_file():
                return folder / name, False
        for folder in self.lent:
            if self._at(folder / name).is_file():
                return folder / name, True
        return None, False

    def _at(self, path: Path) -> Path:
        """Where a file lies now that will lie at ``path``."""
        if self.staged and path.is_relative_to(self.site):
            staged = self.staged / path.relative_to(self.site)
            if staged.is_file():
                return staged
        return path

    def _elf(self, path: Path) -> Elf:
        if path not in self._files:
            self._files[path] = Elf.read(self._at(path))
        return self._files[path]


@dataclass(frozen=True)
class _Loaded:
    """A file in a process, and what its place in the chain of loaders gives it."""

    path: Path
    elf: Elf
    inherited: tuple[Path, ...] = ()
    """Folders from the RPATHs of those that loaded it."""

    def search(self) -> tuple[Path, ...]:
        """The folders of ld.so(8) that depend on who asks: RUNPATH, or without one every RPATH up the chain."""
        return self._expanded(self.elf.runpath) if self.elf.runpath else self.passed_on()

    def passed_on(self) -> tuple[Path, ...]:
        own = () if self.elf.runpath else self._expanded(self.elf.rpath)
        return (*own, *self.inherited)

    def _expanded(self, entries: tuple[str, ...]) -> tuple[Path, ...]:
        origin = str(self.path.parent)
        names = (entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for entry in entries)
        return tuple(Path(os.path.normpath(name)) for name in names)


@functools.cache
def system_libraries() -> dict[str, Path]:
    """The libraries that the system offers to every program, by SONAME: what ``ldconfig -p`` lists."""
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin")
    if not ldconfig:
        return {}
    abi = {"x86_64": "x86-64", "aarch64": "AArch64"}.get(platform.machine(), "")
    found: dict[str, Path] = {}
    for line in run([ldconfig, "-p"]).output.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        soname, _, kind = name.partition(" ")
        if arrow and abi in kind:
            found.setdefault(soname, Path(path))
    return found


def _offers(elf: Elf, symbol: Symbol) -> bool:
    # A library without versions serves any version, and a symbol asked for without one takes any (dl-lookup.c).
    if symbol in elf.defined:
        return True
    if symbol.version is None:
        return symbol.name in elf.names
    return Symbol(symbol.name, None) in elf.defined


def link_libraries(folder: Path) -> None:
    """Give the shared libraries in a folder the names that linkers look for (ld(1), -l): ``libx.so`` for ``.so.1``.

    A name that is taken stays as it is.
    """
    for library in sorted(folder.glob("lib*.so.*")):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
