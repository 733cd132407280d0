"""Compare two built files: byte by byte, member by member, and in binaries section by section."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

from backports import zstd

from voltforge.binary import fatbin
from voltforge.binary.elf import MAGIC, ElfError, open_elf
from voltforge.binary.fatbin import FatbinError, Image
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import Section

Tier = Literal["identical", "archive only", "same code and symbols", "different"]
"""The tiers, from the most alike to the least.

``archive only``: all members have equal content and modes; order, times or compression of the archive differ. ``same
code and symbols``: only binaries differ, and their machine code, device code and dynamic symbols are equal.
"""
TIER_TEXTS: Mapping[Tier, str] = {
    "identical": "the same, bit for bit",
    "archive only": "the same in every member; the archives around them differ",
    "same code and symbols": "the same in machine code, device code and symbols; other parts of binaries differ",
    "different": "not the same",
}
MAX_DIFFERENCES = 20
"""The number of differences that are kept of one comparison; the rest is counted."""
MAX_OF_MEMBER = 6
"""The number of differences that are kept of one member."""
WIDTH = 120
"""The number of characters of a text line that are printed."""
DIFFOSCOPE_SECONDS = 1800.0
"""Seconds for diffoscope; a wheel of gigabytes would take it hours."""

_DEVICE = fatbin.SECTIONS
_CODE = re.compile(r"\.(?:text|plt)(?:\..*)?|\.(?:init|fini)")
"""Sections with machine code (System V gABI, figure 4-13)."""
_BOOKKEEPING = re.compile(
    r"\.(?:gnu\.|rela?\.|relr\.|got|eh_frame|note\.|dynsym|dynstr|dynamic|hash|symtab|strtab|shstrtab).*"
)
"""Sections with addresses, sizes and names of other sections' content: they are reported after those."""
_HASHES = {".note.gnu.build-id", ".gnu_debuglink"}
"""Sections with a hash of the others (ld(1), --build-id)."""
_DERIVED = {"digest", "size", "diff_ids", "mediaType"}
"""Keys of the OCI image-spec about packed layers: they follow from the layers."""
_OF_LAYERS = {"history", "org.opencontainers.image.base.digest"}
"""Keys about the origin of layers, by ids and hashes that change with them."""
_PRINTABLE = re.compile(rb"[\x20-\x7e]{4,}")
_AROUND = 40
"""Bytes on either side of a difference in which a string is searched."""
_SHOWN = 8
"""Bytes of a difference that are printed."""
_TEXT_HEAD = 8192
"""The number of bytes in which a zero marks a file as binary."""
_LINKS = {tarfile.SYMTYPE: "a link to", tarfile.LNKTYPE: "another name of"}
_UNREADABLE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, zstd.ZstdError,
    EOFError, KeyError, ValueError, NotImplementedError,
)  # fmt: skip
"""Errors of opening something that is not an archive: its bytes are compared then."""


@dataclass(frozen=True)
class Difference:
    """A difference between two files."""

    file: str
    """The member: ``vllm/_C.abi3.so``; in an image with its layer: ``layer 13, opt/vllm/bin/vllm``."""
    section: str
    """The place in it: a section of a binary, ``line 12`` of a text, ``byte 0x40``, ``mode``; empty for the whole
    member.
    """
    symbol: str
    """The symbol of the first differing byte, or the differing kernels; empty if unknown."""
    one: str
    """The content of the first file, abbreviated."""
    other: str
    """The content of the second file, abbreviated."""

    @property
    def place(self) -> str:
        """Return file, section and symbol in one line."""
        return " ".join(word for word in (self.file, self.section, self.symbol) if word)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    one: Path
    other: Path
    sha256: tuple[str, str]
    tier: Tier
    differences: tuple[Difference, ...] = ()
    """The first :data:`MAX_DIFFERENCES` differences, in the order of the members."""
    more: int = 0
    """The number of further differences."""
    detail: Path | None = None
    """The file for diffoscope's report, if diffoscope is installed and the files differ."""


