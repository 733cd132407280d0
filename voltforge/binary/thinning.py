"""Remove unwanted device images from a shared object, and make the file smaller; everything else stays.

nvcc registers each container of ``.nv_fatbin`` through a wrapper in ``.nvFatBinSegment`` (``fatbinary_section.h``)::

    u32 magic 0x466243B1, u32 version 1, u64 address of the container, u64 0

The dynamic linker fills in the address, by an R_X86_64_RELATIVE relocation. So the remaining entries are packed
together at the beginning of the section, the relocations' addends follow their containers, and the load segment is
split behind them. Every other address stays, and the rest of the file moves forward by whole pages (gABI, chapter 5:
offset and address of a load segment are congruent modulo its alignment).

A file with any other reference into the section in its tables is refused. The tables cannot show whether an instruction
addresses a container by its distance; nvcc generates no such instruction.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from voltforge.binary import fatbin
from voltforge.binary.elf import ElfError, open_elf, section_bytes
from voltforge.binary.fatbin import Container, FatbinError, Image
from voltforge.errors import VoltforgeError
from voltforge.system import files

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

_CODE, _WRAPPERS = ".nv_fatbin", ".nvFatBinSegment"
_X86_64, _SHARED = "EM_X86_64", "ET_DYN"

_WRAPPER = struct.Struct("<IIQQ")
_WRAPPER_MAGIC = 0x466243B1
_ADDRESS = 8
"""The offset of the container's address in a wrapper, and the size of an address."""
_SEGMENT = struct.Struct("<IIQQQQQQ")
"""Elf64_Phdr (elf(5))."""
_LOAD, _DYNAMIC, _NOTE, _PROPERTY = 1, 2, 4, 0x6474E553
_SECTION_OFFSET, _SECTION_SIZE = 24, 32
"""The offsets of sh_offset and sh_size in an Elf64_Shdr."""
_TABLES_AT = {32: "e_phoff", 40: "e_shoff"}
"""The offsets of table positions in an Elf64_Ehdr."""
_HEADER_SIZES = {"e_ehsize": 64, "e_phentsize": _SEGMENT.size, "e_shentsize": 64}
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_VALUE = 8
_TLS, _NOWHERE = 6, {0, 0xFFF1}
"""STT_TLS, whose value is not an address, and SHN_UNDEF and SHN_ABS."""
_TAG = struct.Struct("<QQ")
_RELA = struct.Struct("<QQQ")
_RELA_ADDEND = 16
_SYMBOLIC, _RELATIVE, _INDIRECT = 1, 8, 37
"""R_X86_64_64, R_X86_64_RELATIVE and R_X86_64_IRELATIVE (psABI, table 4.10)."""
_DT_PLTRELSZ, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_RELAENT, _DT_PLTREL, _DT_JMPREL = 2, 6, 7, 8, 9, 20, 23
_OTHER_RELOCATIONS = {17: "DT_REL", 36: "DT_RELR", 0x6FFFFFF1: "DT_ANDROID_RELA"}
_POINTERS = {3, 4, 5, 6, 7, 12, 13, 17, 23, 25, 26, 32, 34, 36} | {
    0x6FFFFEF5, 0x6FFFFEF6, 0x6FFFFEF7, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFE,
}  # fmt: skip
"""Tags of the dynamic section whose values are addresses (gABI, figure 5-10, and elf.h of glibc)."""
_ALIGNMENT = 8
_PAGE = 0x1000
"""The smallest page of x86-64, in which the dynamic linker maps segments."""


class ThinError(VoltforgeError):
    """A file that cannot be thinned, because a part of it is not understood or would be lost."""

    def __init__(self, path: Path, why: str, offset: int | None = None, *, hint: str = "") -> None:
        subject = "it" if offset is None else f"the data at byte {offset:#x}"
        super().__init__(f"{path} cannot be thinned: {subject} {why}", hint=hint)
        self.path = path
        self.offset = offset
        """The offset in the file, in bytes; ``None`` if it concerns the whole file."""
        self.why = why


@dataclass(frozen=True)
class Thinned:
    """The result of thinning a file."""

    kept: int
    """The remaining device images."""
    removed: int
    before: int
    """The file's size in bytes."""
    after: int


