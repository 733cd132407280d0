"""Wheels: opened with care, retagged for what their binaries need, and written so that equal content is equal bytes.

The specifications are the binary distribution format (PEP 427), RECORD (PEP 376, PEP 627), platform tags (PEP 600)
and the zip format as `zipfile` writes it.
"""

from __future__ import annotations

import base64
import csv
import email
import email.policy
import hashlib
import io
import itertools
import logging
import math
import os
import re
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.tags import Tag, parse_tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from voltforge.binary import elf
from voltforge.errors import VoltforgeError, listed
from voltforge.sources.archive import Limits, extract, name_problem, shown, zip_problems
from voltforge.system import files

if TYPE_CHECKING:
    from auditwheel.wheel_abi import WheelAbIInfo  # type: ignore[import-untyped]

PROVIDED = (
    "libtorch.so", "libtorch_*.so", "libc10.so", "libc10_*.so", "libshm.so",
    "libcuda.so.1", "libcudart.so.*", "libnvrtc.so.*", "libnvToolsExt.so.*", "libnvJitLink.so.*",
    "libcublas.so.*", "libcublasLt.so.*", "libcudnn*.so.*", "libcufft.so.*", "libcufile.so.*", "libcupti.so.*",
    "libcurand.so.*", "libcusolver.so.*", "libcusparse.so.*", "libcusparseLt.so.*", "libnccl.so.*",
    "libnvshmem_host.so.*",
)  # fmt: skip
"""Patterns of SONAMEs that the driver and the wheels of PyTorch and NVIDIA bring: they bind to no distribution."""

DEFLATE = f"zlib {zlib.ZLIB_RUNTIME_VERSION}, level 6"
"""What decides the compressed bytes besides the content: another zlib may write another, equally valid, wheel.

Level 6 is zlib's default. For 28 MB of sm_70 code 9 takes three times as long and saves 1 %.
"""
GENERATOR = "voltforge"

_EARLIEST, _LATEST = 315_532_800, 4_354_819_198
"""The first and the last moment that a zip file can say: 1980-01-01 and 2107-12-31 (APPNOTE 4.4.6, MS-DOS time)."""
LIMITS = Limits(size=64_000_000_000)
"""Beyond which a wheel is taken for a trap; the largest known wheel unpacks to under 5 GB, and has 12,000 files."""
_MOST_TEXT = 2_000_000
"""Bytes of METADATA or WHEEL beyond which it is not read; those with a long README have a tenth of it."""
_MOST_RECORD = 100_000_000
"""Bytes of RECORD beyond which it is not read; torch's is 1.4 MB."""
_MOST_TAGS = 1000
"""Tags that one line of WHEEL may stand for, which are as many as the product of what stands between its points."""
_SIGNATURES = ("RECORD.jws", "RECORD.p7s")

# auditwheel tells its steps through logging; without a handler Python prints some of them to standard error.
logging.getLogger("auditwheel").addHandler(logging.NullHandler())


class WheelError(VoltforgeError):
    """A wheel that is not what the specification asks for, or that must not be opened."""


@dataclass(frozen=True)
class Wheel:
    """A wheel file and what it says about itself."""

    path: Path
    name: str
    """The normalised project name (PEP 503)."""
    version: Version
    tags: frozenset[Tag]
    """The tags of its file name."""
    declared: frozenset[Tag]
    """The tags of its WHEEL file, which should be the same."""
    metadata: Metadata
    requires: tuple[Requirement, ...]
    """Requires-Dist, in order, those of extras included."""

    @classmethod
    def read(cls, path: Path, limits: Limits = LIMITS) -> Wheel:
        """Read the file name, METADATA and WHEEL of a wheel.

        Raises:
            WheelError: it is no well-formed wheel, or they contradict each other.
        """
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise WheelError(f"{path} is not named like a wheel: {error}") from error
        try:
            with zipfile.ZipFile(path) as archive:
                _check_entries(path, archive, limits)
                folder = _only_dist_info(path, _top(archive))
                metadata = Metadata.from_email(_text(path, archive, f"{folder}/METADATA"))
                declared = _declared_tags(path, _text(path, archive, f"{folder}/WHEEL"))
        except WheelError:
            raise
        except Exception as error:
            # zipfile raises a dozen types for malformed files, packaging a group of errors: each is a bad wheel.
            raise WheelError(f"{path} is not a well-formed wheel: {_sentence(error)}") from error
        if (canonicalize_name(metadata.name), metadata.version) != (name, version):
            raise WheelError(
                f"{path} holds the metadata of {metadata.name} {metadata.version}, not of {name} {version}"
            )
        if _project(folder) != (name, version):
            raise WheelError(f"{path} holds {folder}, which does not go with its file name")
        return cls(path, name, version, tags, declared, metadata, tuple(metadata.requires_dist or ()))