def compare(one: Path, other: Path) -> Comparison:
    """Compare two wheels, two archives of OCI image layouts, or two files of any other kind.

    Differences that a RECORD, an SBOM, a build id or an image's manifest only repeats are reported once, at their
    origin. A file that cannot be opened as an archive is compared byte by byte.
    """
    sha256 = files.sha256(one), files.sha256(other)
    if sha256[0] == sha256[1]:
        return Comparison(one, other, sha256, "identical")
    with tempfile.TemporaryDirectory(prefix="voltforge-") as scratch:
        result = _DifferenceList(Path(scratch))
        try:
            _compare_files(one, other, result)
        except _UNREADABLE:
            result = _DifferenceList(Path(scratch))
            result.add(_byte_differences(one.name, one, other))
    detail = other.with_name(f"{other.name}.diffoscope.txt") if shutil.which("diffoscope") else None
    return Comparison(one, other, sha256, result.tier, tuple(result.differences), result.more, detail)


def report(comparison: Comparison) -> None:
    """Print the tier and the differences; write diffoscope's report if it is installed."""
    names = dict.fromkeys((comparison.one.name, comparison.other.name))
    console.step(f"{' and '.join(names)}: {TIER_TEXTS[comparison.tier]}")
    for path, sha256 in zip((comparison.one, comparison.other), comparison.sha256, strict=True):
        console.note(f"{sha256}  {path}")
    rows = [(row.file, row.section, row.symbol, row.one, row.other) for row in comparison.differences]
    if rows:
        console.table("", ("file", "where", "what", "first", "second"), rows)
    if comparison.more:
        console.note(f"and {comparison.more} more")
    if comparison.detail:
        command: list[str | Path] = ["diffoscope", "--text", comparison.detail, comparison.one, comparison.other]
        try:
            run(command, ok=(0, 1), timeout=DIFFOSCOPE_SECONDS)
            console.note(f"diffoscope's report: {comparison.detail}")
        except ProgramFailed as error:
            console.warn(error.what)


@dataclass
class _DifferenceList:
    """The differences so far."""

    scratch: Path
    differences: list[Difference] = field(default_factory=list)
    more: int = 0
    same_code: bool = True
    """True while each difference is in a binary with equal code and symbols."""

    def add(self, differences: Iterable[Difference], *, same_code: bool = False) -> None:
        """Add the differences of one member."""
        rows = list(differences)
        room = min(MAX_OF_MEMBER, MAX_DIFFERENCES - len(self.differences))
        self.differences += rows[:room]
        self.more += len(rows[room:])
        self.same_code &= same_code or not rows

    @property
    def tier(self) -> Tier:
        if not self.differences:
            return "archive only"
        return "same code and symbols" if self.same_code else "different"

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Give a temporary folder."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            yield Path(name)


def _compare_files(one: Path, other: Path, result: _DifferenceList) -> None:
    if zipfile.is_zipfile(one) and zipfile.is_zipfile(other):
        with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
            _compare_members("", _Zip(first), _Zip(second), result)
    elif _is_layout(one) and _is_layout(other):
        with tarfile.open(one) as first, tarfile.open(other) as second:
            _compare_layouts(_Layout(first), _Layout(second), result)
    else:
        rows, same_code = _content_differences(one.name, one, other)
        result.add(rows, same_code=same_code)


# Archives and their members.


@dataclass(frozen=True)
class _Member:
    """The properties of a member that are compared before its content."""

    kind: str
    mode: int
    owner: str
    size: int
    sha256: str


class _Archive(Protocol):
    def members(self) -> dict[str, _Member]:
        """Return all members by name."""

    def take(self, names: Mapping[str, Path]) -> None:
        """Write the content of these members to files."""


@dataclass(frozen=True)
class _Zip:
    archive: zipfile.ZipFile

    def members(self) -> dict[str, _Member]:
        return {entry.filename: self._member(entry) for entry in self.archive.infolist()}

    def take(self, names: Mapping[str, Path]) -> None:
        for name, path in names.items():
            with self.archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, files.BLOCK)

    def _member(self, entry: zipfile.ZipInfo) -> _Member:
        mode = entry.external_attr >> 16
        kind = "a folder" if entry.is_dir() else "a link" if stat.S_ISLNK(mode) else "a file"
        with self.archive.open(entry) as content:
            return _Member(kind, stat.S_IMODE(mode), "", entry.file_size, _sha256(content))