def thin_binary(path: Path, out: Path, archs: Iterable[str], *, drop_foreign: bool = False) -> Thinned:
    """Write the shared object ``path`` to ``out`` (which may be ``path``) with the device images of ``archs`` only.

    Args:
        path: a shared object for x86-64 with linked device code; one without device code is copied.
        out: written completely or not at all.
        archs: as in recipes: ``7.0``, ``9.0a``, ``7.0+PTX``. Each container must have an image for each capability;
            variants of one capability (``9.0`` and ``9.0a``) replace each other.
        drop_foreign: accept a container without an image for some capability. A container without any remaining image
            becomes empty, and its kernels fail as before: there is no kernel image for the device.

    Raises:
        ThinError: an arch has no image in a container, or a part of the file is not understood.
    """
    wanted = fatbin.image_names(archs)
    try:
        with open_elf(path) as (file, content):
            containers = fatbin.containers(path)
            plan = _plan(path, file, content, containers, wanted, drop_foreign) if containers else _Plan()
            with files.replacing(out, stat.S_IMODE(path.stat().st_mode)) as sink:
                plan.write(content, sink)
                after = sink.tell()
            total = sum(len(container.images) for container in containers)
            kept = sum(len(container.kept) for container in plan.containers)
            return Thinned(kept, total - kept, len(content), after)
    except FatbinError as error:
        raise ThinError(path, error.why, error.offset) from error
    except ElfError as error:
        raise ThinError(path, f"is not understood: {error.what}") from error


class _Segment(NamedTuple):
    """An entry of the program header table."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    size: int
    """Bytes in the file."""
    memory: int
    """Bytes in memory; those beyond the file's are zero."""
    alignment: int


@dataclass(frozen=True)
class _Region:
    """The section with the device code."""

    offset: int
    address: int
    size: int
    alignment: int
    number: int
    """The number of the section."""
    segment: int
    """The segment that loads it."""

    @property
    def end(self) -> int:
        """Its end in the file."""
        return self.offset + self.size

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass(frozen=True)
class _Packed:
    """A container at its new place."""

    old: Container
    offset: int
    kept: tuple[Image, ...]

    @property
    def size(self) -> int:
        return self.old.header + sum(image.offset + image.size - image.begin for image in self.kept)

    def pieces(self, content: mmap.mmap) -> Iterator[bytes | tuple[int, int]]:
        body = (self.size - self.old.header).to_bytes(8, "little")
        head = content[self.old.offset : self.old.offset + self.old.header]
        yield head[:8] + body + head[16:]
        for image in self.kept:
            yield image.begin, image.offset + image.size


@dataclass(frozen=True)
class _Plan:
    """The output: the file up to the device code, the remaining containers, and the rest, moved; then edits."""

    region: _Region = _Region(0, 0, 0, 1, 0, 0)
    containers: tuple[_Packed, ...] = ()
    freed: int = 0
    """The bytes by which the rest moves forward: whole pages."""
    edits: dict[int, bytes] = field(default_factory=dict)
    """New bytes by their offset in the original file."""

    def place(self, offset: int) -> int:
        """Return the new offset of a byte outside the device code."""
        return offset if offset < self.region.end else offset - self.freed

    def write(self, content: mmap.mmap, sink: IO[bytes]) -> None:
        _copy(content, 0, self.region.offset, sink)
        for packed in self.containers:
            sink.write(bytes(packed.offset - sink.tell()))
            for piece in packed.pieces(content):
                if isinstance(piece, bytes):
                    sink.write(piece)
                else:
                    _copy(content, *piece, sink)
        sink.write(bytes(self.place(self.region.end) - sink.tell()))
        _copy(content, self.region.end, len(content), sink)
        for offset, data in self.edits.items():
            sink.seek(self.place(offset))
            sink.write(data)
        sink.seek(0, 2)


def _copy(content: mmap.mmap, begin: int, end: int, sink: IO[bytes]) -> None:
    # Release written pages: a mapping of 1 GB would otherwise count as used memory.
    for at in range(begin, end, files.BLOCK):
        sink.write(content[at : min(end, at + files.BLOCK)])
        page = at - at % mmap.PAGESIZE
        content.madvise(mmap.MADV_DONTNEED, page, min(end, at + files.BLOCK) - page)


