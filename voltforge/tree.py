"""A source tree: an archive unpacked safely and the patch series applied to it, all of it or nothing."""

from __future__ import annotations

import calendar
import contextlib
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from voltforge import files
from voltforge.errors import VoltforgeError, listed
from voltforge.process import ProgramFailed, run

MAX_UNPACKED = 20 * 10**9
"""Bytes that an archive may unpack to; PyTorch's release tarball is well below 3 GB."""
BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, KeyError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip
"""What the standard library raises for a truncated, corrupt, encrypted or absurd archive, but for some OSErrors."""


class ArchiveError(VoltforgeError):
    """An archive that is broken, or that would write outside its folder."""

    def __init__(self, archive: Path, problems: Sequence[str]) -> None:
        super().__init__(
            f"{archive.name} was not unpacked:{listed(list(problems))}",
            hint="fetch it anew; if its hash is the recipe's, the archive itself is not to be trusted",
        )
        self.problems = tuple(problems)


class PatchError(VoltforgeError):
    """A patch that does not apply as it stands, with the file and the hunks."""

    def __init__(self, patch: Path, rejects: Sequence[tuple[str, str]]) -> None:
        where = listed([f"{file}: {why}" for file, why in rejects])
        super().__init__(
            f"{patch.parent.name}/{patch.name} does not apply:{where}",
            hint="the tree is as it was; compare the patch's Upstream: lines with the source it is applied to",
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

    path: Path
    epoch: int
    """The newest time of the archive's members in seconds since 1970: the build's SOURCE_DATE_EPOCH."""


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


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a tar, zip, wheel or Debian archive; a single top folder is left out, as sdists have one.

    Gives the newest time of its members. Modes become 644 or 755 and owners the caller's.

    Raises:
        ArchiveError: it is broken, too large, or a member is absolute, climbs out, is a device, links outside,
            or appears twice.
    """
    try:
        if archive.suffix in (".zip", ".whl"):
            epoch = _unpack_zip(archive, folder)
        elif archive.suffix == ".deb":
            epoch = _unpack_deb(archive, folder)
        else:
            epoch = _unpack_tar(archive, folder)
        _lift_single_folder(folder)
    except BROKEN as error:
        raise ArchiveError(archive, [f"is broken: {error}"]) from error
    except OSError as error:
        if error.errno is not None:
            raise ArchiveError(archive, [f"{error.filename or folder}: {error.strerror}"]) from error
        raise ArchiveError(archive, [f"is broken: {error}"]) from error  # gzip says it so
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


def _unsafe(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute():
        return f"{name}: is absolute"
    if ".." in path.parts:
        return f"{name}: climbs out with '..'"
    if "\\" in name or "\0" in name:
        return f"{name!r}: is no portable name"
    return None


def _refuse(archive: Path, problems: list[str]) -> None:
    if problems:
        raise ArchiveError(archive, problems[:20])


def _unpack_tar(archive: Path, folder: Path, *, rooted: bool = False) -> int:
    with tarfile.open(archive) as tar:
        members = [member for member in tar if not (rooted and member.issym() and member.linkname.startswith("/"))]
        _refuse(archive, _tar_problems(members))
        for member in members:
            member.mode = 0o755 if member.isdir() or member.mode & stat.S_IXUSR else 0o644
            member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
        # A second pair of eyes, where it exists: from Python 3.10.12 and 3.11.4 on (PEP 706), so not on Debian 12.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder, members)
    links = [member.name for member in members if member.issym()]
    outside = [name for name in links if not (folder / name).resolve().is_relative_to(folder.resolve())]
    _refuse(archive, [f"{name}: links outside, by way of other links" for name in outside])
    return int(max((0, *(member.mtime for member in members))))


def _tar_problems(members: Sequence[tarfile.TarInfo]) -> list[str]:
    problems: list[str] = []
    seen: set[str] = set()
    links = {os.path.normpath(member.name) for member in members if member.issym()}
    for member in members:
        name = os.path.normpath(member.name)
        if problem := _unsafe(member.name):
            problems.append(problem)
        elif member.isdev():
            problems.append(f"{member.name}: is a device or a pipe")
        elif member.issym() or member.islnk():
            base = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
            target = os.path.normpath(base / member.linkname)
            if target == ".." or target.startswith(("/", "../")):
                problems.append(f"{member.name}: links outside, to {member.linkname}")
            elif member.islnk() and (target in links or _below(links, target)):
                problems.append(f"{member.name}: links to {member.linkname}, by way of a link")
        if through := _below(links, name):
            problems.append(f"{member.name}: lies below a link, {min(through)}")
        if not member.isdir():
            if name in seen:
                problems.append(f"{member.name}: appears twice")
            seen.add(name)
    if sum(member.size for member in members) > MAX_UNPACKED:
        problems.append(f"unpacks to more than {files.size(MAX_UNPACKED)}")
    return problems


def _below(links: Set[str], name: str) -> set[str]:
    """Those of ``links`` that a path goes through."""
    return {parent for parent in map(str, PurePosixPath(name).parents) if parent in links}


def _unpack_zip(archive: Path, folder: Path) -> int:
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        count = Counter(os.path.normpath(member.filename) for member in members if not member.is_dir())
        problems = [problem for member in members if (problem := _unsafe(member.filename))]
        problems += [f"{name}: appears twice" for name in sorted(count) if count[name] > 1]
        problems += [f"{m.filename}: is a link" for m in members if stat.S_ISLNK(m.external_attr >> 16)]
        if sum(member.file_size for member in members) > MAX_UNPACKED:
            problems.append(f"unpacks to more than {files.size(MAX_UNPACKED)}")
        _refuse(archive, problems)
        for member in members:
            path = Path(bundle.extract(member, folder))
            if not member.is_dir():
                path.chmod(0o755 if (member.external_attr >> 16) & stat.S_IXUSR else 0o644)
    return max((0, *(_zip_time(member) for member in members)))


def _zip_time(member: zipfile.ZipInfo) -> int:
    """Its time, which has no zone, as if in UTC; some writers leave it 0, which is no date."""
    year, month, day, *clock = member.date_time
    return calendar.timegm((year, max(month, 1), max(day, 1), *clock))


def _unpack_deb(archive: Path, folder: Path) -> int:
    """Unpack the files of a Debian package, deb(5), whose parts binutils' ar reads.

    Its absolute links refer to the system that it would be installed on and are left out.
    """
    if not shutil.which("ar"):
        raise VoltforgeError("ar is not installed, which opens Debian packages", hint="apt-get install binutils")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            data = next(part for part in run(["ar", "t", archive]).output.split() if part.startswith("data.tar"))
            run(["ar", "x", archive.absolute(), data], cwd=Path(scratch))
        except (ProgramFailed, StopIteration) as error:
            raise ArchiveError(archive, ["is no Debian package that ar can read"]) from error
        return _unpack_tar(Path(scratch, data), folder, rooted=True)


def _lift_single_folder(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        lifted = Path(tempfile.mkdtemp(dir=folder))  # so that the folder may hold one of its own name
        single = entries[0].rename(lifted / "single")
        for entry in list(single.iterdir()):
            entry.rename(folder / entry.name)
        single.rmdir()
        lifted.rmdir()
