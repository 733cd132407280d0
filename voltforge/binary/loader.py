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
    """The result of loading a binary, as the dynamic linker would do it."""

    missing: tuple[str, ...]
    """Needed libraries that were not found."""
    preloaded: tuple[str, ...]
    """Libraries that were found only because another library has loaded them before."""
    missing_indirect: tuple[tuple[str, str], ...]
    """Libraries needed by other libraries and not found, as pairs of the needing and the missing library."""
    unresolved: tuple[Symbol, ...]
    """Symbols that no found library provides."""


@dataclass(frozen=True)
class Loader:
    """A search for libraries and symbols by the rules of ld.so(8), without loading anything.

    The caller's LD_LIBRARY_PATH is ignored, because it differs from machine to machine.
    """

    site: Path
    """The site-packages folder of the binaries."""
    staged: Path | None = None
    """An unpacked wheel, searched as if it were installed in ``site``."""
    program: Path | None = None
    """The interpreter: it and its libraries provide their symbols to everything that it loads."""
    preloaded: tuple[Path, ...] = ()
    """Folders with libraries that the process has loaded before."""
    fallback: tuple[Path, ...] = ()
    """Folders to search after those of the system, such as one with a stub of the driver."""
    _files: dict[Path, Elf] = field(default_factory=dict, repr=False)

    def resolve(self, member: str) -> Resolution:
        """Search for everything that a binary needs.

        Args:
            member: the binary's path inside ``site``.

        Raises:
            ElfError: the binary, or a found library, is malformed.
        """
        binary = _Loaded(self.site / member, self._elf(self.site / member))
        unresolved = set(binary.elf.undefined) - binary.elf.defined
        missing, preloaded, missing_indirect = [], [], []
        seen = set()
        queue = deque([binary])
        if self.program:
            # The kernel resolves the link, so $ORIGIN is the real folder.
            queue.append(_Loaded(self.program.resolve(), self._elf(self.program.resolve())))
        while queue:
            loaded = queue.popleft()
            if loaded is not binary:
                unresolved -= {symbol for symbol in unresolved if _provides(loaded.elf, symbol)}
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
                    preloaded += [name] if is_lent else []
                elif not path:
                    missing_indirect.append((loaded.path.name, name))
        return Resolution(tuple(missing), tuple(preloaded), tuple(missing_indirect), tuple(sorted(unresolved, key=str)))

    def _find(self, name: str, loaded: _Loaded) -> tuple[Path | None, bool]:
        for folder in loaded.search():
            if self._present_path(folder / name).is_file():
                return folder / name, False
        if library := system_libraries().get(name):
            return library, False
        for folder in self.fallback:
            if (folder / name).is_file():
                return folder / name, False
        for folder in self.preloaded:
            if self._present_path(folder / name).is_file():
                return folder / name, True
        return None, False

    def _present_path(self, path: Path) -> Path:
        """Return the present path of the file that will be at ``path``."""
        if self.staged and path.is_relative_to(self.site):
            staged = self.staged / path.relative_to(self.site)
            if staged.is_file():
                return staged
        return path

    def _elf(self, path: Path) -> Elf:
        if path not in self._files:
            self._files[path] = Elf.read(self._present_path(path))
        return self._files[path]


@dataclass(frozen=True)
class _Loaded:
    """A file in a process, with its position in the chain of loading files."""

    path: Path
    elf: Elf
    inherited: tuple[Path, ...] = ()
    """Folders from the RPATHs of the files that loaded it."""

    def search(self) -> tuple[Path, ...]:
        """Return the folders that depend on the loading file: its RUNPATH, or every RPATH up the chain."""
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
    """Return the libraries that the system provides to every program, by SONAME, as ``ldconfig -p`` lists them."""
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin")
    if not ldconfig:
        return {}
    abi = {"x86_64": "x86-64", "aarch64": "AArch64"}.get(platform.machine(), "")
    libraries: dict[str, Path] = {}
    for line in run([ldconfig, "-p"]).output.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        soname, _, kind = name.partition(" ")
        if arrow and abi in kind:
            libraries.setdefault(soname, Path(path))
    return libraries


def _provides(elf: Elf, symbol: Symbol) -> bool:
    # A library without versions provides any version, and a symbol without a version accepts any (dl-lookup.c).
    if symbol in elf.defined:
        return True
    if symbol.version is None:
        return symbol.name in elf.names
    return Symbol(symbol.name, None) in elf.defined


def link_libraries(folder: Path) -> None:
    """Add links with the names that linkers search (ld(1), -l): ``libx.so`` for ``libx.so.1``.

    Existing names are kept.
    """
    for library in sorted(folder.glob("lib*.so.*")):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
