"""The device images in a binary: the GPUs that it has machine code for.

nvcc writes a container (a "fatbin") for each translation unit into the section ``.nv_fatbin``, one after another, and
in each container an entry for each image. NVIDIA documents no layout beyond ``fatbinary_section.h``. This one was
worked out from files of nvcc 12.4, 12.8, 12.9 and 13.0, and agrees with cuobjdump on all of them::

    container  u32 magic 0xBA55ED50, u16 version 1, u16 header size, u64 size of all entries
    entry      u16 kind, u16 version, u32 header size, u64 payload size,
               u32 compressed size, u32, u16 minor, u16 major, u32 architecture,
               u32 name offset, u32 name size, u64 flags, u64, u64 uncompressed size
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voltforge.binary.elf import open_elf, section_bytes
from voltforge.errors import VoltforgeError

SECTIONS = {".nv_fatbin": False, "__nv_relfatbin": True}
"""Sections with containers, and whether their images are relocatable: only nvlink can make those loadable."""

_CONTAINER = struct.Struct("<IHHQ")
_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
_KINDS: dict[int, Literal["ptx", "cubin"]] = {1: "ptx", 2: "cubin"}
_LZ4, _ZSTD = 0x2000, 0x8000
_VARIANTS = {0x100000: "a", 0x200000: "f"}
_ALIGNMENT = 8
_ZEROS = re.compile(rb"\0+")
_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
_NAME = re.compile(rb"_Z[\w.$]+(?=\0)", re.ASCII)


class FatbinError(VoltforgeError):
    """Device code with an unknown layout."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"the device code of {path} at byte {offset:#x} {why}")
        self.path = path
        self.offset = offset
        """The offset in the file, in bytes."""
        self.why = why


@dataclass(frozen=True)
class Image:
    """One device image: the machine code (cubin) or PTX of one translation unit for one architecture."""

    path: Path
    kind: Literal["cubin", "ptx"]
    arch: int
    """The compute capability times ten: 70 for 7.0."""
    variant: str
    """``a`` for code of exactly this architecture (``sm_90a``), ``f`` for its family, else empty."""
    container: int
    """The number of its container in its section, from 0; a translation unit has one container."""
    begin: int
    """The offset of its header in the file, in bytes; its payload ends the entry."""
    offset: int
    """The offset of its payload in the file, in bytes."""
    size: int
    """The payload's size as stored, padding included, in bytes."""
    uncompressed: int
    """The image's size when loaded, in bytes; it can include padding."""
    compressed: bool
    """True if the payload is compressed, with LZ4 or, by newer compilers, zstd."""
    relocatable: bool
    """True for an unlinked piece (``nvcc -rdc=true``), which no driver can load."""

    @property
    def name(self) -> str:
        """The name that NVIDIA's tools use: ``sm_70``, ``sm_90a``, ``compute_80``."""
        return f"{'sm' if self.kind == 'cubin' else 'compute'}_{self.arch}{self.variant}"

    def sha256(self) -> str:
        """The hexadecimal SHA-256 of the payload as stored."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            with memoryview(content) as view:
                digest.update(view[self.offset : self.offset + self.size])
        return digest.hexdigest()


@dataclass(frozen=True)
class Container:
    """A fatbin: the device images of one translation unit, one after another."""

    offset: int
    """The offset in the file, in bytes."""
    header: int
    """The size of its header, in bytes."""
    size: int
    """The size of header and entries, in bytes."""
    relocatable: bool
    """True if it holds unlinked pieces."""
    images: tuple[Image, ...]


def image_names(archs: Iterable[str]) -> frozenset[str]:
    """Return the names of the images that an architecture list means: ``9.0a+PTX`` for ``sm_90a`` and ``compute_90a``.

    Raises:
        VoltforgeError: an entry is not an architecture.
    """
    names = set()
    for text in archs:
        match = _ARCH.fullmatch(text)
        if not match:
            raise VoltforgeError(f"{text!r} is not an architecture", hint="write it as 7.0, 9.0a or 7.0+PTX")
        major, minor, variant, ptx = match.groups()
        names |= {f"{prefix}_{major}{minor}{variant}" for prefix in (["sm", "compute"] if ptx else ["sm"])}
    return frozenset(names)


def capability(name: str) -> int:
    """Return the compute capability times ten of an image's name: 90 for ``sm_90a``."""
    return int(name.split("_")[1].rstrip("af"))


def images(path: Path) -> list[Image]:
    """Return the device images of an ELF file, in file order; none if it has no device code.

    Only headers are read: the time depends on the number of images, not on the size of the file.

    Raises:
        ElfError: ``path`` is not a well-formed ELF file.
        FatbinError: its device code has an unknown layout.
    """
    return [image for container in containers(path) for image in container.images]


def containers(path: Path) -> list[Container]:
    """Return the fatbins of an ELF file, in file order; see :func:`images`.

    Raises:
        ElfError: ``path`` is not a well-formed ELF file.
        FatbinError: its device code has an unknown layout.
    """
    with open_elf(path) as (file, content):
        fatbins: list[Container] = []
        total = 0
        for section in file.iter_sections():
            if section.name in SECTIONS:
                begin, size = section["sh_offset"], section["sh_size"]
                if begin + size > len(content):
                    raise FatbinError(path, begin, "ends beyond the file")
                if (total := total + size) > len(content):
                    raise FatbinError(path, begin, "overlaps another section with device code")
                fatbins += _containers(path, content, begin, begin + size, SECTIONS[section.name])
        return fatbins


def kernels(path: Path) -> frozenset[str]:
    """Return the mangled names of the kernels and device variables that a host binary launches or copies to.

    The CUDA runtime finds a kernel by its mangled C++ name (``__cudaRegisterFunction``), so the host's read-only data
    contains this name, stripped or compressed or not. Little else there begins with ``_Z``: names of C++ types are
    stored without it, but a compiler such as libnvrtc holds some. A string has a zero before it or, directly after a
    table, gcc's alignment of eight. A kernel declared ``extern "C"`` is not found.

    Raises:
        ElfError: ``path`` is not a well-formed ELF file.
    """
    with open_elf(path) as (file, _):
        section = file.get_section_by_name(".rodata")
        if section is None:
            return frozenset()
        content, address = section_bytes(section), section["sh_addr"]
        return frozenset(
            name[0].decode()
            for name in _NAME.finditer(content)
            if (address + name.start()) % 8 == 0 or content[name.start() - 1] == 0
        )


def _containers(path: Path, content: mmap.mmap, begin: int, end: int, relocatable: bool) -> Iterator[Container]:
    number, at = 0, begin
    while at < end:
        padding = _ZEROS.match(content, at, end)
        if padding and padding.end() - at >= _ALIGNMENT:
            at += (padding.end() - at) // _ALIGNMENT * _ALIGNMENT  # padding that the linker puts between two units
            continue
        if at + _CONTAINER.size > end:
            raise FatbinError(path, at, "is cut short within a container's header")
        magic, version, header, size = _CONTAINER.unpack_from(content, at)
        if magic != _MAGIC:
            raise FatbinError(path, at, f"is not a container: it begins with {magic:#010x}, not {_MAGIC:#010x}")
        if version != 1 or header < _CONTAINER.size:
            raise FatbinError(path, at, f"is a container of version {version}, which is not supported")
        if at + header + size > end:
            raise FatbinError(path, at, "is a container that ends beyond its section")
        entries = tuple(_entries(path, content, at + header, at + header + size, number, relocatable))
        yield Container(at, header, header + size, relocatable, entries)
        # Reading a header can map megabytes around it, which would count as used memory.
        content.madvise(mmap.MADV_DONTNEED)
        number += 1
        at += header + size


def _entries(
    path: Path, content: mmap.mmap, begin: int, end: int, container: int, relocatable: bool
) -> Iterator[Image]:
    at = begin
    while at < end:
        if at + _ENTRY.size > end:
            raise FatbinError(path, at, "is cut short within an image's header")
        kind, _, header, size, packed, _, _, _, arch, _, _, flags, _, uncompressed = _ENTRY.unpack_from(content, at)
        if header < _ENTRY.size or at + header + size > end:
            raise FatbinError(path, at, "is an image that ends beyond its container")
        if kind not in _KINDS:
            raise FatbinError(path, at, f"is an image of kind {kind}, which is not supported")
        compressed = bool(flags & (_LZ4 | _ZSTD))
        if compressed != bool(packed) or packed > size:
            raise FatbinError(path, at, "is an image whose compressed size contradicts its flags")
        yield Image(
            path=path,
            kind=_KINDS[kind],
            arch=arch,
            variant="".join(letter for flag, letter in _VARIANTS.items() if flags & flag),
            container=container,
            begin=at,
            offset=at + header,
            size=size,
            uncompressed=uncompressed if compressed else size,
            compressed=compressed,
            relocatable=relocatable,
        )
        at += header + size
