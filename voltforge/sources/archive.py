"""Archives: sdists, tarballs, zip files and Debian packages, unpacked safely or refused."""

from __future__ import annotations

import bz2
import calendar
import contextlib
import errno
import gzip
import itertools
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from voltforge.errors import VoltforgeError, listed, remedy
from voltforge.system import files
from voltforge.system.process import ProgramFailed, run

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, LookupError, ValueError, OverflowError, RuntimeError, MemoryError,
)  # fmt: skip
"""The errors of the standard library for a truncated, corrupt, encrypted or absurd archive, besides some OSErrors."""
_LONGEST, _LONGEST_PART, _DEEPEST = 1000, 255, 60
"""Limits for a member: bytes of its path, bytes of a name in it (NAME_MAX), folders above it. PyTorch's source has 178,
133 and 11.

Deeper trees could be unpacked, but Python's own functions that walk a folder give up on them.
"""
_CLUMSY = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
"""Characters that no name may have: control characters, backslashes, bytes that are not UTF-8 (surrogates)."""
_LATEST = 253_402_300_800
"""The end of the year 9999 in seconds since 1970, the last time that calendars support."""
_COMPRESSED: dict[bytes, Callable[[IO[bytes]], contextlib.AbstractContextManager[Any]]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""The functions that open a compressed file, by its first bytes."""
_BLOCK = tarfile.BLOCKSIZE
_HEADERS, _HEADER = 1_000_000, 4096
"""Bytes of headers that one member of a tar archive may have, and the average over all members."""
_GLOBALS = 100
"""The number of global headers that a tar archive may have: git writes one."""
_REST = 16_000_000
"""Bytes that may follow the end mark of a tar archive: they fill a block of the tape."""
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
"""The kinds of headers that hold records of a name and a value."""
_RECORD = re.compile(rb"([1-9]\d{0,6}) ")
"""The beginning of a record in a pax header (pax(1)): its length."""
_LONG_NUMBER = re.compile(rb"\d{64}")
_LOCAL = struct.Struct("<4s5H3L2H")
"""The header in front of each file of a zip archive (APPNOTE 4.3.7)."""
_STREAMED, _UTF8, _ZIP64 = 0x8, 0x800, 0xFFFFFFFF
"""The flags for sizes after the data and for names in UTF-8, and the marker of a 64-bit size."""


class ArchiveError(VoltforgeError):
    """An archive that is broken, or that would write outside its folder."""

    def __init__(self, archive: Path, problems: Sequence[str]) -> None:
        super().__init__(
            f"{archive.name} was not unpacked:{listed(list(problems))}",
            hint=remedy(
                "".join(problems), "download it again; if its hash is that of the recipe, do not trust the archive"
            ),
        )
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Limits:
    """Limits of an unpacked archive; a larger one is taken for an attack."""

    size: int = 20 * 10**9
    """Bytes; PyTorch's release tarball is well below 3 GB."""
    members: int = 250_000
    """Files, folders and links; PyTorch 2.6's source has 17,000, without most vendored projects."""


LIMITS = Limits()


def unpack(archive: Path, folder: Path, limits: Limits = LIMITS) -> int:
    """Unpack a tar, zip, wheel or Debian archive, without its single top folder if it has one.

    Return the newest time of its members. Modes become 644 or 755, owners the caller's. Memory is bounded whatever the
    archive states. Nothing is written of a refused archive, unless it breaks in the middle.

    Raises:
        ArchiveError: it is broken or too large, or a member is absolute, leaves the folder, is a device, links outside,
            appears twice, or (except in Debian archives) differs from another by case alone.
    """
    try:
        if archive.suffix in (".zip", ".whl"):
            epoch = _unpack_zip(archive, folder, limits)
        elif archive.suffix == ".deb":
            epoch = _unpack_deb(archive, folder, limits)
        else:
            epoch = _unpack_tar(archive, folder, limits)
        _lift_single_folder(folder)
        try:
            # Last: a link that stayed inside can lead outside after its folder was moved up.
            _refuse(archive, _escaping_links(folder))
        except ArchiveError:
            files.remove(folder)
            raise
    except BROKEN as error:
        raise ArchiveError(archive, [f"is broken: {shown(str(error) or type(error).__name__)}"]) from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise ArchiveError(archive, [f"{error.filename or folder}: {error.strerror}"]) from error
        # gzip, and a seek to an invalid offset, raise an OSError without a disk fault.
        raise ArchiveError(archive, [f"is broken: {error}"]) from error
    return epoch


def name_problem(name: str) -> str | None:
    """Return why a member's name is not safe inside the folder, as a sentence; ``None`` if it is."""
    path = PurePosixPath(name)
    if _CLUMSY.search(name):
        return f"{shown(name)}: is not a portable name"
    if path.is_absolute():
        return f"{shown(name)}: is absolute"
    if ".." in path.parts:
        return f"{shown(name)}: leaves the folder with '..'"
    if len(name.encode()) > _LONGEST or any(len(part.encode()) > _LONGEST_PART for part in path.parts):
        return f"{shown(name)}: the name is too long"
    if len(path.parts) > _DEEPEST:
        return f"{shown(name)}: is nested too deeply"
    return None


def shown(text: str) -> str:
    """Return text of an archive in a printable form."""
    short = text if len(text) <= 200 else f"{text[:200]}…"
    return repr(short) if _CLUMSY.search(short) else short


def _refuse(archive: Path, problems: Iterable[str]) -> None:
    if first := list(itertools.islice(problems, 20)):
        raise ArchiveError(archive, first)


def _conflicts(names: Sequence[str], folders: Iterable[str], *, case: bool) -> Iterator[str]:
    """Yield conflicts between members, by their normalized names; ``names`` are those of files and links.

    ``case``: True if two names may differ in case alone, or in Unicode normalization. Some file systems keep only one
    of them.
    """
    count = Counter(names)
    yield from (f"{shown(name)}: appears twice" for name in count if count[name] > 1)
    parents = set(folders)
    for name in itertools.chain(names, tuple(parents)):
        while (name := name.rpartition("/")[0]) and name not in parents:
            parents.add(name)
    yield from (f"{shown(name)}: is both a file and a folder" for name in sorted(parents.intersection(count)))
    known: dict[str, str] = {}
    for name in () if case else sorted(parents.union(count)):
        if (other := known.setdefault(_folded(name), name)) != name:
            yield f"{shown(name)}: is the same as {shown(other)} on file systems that ignore case"


def _folded(name: str) -> str:
    """Return a key that is equal for names that a case-insensitive file system treats as one (Unicode 3.13, D145)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


class _BoundedStream:
    """The bytes of a tar archive for ``tarfile``, which itself trusts any length in a header.

    While headers are read, their size is bounded, and headers that older releases of Python parse in quadratic time
    (CVE-2024-6232 and similar) are refused.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left: int | None = _HEADERS
        self._kind = b""
        """The kind of the header whose content follows."""

    def read(self, size: int = -1) -> bytes:
        if self._left is None:
            return self._file.read(size)
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError("a member's headers are too long, or have a negative length")
        data, kind, self._kind = self._file.read(size), self._kind, b""
        if kind in _PAX:
            _check_records(data.rstrip(b"\0"))
        elif not kind and data[156:157] in (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            self._kind = data[156:157]
        return data

    def seek(self, offset: int) -> int:
        self._kind = b""
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def next_member(self) -> None:
        """Allow the headers of one more member."""
        assert self._left is not None
        self._left = min(_HEADERS, self._left + _HEADER)

    def finish(self, end: int) -> None:
        """Check that the archive ends correctly at ``end``, and read on to the checksum of its compression.

        After that, files are read without bounds.

        Raises:
            tarfile.TarError: the end is damaged or missing.
        """
        self._left = None
        self.seek(end)
        mark = self.read(_BLOCK)
        if len(mark) < _BLOCK or any(mark):
            raise tarfile.ReadError(f"the data at byte {end} is neither a member nor the end of the archive")
        rest = 0
        while block := self.read(files.BLOCK):
            rest += len(block)
            if rest > _REST:
                raise tarfile.ReadError("it continues after its end")


def _check_records(header: bytes) -> None:
    at = 0
    while at < len(header):
        match = _RECORD.match(header, at)
        record = header[at : at + int(match[1])] if match else b""
        if not record.endswith(b"\n") or b"=" not in record or _LONG_NUMBER.search(record):
            raise tarfile.ReadError("a pax header is malformed")
        at += len(record)


@contextlib.contextmanager
def _decompressed(archive: Path) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(archive.open("rb"))
        begin = file.read(6)
        file.seek(0)
        for mark, opener in _COMPRESSED.items():
            if begin.startswith(mark):
                file = stack.enter_context(opener(file))
        yield file


def _unpack_tar(archive: Path, folder: Path, limits: Limits, *, debian: bool = False) -> int:
    with _decompressed(archive) as file:
        tape = _BoundedStream(file)
        with tarfile.open(fileobj=cast(IO[bytes], tape), mode="r:") as tar:
            members = _members(archive, tar, tape, limits, debian=debian)
            _refuse(archive, _tar_problems(members, case=debian))
            for member in members:
                member.mode = 0o755 if member.isdir() or member.mode & stat.S_IXUSR else 0o644
                member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            # A second check where it exists: from Python 3.10.12 and 3.11.4 on (PEP 706), so not on Debian 12.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            # Links come last, so that nothing can be written through one.
            tar.extractall(folder, sorted(members, key=tarfile.TarInfo.issym))
    return int(max((0, *(member.mtime for member in members))))


def _members(
    archive: Path, tar: tarfile.TarFile, tape: _BoundedStream, limits: Limits, *, debian: bool
) -> list[tarfile.TarInfo]:
    """Yield the members of a tar archive, within the limits."""
    members: list[tarfile.TarInfo] = []
    problems: list[str] = []
    size = count = 0
    while len(problems) < 20 and (member := tar.next()) is not None:
        size, count = size + member.size, count + 1
        if (problem := _unreadable_after(member, tar)) or (problem := _beyond(size, count, limits)):
            _refuse(archive, [problem])
        member.pax_headers = {}  # each member has a copy of all global headers
        tape.next_member()
        if not (debian and member.issym() and member.linkname.startswith("/")):
            members.append(member)
            problems += _member_problems(member)
    _refuse(archive, problems)
    tape.finish(tar.offset)
    if not count:
        raise tarfile.ReadError("it is empty")
    return members


def _unreadable_after(member: tarfile.TarInfo, tar: tarfile.TarFile) -> str | None:
    """Return why the archive cannot be read after this member: the next header is misplaced, or there is no end."""
    if member.size < 0:  # the next header would be in front of this one (CVE-2025-8194)
        return f"{shown(member.name)}: has a negative size"
    if member.issparse():  # its size on disk is independent of the stated size
        return f"{shown(member.name)}: is a sparse file"
    if len(tar.pax_headers) > _GLOBALS:
        return f"has more than {_GLOBALS} global headers"
    return None


def _beyond(size: int, members: int, limits: Limits) -> str | None:
    if size > limits.size:
        return f"unpacks to more than {files.size(limits.size)}"
    if members > limits.members:
        return f"has more than {limits.members} members"
    return None


def _member_problems(member: tarfile.TarInfo) -> Iterator[str]:
    """Yield the problems of one member of a tar archive."""
    name = shown(member.name)
    if problem := name_problem(member.name):
        yield problem
    elif member.isdev():
        yield f"{name}: is a device or a pipe"
    elif not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        yield f"{name}: has the unknown type {member.type!r}"
    elif not member.isdir() and os.path.normpath(member.name) == ".":
        yield f"{name}: is not the name of a file"
    elif not -_LATEST < member.mtime < _LATEST:
        yield f"{name}: has a time that no calendar supports"
    elif member.issym() or member.islnk():
        base = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
        target = os.path.normpath(base / member.linkname)
        if target == ".." or target.startswith(("/", "../")):
            yield f"{name}: links outside, to {shown(member.linkname)}"
        elif _CLUMSY.search(member.linkname) or len(member.linkname) > _LONGEST:
            yield f"{name}: links to {shown(member.linkname)}, which is not a portable name"
        elif member.islnk() and ".." in PurePosixPath(member.linkname).parts:
            yield f"{name}: links to {shown(member.linkname)}, which is not the name of a member"


def _tar_problems(members: Sequence[tarfile.TarInfo], *, case: bool) -> Iterator[str]:
    """Yield the problems between members of a tar archive."""
    links = {os.path.normpath(member.name) for member in members if member.issym()}
    for member in members if links else ():
        name, target = os.path.normpath(member.name), os.path.normpath(member.linkname)
        if member.islnk() and (target in links or _below(links, target)):
            yield f"{shown(member.name)}: links to {shown(member.linkname)}, through a link"
        if through := _below(links, name):
            yield f"{shown(member.name)}: is below a link, {shown(min(through))}"
    others = [os.path.normpath(member.name) for member in members if not member.isdir()]
    yield from _conflicts(others, (os.path.normpath(member.name) for member in members if member.isdir()), case=case)


def _below(links: Set[str], name: str) -> set[str]:
    """Return those of ``links`` that a path passes through."""
    return {parent for parent in map(str, PurePosixPath(name).parents) if parent in links}


def _escaping_links(folder: Path) -> Iterator[str]:
    """Yield the links in a folder that lead outside or in a circle."""
    inside = folder.resolve()
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        name = shown(str(link.relative_to(folder)))
        if _endless(link):
            yield f"{name}: links to itself, through other links"
        elif not link.resolve().is_relative_to(inside):
            yield f"{name}: links outside, to {shown(str(link.readlink()))}"


def _endless(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _unpack_zip(archive: Path, folder: Path, limits: Limits) -> int:
    with zipfile.ZipFile(archive) as bundle:
        _refuse(archive, zip_problems(bundle, limits))
        epoch = max((0, *(_zip_time(member) for member in bundle.infolist())))
        extract(bundle, folder)
    return epoch


def zip_problems(bundle: zipfile.ZipFile, limits: Limits = LIMITS) -> Iterator[str]:
    """Yield the reasons not to unpack a zip archive, as sentences.

    ``zipfile`` never returns more bytes of a member than the directory states, so a limit on the stated sizes is a
    limit on the written bytes.
    """
    members = bundle.infolist()
    if problem := _beyond(sum(member.file_size for member in members), len(members), limits):
        yield problem
        return
    for member in members:
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        if problem := name_problem(name):
            yield problem
        elif kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            yield f"{shown(name)}: is a link or a device"
        elif member.flag_bits & 1:
            yield f"{shown(name)}: is encrypted"
        elif member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            # zipfile inflates whole blocks of other methods, and a few kB of bzip2 can be gigabytes.
            yield f"{shown(name)}: is not compressed by deflate"
        elif not member.is_dir() and os.path.normpath(name) == ".":
            yield f"{shown(name)}: is not the name of a file"
    names = [os.path.normpath(member.filename) for member in members if not member.is_dir()]
    folders = (os.path.normpath(member.filename) for member in members if member.is_dir())
    yield from _conflicts(names, folders, case=False)
    yield from _contradictions(bundle)


def _contradictions(bundle: zipfile.ZipFile) -> Iterator[str]:
    """Yield differences between a zip archive's directory and the headers of its files, and files that share bytes.

    Programs that read the archive from its beginning would find other files than those that use the directory.
    """
    file, end = cast(IO[bytes], bundle.fp), 0
    for member in sorted(bundle.infolist(), key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        mark, _, flags, method, _, _, crc, packed, size, length, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        name = file.read(length).decode("utf-8" if flags & _UTF8 else "cp437")
        recorded = (
            crc,
            packed if packed != _ZIP64 else member.compress_size,
            size if size != _ZIP64 else member.file_size,
        )
        truth = (member.CRC, member.compress_size, member.file_size)
        streamed = flags & _STREAMED and recorded == (0, 0, 0)
        if (mark, name, method) != (b"PK\3\4", member.orig_filename, member.compress_type) or not (
            recorded == truth or streamed
        ):
            yield f"{shown(member.filename)}: its own header and the archive's directory differ"
        if member.header_offset < end:
            yield f"{shown(member.filename)}: overlaps another member"
        end = max(end, member.header_offset + _LOCAL.size + length + extra + member.compress_size)
    if end > bundle.start_dir:
        yield "has members that overlap its directory"


def extract(bundle: zipfile.ZipFile, folder: Path) -> None:
    """Write the members of a zip archive without :func:`zip_problems`, with modes 644 or 755.

    Raises:
        FileExistsError: a file exists already.
        Exception: ``zipfile`` finds damage, see ``BROKEN``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for member in bundle.infolist():
        target = folder / member.filename
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with bundle.open(member) as source, target.open("xb") as sink:
            shutil.copyfileobj(source, sink, files.BLOCK)
        target.chmod(0o755 if member.external_attr >> 16 & stat.S_IXUSR else 0o644)


def _zip_time(member: zipfile.ZipInfo) -> int:
    """Return a member's time, which has no zone, as UTC; some writers leave it 0, which is not a date."""
    year, month, day, *clock = member.date_time
    return calendar.timegm((year, max(month, 1), max(day, 1), *clock))


def _unpack_deb(archive: Path, folder: Path, limits: Limits) -> int:
    """Unpack the files of a Debian package, deb(5), with binutils' ar.

    Its absolute links refer to the installed system and are skipped. Names may differ by case alone: the package is
    made for case-sensitive file systems, and the kernel's headers have such names.
    """
    if not shutil.which("ar"):
        raise VoltforgeError("ar, which opens Debian packages, is not installed", hint="apt-get install binutils")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            parts = run(["ar", "t", archive.absolute()]).output.split()
            [data] = [part for part in parts if re.fullmatch(r"data\.tar(\.\w+)?", part)]
            run(["ar", "x", archive.absolute(), data], cwd=Path(scratch))
        except (ProgramFailed, ValueError) as error:
            raise ArchiveError(archive, ["is not a Debian package that ar can read"]) from error
        return _unpack_tar(Path(scratch, data), folder, limits, debian=True)


def _lift_single_folder(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        lifted = Path(tempfile.mkdtemp(dir=folder))  # the folder can hold an entry of its own name
        single = entries[0].rename(lifted / "single")
        for entry in list(single.iterdir()):
            entry.rename(folder / entry.name)
        single.rmdir()
        lifted.rmdir()