def _plan(
    path: Path,
    file: ELFFile,
    content: mmap.mmap,
    containers: Sequence[Container],
    wanted: frozenset[str],
    drop_foreign: bool,
) -> _Plan:
    _check_head(path, file)
    segments = [
        _Segment(*_SEGMENT.unpack_from(content, file["e_phoff"] + number * _SEGMENT.size))
        for number in range(file["e_phnum"])
    ]
    region = _region(path, file, len(content), segments)
    packed = tuple(_packed(path, region, containers, wanted, drop_foreign))
    used = packed[-1].offset + packed[-1].size - region.offset
    step = max(_PAGE, *(segment.alignment for segment in segments if segment.kind == _LOAD))
    plan = _Plan(region, packed, (region.size - used) // step * step)
    shift = region.address - region.offset
    moved = {container.old.offset + shift: container.offset + shift for container in packed}
    plan.edits.update(_references(path, file, content, segments, region, moved))
    plan.edits.update(_symbols(path, file, region, moved))
    plan.edits.update(_headers(file, plan, used))
    if plan.freed:
        headers = _split(path, segments, plan, used)
        plan.edits[file["e_phoff"]] = b"".join(_SEGMENT.pack(*segment) for segment in headers)
    return plan


def _check_head(path: Path, file: ELFFile) -> None:
    if file["e_machine"] != _X86_64 or file["e_type"] != _SHARED:
        raise ThinError(path, "is not a shared object for x86-64")
    if any(file[name] != size for name, size in _HEADER_SIZES.items()):
        raise ThinError(path, "has headers of an unknown size")
    if relocatable := [section for section in file.iter_sections() if fatbin.SECTIONS.get(section.name)]:
        raise ThinError(
            path, "is relocatable device code, whose parts refer to each other", relocatable[0]["sh_offset"]
        )


def _region(path: Path, file: ELFFile, end: int, segments: Sequence[_Segment]) -> _Region:
    """Return the section with the device code, if it is alone in the file and in one load segment."""
    sections = list(file.iter_sections())
    numbers = [number for number, section in enumerate(sections) if section.name == _CODE]
    if len(numbers) != 1:
        raise ThinError(path, f"has {len(numbers)} sections {_CODE}, not one")
    header = sections[numbers[0]]
    begin, size, address = header["sh_offset"], header["sh_size"], header["sh_addr"]
    if begin + size > end:
        raise ThinError(path, "is a section that ends beyond the file", begin)
    loading = [
        number
        for number, segment in enumerate(segments)
        if segment.kind == _LOAD and segment.offset <= begin and begin + size <= segment.offset + segment.size
    ]
    if len(loading) != 1 or segments[loading[0]].address - segments[loading[0]].offset != address - begin:
        raise ThinError(
            path,
            f"is {_CODE}, which is not loaded at its address by exactly one segment ({len(loading)} load it)",
            begin,
        )
    for number, segment in enumerate(segments):
        if number != loading[0] and (
            _overlap(segment.offset, segment.size, begin, size)
            or _overlap(segment.address, segment.memory, address, size)
        ):
            raise ThinError(path, f"is in segment {number} too, not only in one that is loaded", begin)
    for number, section in enumerate(sections):
        inside = section["sh_type"] not in {"SHT_NULL", "SHT_NOBITS"} and number != numbers[0]
        if inside and _overlap(section["sh_offset"], section["sh_size"], begin, size):
            raise ThinError(
                path, f"is in section {section.name} as well as in {_CODE}", max(section["sh_offset"], begin)
            )
    for name, (table, count) in {
        "program headers": (file["e_phoff"], len(segments) * _SEGMENT.size),
        "section headers": (file["e_shoff"], len(sections) * 64),
    }.items():
        if _overlap(table, count, begin, size) or table + count > end:
            raise ThinError(path, f"is the table of {name}, which lies in the device code or beyond the file", table)
    alignments = [segment.alignment for segment in segments if segment.kind == _LOAD]
    if any(alignment & (alignment - 1) or alignment < _PAGE for alignment in alignments):
        raise ThinError(path, "has a load segment whose alignment is not a page size")
    return _Region(begin, address, size, max(_ALIGNMENT, header["sh_addralign"]), numbers[0], loading[0])


def _overlap(begin: int, size: int, other: int, length: int) -> bool:
    return begin < other + length and other < begin + size


def _packed(
    path: Path, region: _Region, containers: Sequence[Container], wanted: frozenset[str], drop_foreign: bool
) -> Iterator[_Packed]:
    """Return the containers one after another, each with its remaining entries."""
    variants = {
        capability: sorted(name for name in wanted if fatbin.capability(name) == capability)
        for capability in map(fatbin.capability, wanted)
    }
    at = region.offset
    for number, container in enumerate(containers):
        kept = tuple(image for image in container.images if image.name in wanted)
        for _, names in sorted(variants.items()):
            if container.images and not drop_foreign and not any(image.name in names for image in kept):
                present = ", ".join(dict.fromkeys(image.name for image in container.images))
                raise ThinError(
                    path, f"is container {number}, which has {present} and no {names[-1]}", container.offset
                )
        at += (container.offset - at) % region.alignment
        place = _Packed(container, at, kept)
        inside = at + container.header
        for image in kept:
            if (image.begin - inside) % _ALIGNMENT:
                raise ThinError(path, "is an image that would lose its alignment", image.begin)
            inside += image.offset + image.size - image.begin
        yield place
        at += place.size


def _references(
    path: Path,
    file: ELFFile,
    content: mmap.mmap,
    segments: Sequence[_Segment],
    region: _Region,
    moved: Mapping[int, int],
) -> Iterator[tuple[int, bytes]]:
    """Return the relocations that fill the wrappers, with the containers' new addresses; no other may point there."""
    wrappers, begin, end = _wrappers(path, file, content, segments)
    tags = _dynamic(path, content, segments, region)
    values = _values(path, file, tags)
    unfilled, unused = dict(wrappers), dict(moved)
    for at in _relocations(path, segments, region, tags):
        place, info, addend = _RELA.unpack_from(content, at)
        symbol, kind = info >> 32, info & 0xFFFFFFFF
        if symbol >= len(values):
            raise ThinError(path, "is a relocation by a symbol that does not exist", at)
        target = (values[symbol] + addend) % (1 << 64) if kind == _SYMBOLIC else addend
        if region.holds(place) or region.holds(place + _ADDRESS - 1):
            raise ThinError(path, "is a relocation that writes into the device code", at)
        if begin < place + _ADDRESS and place < end:
            if kind != _RELATIVE or place not in unfilled or target not in unused:
                raise ThinError(path, "is a relocation that does not fill a wrapper with a container of its own", at)
            now = unused.pop(target).to_bytes(_ADDRESS, "little")
            yield at + _RELA_ADDEND, now
            if (offset := unfilled.pop(place)) is not None:
                yield offset, now
        elif kind in {_SYMBOLIC, _RELATIVE, _INDIRECT} and region.holds(target):
            raise ThinError(path, "is a relocation into the device code that is not in a wrapper", at)
    if unfilled:
        raise ThinError(path, "has wrappers that no relocation fills", _offset(path, segments, min(unfilled)))
    if unused:
        raise ThinError(path, "is a container that no wrapper points to", _offset(path, segments, min(unused)))


def _wrappers(
    path: Path, file: ELFFile, content: mmap.mmap, segments: Sequence[_Segment]
) -> tuple[dict[int, int | None], int, int]:
    """Return the places of the addresses in the wrappers, and the ends of their section in memory.

    Some linkers write the addend of a relocation also into its place; such a place has an offset in the file.
    """
    found = [section for section in file.iter_sections() if section.name == _WRAPPERS]
    if len(found) != 1:
        raise ThinError(path, f"has {len(found)} sections {_WRAPPERS}, not one")
    begin, size, offset = found[0]["sh_addr"], found[0]["sh_size"], found[0]["sh_offset"]
    if size % _WRAPPER.size or _offset(path, segments, begin, size) != offset:
        raise ThinError(path, "is not a loaded section of whole wrappers", offset)
    places: dict[int, int | None] = {}
    for at in range(0, size, _WRAPPER.size):
        magic, version, address, more = _WRAPPER.unpack_from(content, offset + at)
        if (magic, version) != (_WRAPPER_MAGIC, 1):
            raise ThinError(
                path, f"is a wrapper {magic:#x} of version {version}, not {_WRAPPER_MAGIC:#x} of version 1", offset + at
            )
        if more:
            raise ThinError(path, "is a wrapper that points to more than one container", offset + at)
        places[begin + at + _ADDRESS] = offset + at + _ADDRESS if address else None
    return places, begin, begin + size


def _dynamic(path: Path, content: mmap.mmap, segments: Sequence[_Segment], region: _Region) -> dict[int, int]:
    """Return the dynamic section's values by tag; for a tag that can occur twice, the last value."""
    tables = [segment for segment in segments if segment.kind == _DYNAMIC]
    if len(tables) != 1 or tables[0].offset + tables[0].size > len(content):
        raise ThinError(path, f"has {len(tables)} dynamic sections, not one whole one")
    tags: dict[int, int] = {}
    begin, whole = tables[0].offset, tables[0].size // _TAG.size * _TAG.size
    for tag, value in _TAG.iter_unpack(content[begin : begin + whole]):
        if not tag:
            break
        if tag in _OTHER_RELOCATIONS:
            raise ThinError(path, f"has relocations that are not supported ({_OTHER_RELOCATIONS[tag]})")
        if tag in _POINTERS and region.holds(value):
            raise ThinError(
                path, f"is a dynamic section whose entry {tag:#x} points into the device code", tables[0].offset
            )
        tags[tag] = value
    return tags


def _values(path: Path, file: ELFFile, tags: Mapping[int, int]) -> list[int]:
    """Return the values of the dynamic symbols."""
    tables = [section for section in file.iter_sections() if section["sh_type"] == "SHT_DYNSYM"]
    if len(tables) != 1 or tables[0]["sh_addr"] != tags.get(_DT_SYMTAB):
        raise ThinError(
            path, f"has {len(tables)} tables of dynamic symbols, not only the one that its dynamic section names"
        )
    data = section_bytes(tables[0])
    return [symbol[4] for symbol in _SYMBOL.iter_unpack(data[: len(data) // _SYMBOL.size * _SYMBOL.size])]


def _relocations(path: Path, segments: Sequence[_Segment], region: _Region, tags: Mapping[int, int]) -> Iterator[int]:
    """Return the offset of each relocation in the file."""
    if tags.get(_DT_PLTREL, _DT_RELA) != _DT_RELA or tags.get(_DT_RELAENT, _RELA.size) != _RELA.size:
        raise ThinError(path, "has relocations of an unknown size")
    for table, length in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
        if size := tags.get(length, 0):
            begin = _offset(path, segments, tags.get(table, 0), size)
            if _overlap(begin, size, region.offset, region.size):
                raise ThinError(path, "is a table of relocations that overlaps the device code", begin)
            yield from range(begin, begin + size // _RELA.size * _RELA.size, _RELA.size)


def _offset(path: Path, segments: Sequence[_Segment], address: int, size: int = 1) -> int:
    """Return the offset in the file of the data at ``address``."""
    for segment in segments:
        if segment.kind == _LOAD and segment.address <= address and address + size <= segment.address + segment.size:
            return address - segment.address + segment.offset
    raise ThinError(path, f"has no loaded segment with the {size} bytes at address {address:#x}")


def _symbols(path: Path, file: ELFFile, region: _Region, moved: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
    """Return new values of debug symbols that name a container; no other symbol may be in the device code."""
    for section in file.iter_sections():
        if section["sh_type"] not in {"SHT_SYMTAB", "SHT_DYNSYM"}:
            continue
        data = section_bytes(section)
        whole = _SYMBOL.iter_unpack(data[: len(data) // _SYMBOL.size * _SYMBOL.size])
        for number, (_, info, _, home, value, _) in enumerate(whole):
            if home != region.number and (home in _NOWHERE or info & 15 == _TLS or not region.holds(value)):
                continue
            at = section["sh_offset"] + number * _SYMBOL.size
            if section["sh_type"] == "SHT_DYNSYM" or value not in moved:
                raise ThinError(path, "is a symbol in the device code", at)
            yield at + _SYMBOL_VALUE, moved[value].to_bytes(_ADDRESS, "little")


def _headers(file: ELFFile, plan: _Plan, used: int) -> Iterator[tuple[int, bytes]]:
    """Return the offsets of moved sections and tables, and the new size of the device code."""
    for field_at, name in _TABLES_AT.items():
        yield field_at, plan.place(file[name]).to_bytes(8, "little")
    for number, section in enumerate(file.iter_sections()):
        header = file["e_shoff"] + number * file["e_shentsize"]
        yield header + _SECTION_OFFSET, plan.place(section["sh_offset"]).to_bytes(8, "little")
        if number == plan.region.number:
            yield header + _SECTION_SIZE, used.to_bytes(8, "little")


def _split(path: Path, segments: Sequence[_Segment], plan: _Plan, used: int) -> Iterator[_Segment]:
    """Return the program headers, with the segment of the device code split in two."""
    region = plan.region
    whole = segments[region.segment]
    front = region.offset + used - whole.offset
    behind = region.end - whole.offset
    rest = whole._replace(
        offset=region.end,
        address=whole.address + behind,
        physical=whole.physical + behind,
        size=whole.size - behind,
        memory=whole.memory - behind,
    )
    replaced = _replaceable_header(path, segments) if rest.memory else None
    for number, segment in enumerate(segments):
        if number == region.segment:
            yield segment._replace(size=front, memory=front)
            if replaced is not None:
                yield rest._replace(offset=plan.place(rest.offset))
        elif number != replaced:
            yield segment._replace(offset=plan.place(segment.offset))


def _replaceable_header(path: Path, segments: Sequence[_Segment]) -> int:
    """Return the program header that can be replaced: one of notes, which loaders ignore and which stay as sections.

    One that repeats a PT_GNU_PROPERTY is the first choice.
    """
    notes = [number for number, segment in enumerate(segments) if segment.kind == _NOTE]
    property_offsets = {segment.offset for segment in segments if segment.kind == _PROPERTY}
    if not notes:
        raise ThinError(path, "has no room for the program header of one more segment")
    return max(notes, key=lambda number: (segments[number].offset in property_offsets, number))