@dataclass(frozen=True)
class _Layer:
    """A layer of an image (layer.md of the OCI image-spec): a tar stream, compressed or not."""

    layout: _Layout
    digest: str

    def members(self) -> dict[str, _Member]:
        with self._opened() as tar:
            return {entry.name: self._member(tar, entry) for entry in tar}

    def take(self, names: Mapping[str, Path]) -> None:
        with self._opened() as tar:
            for entry in tar:
                if entry.isfile() and entry.name in names and (content := tar.extractfile(entry)):
                    with names[entry.name].open("wb") as target:
                        shutil.copyfileobj(content, target, files.BLOCK)

    def _opened(self) -> tarfile.TarFile:
        return tarfile.open(fileobj=_unpacked_layer(self.layout.blob(self.digest)), mode="r|")

    def _member(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> _Member:
        kind = "a folder" if entry.isdir() else "a file" if entry.isfile() else f"of type {entry.type.decode()}"
        if entry.type in _LINKS:
            kind = f"{_LINKS[entry.type]} {entry.linkname}"
        content = tar.extractfile(entry) if entry.isfile() else None
        return _Member(
            kind, stat.S_IMODE(entry.mode), f"{entry.uid}:{entry.gid}", entry.size, _sha256(content) if content else ""
        )


def _compare_members(prefix: str, one: _Archive, other: _Archive, result: _DifferenceList) -> None:
    """Compare two archives by the names, kinds, modes, owners and contents of their members."""
    first, second = one.members(), other.members()
    names = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    changed = [name for name in names if _content_differs(first.get(name), second.get(name))]
    with result.folder() as folder:
        here = {name: folder / f"{number}.one" for number, name in enumerate(changed)}
        there = {name: folder / f"{number}.other" for number, name in enumerate(changed)}
        one.take(here)
        other.take(there)
        for name in names:
            if name in here and _only_repeats(name, here[name], there[name], names):
                continue
            result.add(_attribute_differences(f"{prefix}{name}", first.get(name), second.get(name)))
            if name in here:
                rows, same_code = _content_differences(f"{prefix}{name}", here[name], there[name])
                result.add(rows, same_code=same_code)


def _content_differs(one: _Member | None, other: _Member | None) -> bool:
    return one is not None and other is not None and "" != one.sha256 != other.sha256 != ""


def _attribute_differences(name: str, one: _Member | None, other: _Member | None) -> Iterator[Difference]:
    if one is None or other is None:
        yield Difference(name, "", "", *(f"{member.size} bytes" if member else "absent" for member in (one, other)))
        return
    for what in ("kind", "mode", "owner"):
        values = getattr(one, what), getattr(other, what)
        if values[0] != values[1]:
            texts = (f"{value:#o}" if what == "mode" else value for value in values)
            yield Difference(name, what, "", *texts)


def _only_repeats(name: str, one: Path, other: Path, differing: Iterable[str]) -> bool:
    """Return True if a RECORD (PEP 376) or SBOM (PEP 770) differs only in what it repeats of other members."""
    path = PurePosixPath(name)
    read = next((read for pattern, read in _REPEATING.items() if path.match(pattern)), None)
    if not read:
        return False
    root = next(folder for folder in path.parents if folder.name.endswith(".dist-info")).parent
    known = {os.path.relpath(member, root) for member in differing}
    try:
        return bool(read(one, known) == read(other, known))
    except (ValueError, AttributeError):  # not an SBOM
        return False


def _record_rows(path: Path, known: set[str]) -> list[list[str]]:
    rows = csv.reader(io.StringIO(path.read_text("utf-8", errors="replace"), newline=""))
    return [row for row in rows if row and os.path.normpath(row[0]) not in known]


def _sbom_content(path: Path, known: set[str]) -> Any:
    """Return a CycloneDX document without its serial number, which depends on the rest, and without some files."""
    document = json.loads(path.read_bytes())
    components = [component for component in document.get("components", ()) if component.get("name") not in known]
    return {**document, "serialNumber": "", "components": components}


_REPEATING = {"*.dist-info/RECORD": _record_rows, "*.dist-info/sboms/*.cdx.json": _sbom_content}
"""Members of a wheel with the hashes of others, and the functions that read them without some of those."""


# Contents.


def _content_differences(name: str, one: Path, other: Path) -> tuple[list[Difference], bool]:
    """Return the differences between two files, and whether they are binaries with equal code and symbols."""
    heads = _first_bytes(one), _first_bytes(other)
    if all(head.startswith(MAGIC) for head in heads):
        try:
            return _binary_differences(name, one, other)
        except (ElfError, FatbinError):
            return _byte_differences(name, one, other), False
    if not any(b"\0" in head for head in heads):
        return _line_differences(name, one, other), False
    return _byte_differences(name, one, other), False


def _line_differences(name: str, one: Path, other: Path) -> list[Difference]:
    """Return the first differing line, and the number of differing lines."""
    with one.open("rb") as first, other.open("rb") as second:
        for number, lines in enumerate(itertools.zip_longest(first, second), 1):
            if lines[0] != lines[1]:
                return [Difference(name, f"line {number}", "", *map(_shortened_line, lines))]
    return []


def _shortened_line(line: bytes | None) -> str:
    if line is None:
        return "ends before"
    text = line.decode(errors="replace").removesuffix("\n")
    return text[:WIDTH] + ("…" if len(text) > WIDTH else "")


def _byte_differences(name: str, one: Path, other: Path) -> list[Difference]:
    with _mapped_file(one) as first, _mapped_file(other) as second:
        at = _first_difference(_Part(first, 0, len(first)), _Part(second, 0, len(second)))
        if at is None:
            return []
        values = (_shown_value(_Part(content, 0, len(content)), at) for content in (first, second))
        return [Difference(name, f"byte {at:#x}", "", *values)]


@dataclass(frozen=True)
class _Part:
    """A stretch of a file's bytes."""

    content: mmap.mmap | bytes
    begin: int
    size: int

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self.size)
        return self.content[self.begin + start : self.begin + stop]