@dataclass(frozen=True)
class PlatformTag:
    """Where a wheel's binaries can be loaded."""

    tag: str
    """The platform tag: ``manylinux_2_36_x86_64``, ``linux_x86_64``, or ``any`` if there are no binaries."""
    why: str
    """What decided it, in a sentence."""
    glibc: str | None
    """The oldest glibc that has all they ask for, such as ``2.34``."""
    libstdcxx: str | None
    """The newest GLIBCXX version that they ask for, such as ``3.4.30`` (gcc 12)."""


def unpack(path: Path, folder: Path, limits: Limits = LIMITS) -> None:
    """Put a wheel's files into ``folder``, which is made if need be: modes 644, or 755 for those marked executable.

    Raises:
        WheelError: it is no zip file, an entry is damaged, or one would be written outside ``folder`` or as a link.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive, limits)
            extract(archive, folder)
    except WheelError:
        raise
    except Exception as error:
        # zipfile raises a dozen types for malformed files, from BadZipFile to struct.error and zlib.error.
        raise WheelError(f"{path} cannot be unpacked: {_sentence(error)}") from error


def normalise(folder: Path, out_dir: Path, *, tag: str, epoch: int) -> Path:
    """Write the unpacked wheel in ``folder`` to ``out_dir`` so that equal content gives equal bytes.

    Neither the order, times, owners and umask of the files nor the locale show in the result: entries are sorted with
    the dist-info folder last, times are ``epoch``, modes are 644 or 755, RECORD and the Tag and Generator lines of
    WHEEL are written anew, signatures of the old RECORD are left out. ``folder`` itself is not changed.

    Args:
        folder: an unpacked wheel, with one ``*.dist-info`` folder.
        out_dir: where the wheel goes; an older one of the same name is replaced.
        tag: the compatibility tag, such as ``cp38-abi3-manylinux_2_36_x86_64``.
        epoch: seconds since 1970 for all entries (SOURCE_DATE_EPOCH); taken as 1980 if before.

    Raises:
        WheelError: ``folder`` is no unpacked wheel, or holds something that a wheel cannot.
    """
    return _pack(folder, out_dir, tag=tag, epoch=epoch, method=zipfile.ZIP_DEFLATED)


def record_problems(folder: Path) -> list[str]:
    """What an unpacked wheel's RECORD says wrongly, a sentence each: hashes, sizes, files missing on either side."""
    dist_info = _only_dist_info(folder, {child.name for child in folder.iterdir()})
    record = f"{dist_info}/RECORD"
    try:
        if (folder / record).stat().st_size > _MOST_RECORD:
            return [f"{record} has more than {files.size(_MOST_RECORD)}"]
        rows = list(csv.reader(io.StringIO((folder / record).read_text("utf-8"), newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        return [f"{record} cannot be read: {_sentence(error)}"]
    problems, listed_names = [], set()
    unsigned = {record, *(f"{dist_info}/{name}" for name in _SIGNATURES)}
    present = set(members(folder))
    for row in rows:
        if len(row) != 3:
            problems.append(f"{record} has a line of {len(row)} fields, not 3: {shown(','.join(row)[:80])}")
            continue
        name, digest, size = row
        if name in listed_names:
            problems.append(f"{shown(name)} stands in RECORD twice")
        listed_names.add(name)
        if name not in present:
            problems.append(f"{shown(name)} stands in RECORD but is missing")
        elif name in unsigned:
            continue
        elif not digest.startswith("sha256="):
            problems.append(f"{name} has no sha256 in RECORD")
        elif (now := _hash(folder / name)) != digest:
            problems.append(f"{name} does not have the hash of RECORD: it is {now}")
        elif size and size != str((folder / name).stat().st_size):
            problems.append(f"{name} does not have the size of RECORD, {shown(size)} bytes")
    problems += [f"{name} is missing from RECORD" for name in sorted(present - listed_names - unsigned)]
    return problems


def platform_tag(path: Path, exclude: Sequence[str] = PROVIDED) -> PlatformTag:
    """The platform tag that a wheel's binaries allow, by auditwheel's manylinux policies (PEP 600).

    Args:
        path: the wheel; its own platform tag is not looked at.
        exclude: patterns of SONAMEs that other wheels or the driver provide.

    Raises:
        WheelError: auditwheel cannot analyse it.
    """
    from auditwheel.error import AuditwheelError, NonPlatformWheelError  # type: ignore[import-untyped]
    from auditwheel.libc import Libc  # type: ignore[import-untyped]
    from auditwheel.wheel_abi import analyze_wheel_abi, get_wheel_elfdata  # all slow to import, and few runs come here

    # CUDA exists for glibc alone; left to guess, auditwheel gives up on an extension that does not name its C library.
    # And it remembers a wheel by its path, where another may have been written since.
    get_wheel_elfdata.cache_clear()
    try:
        found = analyze_wheel_abi(
            Libc.GLIBC, None, path, frozenset(exclude), disable_isa_ext_check=False, allow_graft=False
        )  # fmt: skip
    except NonPlatformWheelError:
        return PlatformTag("any", "it holds no binaries", None, None)
    except Exception as error:
        # Its errors are AuditwheelError, RuntimeError, ValueError and whatever pyelftools meets.
        kind = "is not a wheel that auditwheel accepts" if isinstance(error, AuditwheelError) else "cannot be analysed"
        raise WheelError(f"{path} {kind}: {_sentence(error)}") from error
    versions = {version for group in found.versioned_symbols.values() for version in group}
    glibc, libstdcxx = _newest("GLIBC", versions), _newest("GLIBCXX", versions)
    return PlatformTag(found.overall_policy.name, _why(found, glibc, libstdcxx), glibc, libstdcxx)


def finish(
    path: Path,
    out_dir: Path,
    *,
    runpath: Mapping[str, Sequence[str]],
    exclude: Sequence[str] = PROVIDED,
    epoch: int,
    complete: Callable[[Path, int], None] = lambda *_: None,
) -> Path:
    """Make a wheel as a build backend left it fit to publish: stripped, with the right RUNPATHs and tag, normalised.

    Args:
        path: the wheel.
        out_dir: where the finished one goes.
        runpath: RUNPATH entries by pattern of path inside the wheel: ``{"vllm/*.so": ["$ORIGIN/../torch/lib"]}``;
            binaries that no pattern names keep theirs.
        exclude: see :func:`platform_tag`.
        epoch: see :func:`normalise`.
        complete: is given the unpacked wheel and the epoch, to put in what describes the rest.

    Raises:
        WheelError: it is no well-formed wheel, or a pattern names no binary in it.
    """
    Wheel.read(path)
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        folder = Path(name) / "wheel"
        unpack(path, folder)
        for file in _binaries(folder):
            elf.strip(folder / file)
        set_runpaths(folder, runpath)
        complete(folder, epoch)
        prefix = "-".join(path.stem.split("-")[-3:-1])
        # Only what is about to be published is analysed, so it is packed twice, the first time without compression.
        provisional = _pack(folder, Path(name), tag=f"{prefix}-linux_x86_64", epoch=epoch, method=zipfile.ZIP_STORED)
        platform = platform_tag(provisional, exclude)
        return normalise(folder, out_dir, tag=f"{prefix}-{platform.tag}", epoch=epoch)


def dist_info(folder: Path) -> Path:
    """The dist-info folder of an unpacked wheel.

    Raises:
        WheelError: there is none, or several.
    """
    return folder / _only_dist_info(folder, {child.name for child in folder.iterdir()})


def set_runpaths(folder: Path, runpath: Mapping[str, Sequence[str]]) -> None:
    """Give the binaries of an unpacked wheel the RUNPATHs of :func:`finish`; the last pattern that fits counts.

    Raises:
        WheelError: a pattern names no binary in it.
    """
    binaries = _binaries(folder)
    wanted = {file: entries for pattern, entries in runpath.items() for file in _matching(folder, pattern, binaries)}
    for file, entries in wanted.items():
        elf.set_runpath(folder / file, entries)


def members(folder: Path) -> list[str]:
    """The paths of the files in ``folder`` and below it, with slashes, in no order.

    Raises:
        WheelError: something there is neither a file nor a folder, or has a name that is not UTF-8.
    """
    found, wrong = [], []
    for parent, folders, names in os.walk(folder):
        for name in names + [name for name in folders if (Path(parent) / name).is_symlink()]:
            file = Path(parent) / name
            member = file.relative_to(folder).as_posix()
            if file.is_symlink() or not file.is_file():
                wrong.append(f"{member} is neither a file nor a folder")
            elif not _encodes(member):
                wrong.append(f"{member!r} is not UTF-8")
            else:
                found.append(member)
    if wrong:
        raise WheelError(f"{folder} cannot become a wheel:{listed(sorted(wrong))}")
    return found


def _pack(folder: Path, out_dir: Path, *, tag: str, epoch: int, method: int) -> Path:
    dist_info = _only_dist_info(folder, {child.name for child in folder.iterdir()})
    stem = dist_info.removesuffix(".dist-info")
    header, build = _wheel_text(folder / dist_info / "WHEEL", tag)
    left_out = {f"{dist_info}/{name}" for name in ("RECORD", *_SIGNATURES)}
    names = sorted(set(members(folder)) - left_out, key=lambda name: (name.startswith(f"{dist_info}/"), name))
    when = time.gmtime(min(max(epoch, _EARLIEST), _LATEST))[:6]
    rows = []
    path = out_dir / f"{stem}-{build}{tag}.whl"
    with files.replacing(path) as sink, zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            source = folder / name
            entry = _entry(name, when, method, _mode(source, name, stem))
            with io.BytesIO(header) if name == f"{dist_info}/WHEEL" else source.open("rb") as content:
                entry.file_size = content.seek(0, os.SEEK_END)
                content.seek(0)
                with archive.open(entry, "w") as target:
                    rows.append((name, _copy(content, target), entry.file_size))
        archive.writestr(_entry(f"{dist_info}/RECORD", when, method, 0o644), _record(rows, f"{dist_info}/RECORD"))
    return path


def _entry(name: str, when: tuple[int, ...], method: int, mode: int) -> zipfile.ZipInfo:
    year, month, day, hour, minute, second = when
    entry = zipfile.ZipInfo(name, (year, month, day, hour, minute, second))
    entry.compress_type = method
    entry.create_system = 3  # Unix, whatever the machine
    entry.external_attr = (stat.S_IFREG | mode) << 16
    return entry


def _mode(source: Path, name: str, stem: str) -> int:
    # Stock wheels of torch, numpy and triton mark shared objects as executable, as linkers do.
    script = name.startswith(f"{stem}.data/scripts/")
    executable = script or elf.is_binary(source) or source.stat().st_mode & stat.S_IXUSR
    return 0o755 if executable else 0o644


def _copy(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """Copy to ``target``, if any, and give the hash as RECORD has it (PEP 376: urlsafe base64 without padding)."""
    digest = hashlib.sha256()
    while block := source.read(files.BLOCK):
        digest.update(block)
        if target:
            target.write(block)
    return "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return _copy(file)


def _record(rows: Sequence[tuple[str, str, int]], record: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
    return text.getvalue().encode()


def _wheel_text(path: Path, tag: str) -> tuple[bytes, str]:
    """The WHEEL file with stable Generator and Tag lines, and the build number as the file name has it."""
    try:
        old = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
        tags = parse_tag(tag)
    except (OSError, ValueError) as error:
        raise WheelError(f"{path} cannot be given the tag {tag}: {_sentence(error)}") from error
    lines = [
        f"Wheel-Version: {old.get('Wheel-Version', '1.0')}",
        f"Generator: {GENERATOR}",
        f"Root-Is-Purelib: {old.get('Root-Is-Purelib', 'false')}",
        *(f"Build: {build}" for build in old.get_all("Build", [])),
        *(f"Tag: {line}" for line in sorted(map(str, tags))),
    ]
    return ("\n".join(lines) + "\n").encode(), "".join(f"{build}-" for build in old.get_all("Build", []))


def _check_entries(path: Path, archive: zipfile.ZipFile, limits: Limits) -> None:
    """Refuse entries that would be written elsewhere or as something else than a file, the first of them at once."""
    plain = [
        f"{entry.filename!r} is not a plain relative path"
        for entry in archive.infolist()
        if not name_problem(entry.filename) and str(PurePosixPath(entry.filename)) != entry.filename.removesuffix("/")
    ]
    if problems := list(itertools.islice(itertools.chain(plain, zip_problems(archive, limits)), 20)):
        raise WheelError(f"{path} must not be unpacked:{listed(problems)}")


def _only_dist_info(where: Path, names: set[str]) -> str:
    found = sorted(name for name in names if name.endswith(".dist-info"))
    if len(found) != 1:
        raise WheelError(f"{where} has {len(found)} dist-info folders, not one")
    return found[0]


def _project(dist_info: str) -> tuple[str, Version]:
    name, _, version = dist_info.removesuffix(".dist-info").rpartition("-")
    try:
        return canonicalize_name(name), Version(version)
    except ValueError as error:
        raise WheelError(f"{dist_info} is not named for a project and its version") from error


def _text(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        entry = archive.getinfo(name)
    except KeyError as error:
        raise WheelError(f"{path} has no {name}") from error
    if entry.file_size > _MOST_TEXT:
        raise WheelError(f"{path} has a {name} of {files.size(entry.file_size)}")
    return archive.read(entry).decode()


def _declared_tags(path: Path, text: str) -> frozenset[Tag]:
    header = email.message_from_string(text)
    version = str(header.get("Wheel-Version", ""))
    if version.split(".")[0] != "1":
        raise WheelError(f"{path} has Wheel-Version {shown(version) or 'nowhere'}, and only 1 is known here")
    lines = [str(line) for line in header.get_all("Tag", [])]
    if len(lines) > _MOST_TAGS or any(math.prod(map(len, _alternatives(line))) > _MOST_TAGS for line in lines):
        raise WheelError(f"{path} has a WHEEL file of more than {_MOST_TAGS} tags")
    return frozenset(tag for line in lines for tag in parse_tag(line))


def _alternatives(tag: str) -> list[list[str]]:
    """What a compressed tag set leaves to choose from (PEP 425): pythons, ABIs, platforms."""
    return [part.split(".") for part in tag.split("-")]


def _binaries(folder: Path) -> list[str]:
    return [file for file in sorted(members(folder)) if elf.is_binary(folder / file)]


def _matching(folder: Path, pattern: str, binaries: Sequence[str]) -> list[str]:
    found = {file.relative_to(folder).as_posix() for file in folder.glob(pattern)}
    if not found.intersection(binaries):
        raise WheelError(f"no binary of the wheel matches {pattern!r}, for which there is a RUNPATH")
    return sorted(found.intersection(binaries))


def _newest(prefix: str, versions: set[str]) -> str | None:
    matches = (re.fullmatch(rf"{prefix}_(\d+(?:\.\d+)*)", version) for version in versions)
    return max((match[1] for match in matches if match), key=Version, default=None)


def _why(found: WheelAbIInfo, glibc: str | None, libstdcxx: str | None) -> str:
    foreign = sorted(found.external_refs[found.policies.lowest.name].libs)
    asked = " and ".join(
        text for text in (glibc and f"GLIBC_{glibc}", libstdcxx and f"GLIBCXX_{libstdcxx}") if text
    )  # fmt: skip
    if foreign and found.overall_policy == found.policies.linux:
        return f"it needs {', '.join(foreign)}, which no manylinux policy allows"
    if found.overall_policy < found.sym_policy:
        return f"its symbols would allow {found.sym_policy.name}, but its libraries or instructions do not"
    return f"its newest symbols are {asked}" if asked else "it asks for no versioned symbol"


def _sentence(error: BaseException) -> str:
    inner = getattr(error, "exceptions", None)
    text = "; ".join(map(_sentence, inner[:10])) if inner else shown(" ".join(str(error).split()))
    return text or type(error).__name__


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def metadata_bytes(path: Path) -> bytes:
    """The METADATA file of a wheel that :meth:`Wheel.read` accepts, byte for byte, as PEP 658 serves it."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{_only_dist_info(path, _top(archive))}/METADATA")


def _top(archive: zipfile.ZipFile) -> set[str]:
    return {entry.split("/")[0] for entry in archive.namelist()}


def sbom_bytes(path: Path) -> bytes | None:
    """The first SBOM in the dist-info folder of a wheel that :meth:`Wheel.read` accepts (PEP 770), if it has one."""
    with zipfile.ZipFile(path) as archive:
        found = sorted(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/sboms/[^/]+", name))
        return archive.read(found[0]) if found else None
