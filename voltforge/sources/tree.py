"""A source tree: an archive unpacked safely and the patch series applied to it, all of it or nothing."""

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
from voltforge.system.records import CheckoutPath

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, LookupError, ValueError, OverflowError, RuntimeError, MemoryError,
)  # fmt: skip
"""What the standard library raises for a truncated, corrupt, encrypted or absurd archive, but for some OSErrors."""

_LONGEST, _LONGEST_PART, _DEEPEST = 1000, 255, 60
"""Bytes of a member's path and of one name in it (NAME_MAX), and folders above it: 178, 133 and 11 in PyTorch's source.

Deeper ones could be unpacked, but then Python's own functions that walk a folder give up on the way.
"""
_CLUMSY = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
"""What no name should have: control characters, backslashes, bytes that are no UTF-8 (as Python stands for them)."""
_LATEST = 253_402_300_800
"""The end of the year 9999 in seconds since 1970, the last that calendars can tell."""

_COMPRESSED: dict[bytes, Callable[[IO[bytes]], contextlib.AbstractContextManager[Any]]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""What opens a compressed file, by how it begins."""
_BLOCK = tarfile.BLOCKSIZE
_HEADERS, _HEADER = 1_000_000, 4096
"""Bytes of headers that one member of a tar archive may have, and all of them on average."""
_GLOBALS = 100
"""Entries that a tar archive's global headers may have: git writes one."""
_REST = 16_000_000
"""Bytes that may stand behind the mark that ends a tar archive: it fills up a block of the tape."""
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
"""Kinds of headers that are records of a name and a value."""
_RECORD = re.compile(rb"([1-9]\d{0,6}) ")
"""How a record of a pax header begins (pax(1)): its length."""
_LONG_NUMBER = re.compile(rb"\d{64}")

_LOCAL = struct.Struct("<4s5H3L2H")
"""The header in front of each file of a zip archive (APPNOTE 4.3.7)."""
_STREAMED, _UTF8, _ZIP64 = 0x8, 0x800, 0xFFFFFFFF
"""Flags for sizes that follow the data and for names in UTF-8, and what stands for a size beyond 32 bits."""


class ArchiveError(VoltforgeError):
    """An archive that is broken, or that would write outside its folder."""

    def __init__(self, archive: Path, problems: Sequence[str]) -> None:
        super().__init__(
            f"{archive.name} was not unpacked:{listed(list(problems))}",
            hint=remedy(
                "".join(problems), "fetch it anew; if its hash is the recipe's, the archive itself is not to be trusted"
            ),
        )
        self.problems = tuple(problems)


class PatchError(VoltforgeError):
    """A patch that does not apply as it stands, with the file and the hunks."""

    def __init__(self, patch: Path, rejects: Sequence[tuple[str, str]]) -> None:
        where = listed([f"{file}: {why}" for file, why in rejects])
        again = _recheck(patch)
        super().__init__(
            f"{patch.parent.name}/{patch.name} does not apply:{where}",
            hint=remedy(where, f"the tree is as it was; in the source it is applied to, re-check {again}"),
        )
        self.patch = patch
        self.rejects = tuple(rejects)
        """Pairs of a file in the tree and the hunk, in patch(1)'s words."""


@dataclass(frozen=True)
class Patch:
    """One patch of a series: a header that says why, ``---``, and a unified diff."""

    path: Path
    subject: str
    sha256: str


@dataclass(frozen=True)
class Tree:
    """An unpacked and patched source tree."""

    path: CheckoutPath
    epoch: int
    """The newest time of the archive's members in seconds since 1970: the build's SOURCE_DATE_EPOCH."""


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to; what goes beyond is taken for a trap."""

    size: int = 20 * 10**9
    """Bytes; PyTorch's release tarball is well below 3 GB."""
    members: int = 250_000
    """Files, folders and links; PyTorch 2.6's source has 17,000, without most of what it bundles."""


LIMITS = Limits()


def series(folder: Path) -> tuple[Patch, ...]:
    """The patches of a folder in the order of their names; none if there is no such folder.

    Raises:
        PatchError: a patch has no ``Subject:`` line or no diff.
    """
    patches = []
    for path in sorted(folder.glob("*.patch")):
        text = path.read_text(encoding="utf-8", errors="replace")
        subject = re.search(r"^Subject: (.+)$", text, re.MULTILINE)
        if not subject or not re.search(r"^--- .*\n\+\+\+ ", text, re.MULTILINE):
            raise PatchError(path, [("its header", "needs a line 'Subject: …' and a unified diff after it")])
        patches.append(Patch(path, subject[1].strip(), files.sha256(path)))
    return tuple(patches)


def grow(archive: Path, patches: Sequence[Patch], path: Path) -> Tree:
    """Unpack ``archive`` and apply ``patches``; the result becomes ``path`` only when all of it is done.

    Raises:
        ArchiveError: the archive is broken or unsafe.
        PatchError: a patch does not apply.
    """
    with files.replacing_folder(path) as beside:
        epoch = unpack(archive, beside)
        for patch in patches:
            apply(patch, beside)
    return Tree(path, epoch)


def unpack(archive: Path, folder: Path, limits: Limits = LIMITS) -> int:
    """Unpack a tar, zip, wheel or Debian archive; a single top folder is left out, as sdists have one.

    Gives the newest time of its members. Modes become 644 or 755 and owners the caller's. Memory is bounded, whatever
    the archive says of itself; and but for what breaks in the middle, nothing is written of one that is refused.

    Raises:
        ArchiveError: it is broken or too large, or a member is absolute, climbs out, is a device, links outside,
            appears twice, or, but in a Debian archive, differs from another by case alone.
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
            _refuse(archive, _astray(folder))  # last: a link that stayed inside may lead out of what was lifted
        except ArchiveError:
            files.remove(folder)
            raise
    except BROKEN as error:
        raise ArchiveError(archive, [f"is broken: {shown(str(error) or type(error).__name__)}"]) from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise ArchiveError(archive, [f"{error.filename or folder}: {error.strerror}"]) from error
        raise ArchiveError(archive, [f"is broken: {error}"]) from error  # gzip says it so, and seek of an absurd place
    return epoch


def apply(patch: Patch, folder: Path) -> None:
    """Apply one patch with no fuzz, by GNU patch; a failed one changes nothing.

    Raises:
        PatchError: naming each file and hunk that did not apply.
    """
    words = ["patch", "--strip=1", "--fuzz=0", "--force", "--no-backup-if-mismatch", "--reject-file=-",
             f"--directory={folder.absolute()}", f"--input={patch.path.absolute()}"]  # fmt: skip
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}  # without POSIXLY_CORRECT and its like
    try:
        run([*words, "--dry-run"], env=environment)
        run(words, env=environment)
    except ProgramFailed as error:
        if error.status is None:
            raise VoltforgeError("GNU patch is not installed", hint="apt-get install patch") from error
        raise PatchError(patch.path, list(_rejects(error.output))) from error


def sync(tree: Path, folder: Path) -> None:
    """Make the sources in ``folder`` those of ``tree``, writing only the files that differ.

    Unchanged files keep their times, so that a build tree in ``folder`` compiles again only what a
    changed patch touches. Files that an earlier call brought and ``tree`` has no more are removed;
    what a build made there stays.
    """
    manifest = folder.parent / f"{folder.name}.manifest.json"
    names = [str(path.relative_to(tree)) for path in sorted(tree.rglob("*")) if path.is_symlink() or not path.is_dir()]
    brought = files.read_json(manifest) or []
    files.write_json(manifest, sorted({*brought, *names}))
    for name in set(brought) - set(names):
        _drop(folder, name)
    for name in names:
        if not _same(tree / name, folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.remove(folder / name)  # even a folder: of what was once a file's
            shutil.copy(tree / name, folder / name, follow_symlinks=False)
    files.write_json(manifest, names)


def _drop(folder: Path, name: str) -> None:
    """Remove a file and the folders that this leaves empty; what has become a folder by now holds newer files."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        (folder / name).unlink()
    with contextlib.suppress(OSError):
        for parent in (folder / name).relative_to(folder).parents[:-1]:
            (folder / parent).rmdir()


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.stat().st_mode == other.stat().st_mode and one.read_bytes() == other.read_bytes()


def _recheck(patch: Path) -> str:
    """What a patch's header says to look at when upstream moves; without that, where upstream it applies."""
    header = patch.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if patch.is_file() else ""
    for field in ("Re-check", "Upstream"):
        if found := re.search(rf"^{field}: (.+(?:\n[ \t].+)*)", header, re.MULTILINE):
            return " ".join(found[1].split())
    return "the places that it names"


def _rejects(output: str) -> Iterator[tuple[str, str]]:
    file, found = "the patch", False
    for line in output.splitlines():
        if named := re.match(r"(?:patching|checking) file '?(.+?)'?$", line):
            file = named[1]
        elif re.match(r"Hunk #\d+ FAILED|.*ignored|.*malformed|can't find file", line):
            found = True
            yield file, line.strip()
    if not found:
        yield file, (output.strip().splitlines() or ["patch said nothing"])[-1]


def name_problem(name: str) -> str | None:
    """What keeps a member's name from being a file's inside the folder it is unpacked to, as a sentence about it."""
    path = PurePosixPath(name)
    if _CLUMSY.search(name):
        return f"{shown(name)}: is no portable name"
    if path.is_absolute():
        return f"{shown(name)}: is absolute"
    if ".." in path.parts:
        return f"{shown(name)}: climbs out with '..'"
    if len(name.encode()) > _LONGEST or any(len(part.encode()) > _LONGEST_PART for part in path.parts):
        return f"{shown(name)}: is too long a name"
    if len(path.parts) > _DEEPEST:
        return f"{shown(name)}: lies too deep"
    return None


def shown(text: str) -> str:
    """Words of an archive as a person may be shown them."""
    short = text if len(text) <= 200 else f"{text[:200]}…"
    return repr(short) if _CLUMSY.search(short) else short


def _refuse(archive: Path, problems: Iterable[str]) -> None:
    if first := list(itertools.islice(problems, 20)):
        raise ArchiveError(archive, first)


def _conflicts(names: Sequence[str], folders: Iterable[str], *, case: bool) -> Iterator[str]:
    """What members do to each other, by their normalised names; ``names`` are those of files and links.

    ``case``: whether two may differ in case alone, or in how Unicode spells them. Some file systems keep one of them.
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
            yield f"{shown(name)}: is the same as {shown(other)} where case does not count"


def _folded(name: str) -> str:
    """Equal for names that a file system without case takes for one (Unicode 3.13, D145)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


class _Tape:
    """The bytes of a tar archive for ``tarfile``, which itself believes whatever length a header states.

    While headers are read, what they may take is bounded, and those that older releases of Python read in quadratic
    time (CVE-2024-6232 and its like) are refused.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left: int | None = _HEADERS
        self._kind = b""
        """Of which kind the header is whose content comes next."""

    def read(self, size: int = -1) -> bytes:
        if self._left is None:
            return self._file.read(size)
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError("a member's headers are too long, or of a negative length")
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
        """Let the headers of one more member be read."""
        assert self._left is not None
        self._left = min(_HEADERS, self._left + _HEADER)

    def finish(self, end: int) -> None:
        """Check that the archive ends at ``end`` as one should, and read on to where its compression has a checksum.

        From then on files are read, without bounds.

        Raises:
            tarfile.TarError: it does not: what follows is damaged, or missing.
        """
        self._left = None
        self.seek(end)
        mark = self.read(_BLOCK)
        if len(mark) < _BLOCK or any(mark):
            raise tarfile.ReadError(f"what stands at byte {end} is neither a member nor the archive's end")
        rest = 0
        while block := self.read(files.BLOCK):
            rest += len(block)
            if rest > _REST:
                raise tarfile.ReadError("it goes on behind its end")


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
        tape = _Tape(file)
        with tarfile.open(fileobj=cast(IO[bytes], tape), mode="r:") as tar:
            members = _members(archive, tar, tape, limits, debian=debian)
            _refuse(archive, _tar_problems(members, case=debian))
            for member in members:
                member.mode = 0o755 if member.isdir() or member.mode & stat.S_IXUSR else 0o644
                member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            # A second pair of eyes, where it exists: from Python 3.10.12 and 3.11.4 on (PEP 706), so not on Debian 12.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            # Links come last, so that nothing can be written by way of one.
            tar.extractall(folder, sorted(members, key=tarfile.TarInfo.issym))
    return int(max((0, *(member.mtime for member in members))))


def _members(
    archive: Path, tar: tarfile.TarFile, tape: _Tape, limits: Limits, *, debian: bool
) -> list[tarfile.TarInfo]:
    """The members of a tar archive, read no further than the bounds allow."""
    members: list[tarfile.TarInfo] = []
    problems: list[str] = []
    size = count = 0
    while len(problems) < 20 and (member := tar.next()) is not None:
        size, count = size + member.size, count + 1
        if (problem := _trap(member, tar)) or (problem := _beyond(size, count, limits)):
            _refuse(archive, [problem])
        member.pax_headers = {}  # each member has a copy of all global ones
        tape.next_member()
        if not (debian and member.issym() and member.linkname.startswith("/")):
            members.append(member)
            problems += _member_problems(member)
    _refuse(archive, problems)
    tape.finish(tar.offset)
    if not count:
        raise tarfile.ReadError("it holds nothing")
    return members


def _trap(member: tarfile.TarInfo, tar: tarfile.TarFile) -> str | None:
    """Why no header behind a member's may be looked for: it would be in the wrong place, or the search have no end."""
    if member.size < 0:  # the next header would be in front of this one (CVE-2025-8194)
        return f"{shown(member.name)}: has a size below zero"
    if member.issparse():  # how much is written of one has nothing to do with its size
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
    """What can be said against a member of a tar archive by itself."""
    name = shown(member.name)
    if problem := name_problem(member.name):
        yield problem
    elif member.isdev():
        yield f"{name}: is a device or a pipe"
    elif not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        yield f"{name}: is of an unknown kind, {member.type!r}"
    elif not member.isdir() and os.path.normpath(member.name) == ".":
        yield f"{name}: is no name of a file"
    elif not -_LATEST < member.mtime < _LATEST:
        yield f"{name}: has a time that no calendar tells"
    elif member.issym() or member.islnk():
        base = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
        target = os.path.normpath(base / member.linkname)
        if target == ".." or target.startswith(("/", "../")):
            yield f"{name}: links outside, to {shown(member.linkname)}"
        elif _CLUMSY.search(member.linkname) or len(member.linkname) > _LONGEST:
            yield f"{name}: links to {shown(member.linkname)}, which is no portable name"
        elif member.islnk() and ".." in PurePosixPath(member.linkname).parts:
            yield f"{name}: links to {shown(member.linkname)}, which is no name of a member"


def _tar_problems(members: Sequence[tarfile.TarInfo], *, case: bool) -> Iterator[str]:
    """What members of a tar archive do to each other."""
    links = {os.path.normpath(member.name) for member in members if member.issym()}
    for member in members if links else ():
        name, target = os.path.normpath(member.name), os.path.normpath(member.linkname)
        if member.islnk() and (target in links or _below(links, target)):
            yield f"{shown(member.name)}: links to {shown(member.linkname)}, by way of a link"
        if through := _below(links, name):
            yield f"{shown(member.name)}: lies below a link, {shown(min(through))}"
    others = [os.path.normpath(member.name) for member in members if not member.isdir()]
    yield from _conflicts(others, (os.path.normpath(member.name) for member in members if member.isdir()), case=case)


def _below(links: Set[str], name: str) -> set[str]:
    """Those of ``links`` that a path goes through."""
    return {parent for parent in map(str, PurePosixPath(name).parents) if parent in links}


def _astray(folder: Path) -> Iterator[str]:
    """What is wrong with where the links in a folder lead."""
    inside = folder.resolve()
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        name = shown(str(link.relative_to(folder)))
        if _endless(link):
            yield f"{name}: links to itself, by way of other links"
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
    """What speaks against unpacking a zip archive, as sentences.

    ``zipfile`` gives no more bytes of a member than the directory states, whatever they inflate to, so that a bound on
    what is stated is one on what is written.
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
            # zipfile inflates whole blocks of these, and a few kB of bzip2 may be gigabytes.
            yield f"{shown(name)}: is compressed in another way than by deflate"
        elif not member.is_dir() and os.path.normpath(name) == ".":
            yield f"{shown(name)}: is no name of a file"
    names = [os.path.normpath(member.filename) for member in members if not member.is_dir()]
    folders = (os.path.normpath(member.filename) for member in members if member.is_dir())
    yield from _conflicts(names, folders, case=False)
    yield from _contradictions(bundle)


def _contradictions(bundle: zipfile.ZipFile) -> Iterator[str]:
    """Where a zip archive's directory and the headers in front of its files differ, or files share their bytes.

    Programs that read it from its beginning would find other files in it than those that go by the directory.
    """
    file, end = cast(IO[bytes], bundle.fp), 0
    for member in sorted(bundle.infolist(), key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        mark, _, flags, method, _, _, crc, packed, size, length, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        name = file.read(length).decode("utf-8" if flags & _UTF8 else "cp437")
        told = (crc, packed if packed != _ZIP64 else member.compress_size, size if size != _ZIP64 else member.file_size)
        truth = (member.CRC, member.compress_size, member.file_size)
        streamed = flags & _STREAMED and told == (0, 0, 0)
        if (mark, name, method) != (b"PK\3\4", member.orig_filename, member.compress_type) or not (
            told == truth or streamed
        ):
            yield f"{shown(member.filename)}: is told in two ways, in front of it and in the archive's directory"
        if member.header_offset < end:
            yield f"{shown(member.filename)}: lies in the bytes of another member"
        end = max(end, member.header_offset + _LOCAL.size + length + extra + member.compress_size)
    if end > bundle.start_dir:
        yield "has members that reach into its directory"


def extract(bundle: zipfile.ZipFile, folder: Path) -> None:
    """Write the members of a zip archive that :func:`zip_problems` has nothing against: modes 644 or 755.

    Raises:
        FileExistsError: one of them is there already.
        Exception: whatever ``zipfile`` finds to be damaged, see ``BROKEN``.
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
    """Its time, which has no zone, as if in UTC; some writers leave it 0, which is no date."""
    year, month, day, *clock = member.date_time
    return calendar.timegm((year, max(month, 1), max(day, 1), *clock))


def _unpack_deb(archive: Path, folder: Path, limits: Limits) -> int:
    """Unpack the files of a Debian package, deb(5), whose parts binutils' ar reads.

    Its absolute links refer to the system that it would be installed on and are left out. Names may differ in case
    alone: it is made for file systems that tell them apart, and the kernel's headers have such names.
    """
    if not shutil.which("ar"):
        raise VoltforgeError("ar is not installed, which opens Debian packages", hint="apt-get install binutils")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            parts = run(["ar", "t", archive.absolute()]).output.split()
            [data] = [part for part in parts if re.fullmatch(r"data\.tar(\.\w+)?", part)]
            run(["ar", "x", archive.absolute(), data], cwd=Path(scratch))
        except (ProgramFailed, ValueError) as error:
            raise ArchiveError(archive, ["is no Debian package that ar can read"]) from error
        return _unpack_tar(Path(scratch, data), folder, limits, debian=True)


def _lift_single_folder(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        lifted = Path(tempfile.mkdtemp(dir=folder))  # so that the folder may hold one of its own name
        single = entries[0].rename(lifted / "single")
        for entry in list(single.iterdir()):
            entry.rename(folder / entry.name)
        single.rmdir()
        lifted.rmdir()