def _first_difference(one: _Part, other: _Part) -> int | None:
    """Return the first differing offset of two stretches, from their beginnings; ``None`` if they are equal."""
    size = min(one.size, other.size)
    for at in range(0, size, files.BLOCK):
        here, there = one[at : at + files.BLOCK], other[at : at + files.BLOCK]
        here, there = here[: size - at], there[: size - at]
        if here != there:
            return at + next(number for number, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
    return None if one.size == other.size else size


def _shown_value(part: _Part, at: int) -> str:
    """Return the content at an offset: its bytes, and the string around them if there is one."""
    if at >= part.size:
        return f"ends after {part.size} bytes"
    shown = part[at : at + _SHOWN].hex(" ")
    begin = max(0, at - _AROUND)
    for match in _PRINTABLE.finditer(part[begin : at + _AROUND]):
        if match.start() <= at - begin < match.end():
            return f'{shown} at {at:#x}, in "{match[0].decode()}"'
    return f"{shown} at {at:#x}"


# Binaries.


@dataclass(frozen=True)
class _Binary:
    """A parsed binary and its bytes."""

    elf: ELFFile
    content: mmap.mmap

    def sections(self) -> dict[tuple[str, int], tuple[int, Section]]:
        """Return number and section by name, and by the count of equal names before it; in the order of the file."""
        seen: Counter[str] = Counter()
        sections = {}
        for number, section in sorted(enumerate(self.elf.iter_sections()), key=lambda item: item[1]["sh_offset"]):
            if section["sh_type"] != "SHT_NULL":
                sections[section.name, seen[section.name]] = number, section
                seen[section.name] += 1
        return sections

    def part(self, section: Section) -> _Part:
        """Return the bytes of a section; empty if it has none in the file."""
        size = 0 if section["sh_type"] == "SHT_NOBITS" else section["sh_size"]
        return _Part(self.content, section["sh_offset"], size)

    def symbol(self, number: int, section: Section, offset: int) -> str:
        """Return the innermost symbol that covers a byte of a section; empty if there is none."""
        from elftools.elf.sections import SymbolTableSection

        address = section["sh_addr"] + offset
        best: tuple[int, str] | None = None
        for table in (".symtab", ".dynsym"):
            symbols = self.elf.get_section_by_name(table)
            for symbol in symbols.iter_symbols() if isinstance(symbols, SymbolTableSection) else ():
                begin, size = symbol["st_value"], symbol["st_size"]
                if symbol["st_shndx"] == number and begin <= address < begin + size and (not best or size < best[0]):
                    best = size, symbol.name
            if best:
                return best[1]
        return ""

    def dynamic(self) -> Counter[tuple[str, str]]:
        """Return the dynamic symbols: name, and kind and size as text."""
        from elftools.elf.sections import SymbolTableSection

        table = self.elf.get_section_by_name(".dynsym")
        symbols: Counter[tuple[str, str]] = Counter()
        for symbol in table.iter_symbols() if isinstance(table, SymbolTableSection) else ():
            kind = str(symbol["st_info"]["type"]).removeprefix("STT_").lower()
            home = "undefined" if symbol["st_shndx"] == "SHN_UNDEF" else f"{symbol['st_size']} bytes"
            symbols[symbol.name, f"{kind}, {home}"] += 1
        return symbols


def _binary_differences(name: str, one: Path, other: Path) -> tuple[list[Difference], bool]:
    """Return the differing sections, device images and dynamic symbols, and whether code and symbols are equal."""
    with open_elf(one) as first, open_elf(other) as second:
        binaries = _Binary(*first), _Binary(*second)
        symbols = _symbol_differences(name, *binaries)
        device = _device_code_differences(name, one, other)
        reported = {".dynsym"} if symbols else set()
        reported |= set(_DEVICE) if device else set()
        sections = [row for row in _section_differences(name, *binaries) if row.section not in reported]
    same = not symbols and not device and not any(_CODE.fullmatch(row.section) for row in sections)
    hashes = [row for row in sections if row.section in _HASHES]
    bookkeeping = [row for row in sections if _BOOKKEEPING.fullmatch(row.section) and row not in hashes]
    content = [row for row in sections if row not in bookkeeping and row not in hashes]
    return [*content, *device, *symbols, *bookkeeping] or hashes or _byte_differences(name, one, other), same


def _section_differences(name: str, one: _Binary, other: _Binary) -> Iterator[Difference]:
    first, second = one.sections(), other.sections()
    for key in [*first, *(key for key in second if key not in first)]:
        if key not in first or key not in second:
            sizes = (f"{side[key][1]['sh_size']} bytes" if key in side else "absent" for side in (first, second))
            yield Difference(name, key[0], "", *sizes)
            continue
        (number, here), (other_number, there) = first[key], second[key]
        parts = one.part(here), other.part(there)
        at = _first_difference(*parts)
        if at is not None:
            symbol = one.symbol(number, here, at) or other.symbol(other_number, there, at)
            yield Difference(name, key[0], symbol, *(_shown_value(part, at) for part in parts))
        elif here["sh_size"] != there["sh_size"]:
            yield Difference(name, key[0], "", f"{here['sh_size']} bytes", f"{there['sh_size']} bytes")


def _symbol_differences(name: str, one: _Binary, other: _Binary) -> list[Difference]:
    first, second = one.dynamic(), other.dynamic()
    here, there = dict((first - second).keys()), dict((second - first).keys())
    return [
        Difference(name, ".dynsym", symbol, here.get(symbol, "absent"), there.get(symbol, "absent"))
        for symbol in sorted({*here, *there})
    ]


def _device_code_differences(name: str, one: Path, other: Path) -> list[Difference]:
    """Return the differing device images, each with its container and the differing kernels."""
    first, second = _device_images(one), _device_images(other)
    rows = []
    for key in sorted({*first, *second}):
        here, there = first.get(key), second.get(key)
        values = [
            f"{image.name} of container {image.container}, sha256 {image.sha256()[:12]}" if image else "absent"
            for image in (here, there)
        ]
        if values[0] != values[1]:
            section = next(section for section, relocatable in _DEVICE.items() if relocatable == key[0])
            rows.append(Difference(name, section, _changed_kernels(here, there), *values))
    return rows


def _device_images(path: Path) -> dict[tuple[bool, int, int], Image]:
    """Return the device images by section, container and place in it."""
    places: Counter[tuple[bool, int]] = Counter()
    images = {}
    for image in fatbin.images(path):
        container = image.relocatable, image.container
        images[(*container, places[container])] = image
        places[container] += 1
    return images


def _changed_kernels(one: Image | None, other: Image | None) -> str:
    """Return the kernels that differ between two images or else the differing sections; none for packed images."""
    if not one or not other:
        return ""
    try:
        first, second = _image_sections(one), _image_sections(other)
    except ElfError:
        return ""  # compressed, or PTX
    names = [
        name
        for name in [*first, *(name for name in second if name not in first)]
        if first.get(name) != second.get(name)
    ]
    kernels = [name.removeprefix(".text.") for name in names if name.startswith(".text.")]
    return ", ".join((kernels or names)[:5])


def _image_sections(image: Image) -> dict[str, str]:
    """Return the hash of each section of a cubin, by name."""
    with tempfile.TemporaryDirectory(prefix="voltforge-") as folder:
        path = Path(folder) / image.name
        with image.path.open("rb") as file:
            file.seek(image.offset)
            path.write_bytes(file.read(image.size))
        with open_elf(path) as (elf, _):
            return {section.name: files.sha256_bytes(section.data()) for section in elf.iter_sections()}


# Images.


@dataclass(frozen=True)
class _Layout:
    """An archive of an OCI image layout (image-layout.md of the image-spec)."""

    tar: tarfile.TarFile

    def blob(self, digest: str) -> IO[bytes]:
        return self.file(f"blobs/{digest.replace(':', '/')}")

    def file(self, name: str) -> IO[bytes]:
        content = self.tar.extractfile(name)
        if content is None:
            raise KeyError(name)
        return content

    def document(self, digest: str) -> Any:
        return json.load(self.blob(digest))

    def manifests(self) -> dict[str, str]:
        """Return the digests of the manifests by the names of their images."""
        entries = json.load(self.file("index.json"))["manifests"]
        key = "org.opencontainers.image.ref.name"
        return {str(entry.get("annotations", {}).get(key, "")): str(entry["digest"]) for entry in entries}


def _is_layout(path: Path) -> bool:
    if not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path) as tar:
        return {"oci-layout", "index.json"} <= set(tar.getnames())


def _compare_layouts(one: _Layout, other: _Layout, result: _DifferenceList) -> None:
    """Compare two layouts: the names, and each image once, whatever names it has."""
    first, second = one.manifests(), other.manifests()
    result.add(
        Difference("index.json", name, "", *(side.get(name, "absent")[:19] for side in (first, second)))
        for name in sorted(first.keys() ^ second.keys())
    )
    for here, there in dict.fromkeys((first[name], second[name]) for name in first if name in second):
        if here != there:
            _compare_images(one, other, (one.document(here), other.document(there)), result)


def _compare_images(one: _Layout, other: _Layout, manifests: tuple[Any, Any], result: _DifferenceList) -> None:
    layers = [[str(layer["digest"]) for layer in manifest["layers"]] for manifest in manifests]
    configurations = one.document(manifests[0]["config"]["digest"]), other.document(manifests[1]["config"]["digest"])
    left_out = _DERIVED | (_OF_LAYERS if layers[0] != layers[1] else set())
    for name, documents in (("manifest", manifests), ("configuration", configurations)):
        values = [dict(_json_values(document, left_out)) for document in documents]
        result.add(
            Difference(name, key, "", *(side.get(key, "absent")[:WIDTH] for side in values))
            for key in sorted({*values[0], *values[1]})
            if values[0].get(key) != values[1].get(key)
        )
    for number, (here, there) in enumerate(itertools.zip_longest(*layers)):
        if here is None or there is None:
            result.add([Difference(f"layer {number}", "", "", here or "absent", there or "absent")])
        elif here != there:
            _compare_members(f"layer {number}, ", _Layer(one, here), _Layer(other, there), result)


def _json_values(value: Any, left_out: set[str], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each single value of a JSON document with the keys that lead to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in left_out:
                yield from _json_values(item, left_out, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _json_values(item, left_out, f"{path}[{number}]")
    else:
        yield path, str(value)


# Packed streams.


def _unpacked_layer(source: IO[bytes]) -> IO[bytes]:
    """Return the unpacked bytes of a layer: gzip, zstd (RFC 8878) or plain tar, by its first bytes."""
    magic = source.read(4)
    source.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=source)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        return zstd.ZstdFile(source)  # type: ignore[return-value]
    return source


# Small things.


def _sha256(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := content.read(files.BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_TEXT_HEAD)


@contextlib.contextmanager
def _mapped_file(path: Path) -> Iterator[mmap.mmap | bytes]:
    """Give the bytes of a file, which may be empty, mapped into memory."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
