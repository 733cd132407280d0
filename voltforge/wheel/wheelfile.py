"""Read wheels safely, find their platform tag, and write them so that equal content gives equal bytes.

The specifications are the binary distribution format (PEP 427), RECORD (PEP 376, PEP 627), platform tags (PEP 600) and
the zip format as `zipfile` writes it.
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
"""Patterns of the SONAMEs that the driver and the wheels of PyTorch and NVIDIA provide on every distribution."""

DEFLATE = f"zlib {zlib.ZLIB_RUNTIME_VERSION}, level 6"
"""The compressor and its level. Another zlib may write other bytes for the same content.

Level 6 is zlib's default. For 28 MB of sm_70 code, level 9 takes three times as long and saves 1 %.
"""
GENERATOR = "voltforge"

_EARLIEST, _LATEST = 315_532_800, 4_354_819_198
"""The earliest and latest timestamps of a zip entry, in seconds since 1970: 1980-01-01 and 2107-12-31 (APPNOTE 4.4.6,
MS-DOS time).
"""
LIMITS = Limits(size=64_000_000_000)
"""Limits that protect against zip bombs. The largest known wheel unpacks to under 5 GB and has 12,000 files."""
_MAX_TEXT_SIZE = 2_000_000
"""The largest METADATA or WHEEL file that is read, in bytes. One with a long README has a tenth of it."""
_MAX_RECORD_SIZE = 100_000_000
"""The largest RECORD that is read, in bytes. That of torch has 1.4 MB."""
_MAX_TAGS = 1000
"""The most tags that one Tag line of WHEEL may expand to: the product of its numbers of pythons, ABIs and platforms."""
_SIGNATURES = ("RECORD.jws", "RECORD.p7s")

# auditwheel logs its steps; without a handler Python prints some of them to standard error.
logging.getLogger("auditwheel").addHandler(logging.NullHandler())


class WheelError(VoltforgeError):
    """A wheel violates the specification or is not safe to unpack."""


@dataclass(frozen=True)
class Wheel:
    """A wheel file with its metadata."""

    path: Path
    name: str
    """The normalised project name (PEP 503)."""
    version: Version
    tags: frozenset[Tag]
    """The tags in its file name."""
    declared: frozenset[Tag]
    """The tags in its WHEEL file, which should be the same."""
    metadata: Metadata
    requires: tuple[Requirement, ...]
    """Requires-Dist in order, with the requirements of extras."""

    @classmethod
    def read(cls, path: Path, limits: Limits = LIMITS) -> Wheel:
        """Read the file name, METADATA and WHEEL of a wheel.

        Raises:
            WheelError: the wheel is malformed, or these three contradict each other.
        """
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise WheelError(f"{path} does not have a wheel's file name: {error}") from error
        try:
            with zipfile.ZipFile(path) as archive:
                _check_entries(path, archive, limits)
                folder = _only_dist_info(path, _top_level_names(archive))
                metadata = Metadata.from_email(_small_file(path, archive, f"{folder}/METADATA"))
                declared = _declared_tags(path, _small_file(path, archive, f"{folder}/WHEEL"))
        except WheelError:
            raise
        except Exception as error:
            # zipfile raises a dozen types for malformed files, packaging a group of errors.
            raise WheelError(f"{path} is not a well-formed wheel: {_one_line(error)}") from error
        if (canonicalize_name(metadata.name), metadata.version) != (name, version):
            raise WheelError(f"{path} has the metadata of {metadata.name} {metadata.version}, not of {name} {version}")
        if _project(folder) != (name, version):
            raise WheelError(f"{path} has {folder}, which does not match its file name")
        return cls(path, name, version, tags, declared, metadata, tuple(metadata.requires_dist or ()))


@dataclass(frozen=True)
class PlatformTag:
    """The platform on which a wheel's binaries can be loaded."""

    tag: str
    """The platform tag: ``manylinux_2_36_x86_64``, ``linux_x86_64``, or ``any`` if there are no binaries."""
    why: str
    """The reason for this tag, in a sentence."""
    glibc: str | None
    """The oldest glibc that has all required symbols, such as ``2.34``."""
    libstdcxx: str | None
    """The newest GLIBCXX version that the binaries require, such as ``3.4.30`` (gcc 12)."""


def unpack(path: Path, folder: Path, limits: Limits = LIMITS) -> None:
    """Unpack a wheel into ``folder``, creating it if needed: modes 644, or 755 for entries marked executable.

    Raises:
        WheelError: it is not a zip file, an entry is damaged, is a link, or would be written outside ``folder``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive, limits)
            extract(archive, folder)
    except WheelError:
        raise
    except Exception as error:
        # zipfile raises a dozen types for malformed files, from BadZipFile to struct.error and zlib.error.
        raise WheelError(f"{path} cannot be unpacked: {_one_line(error)}") from error


def normalise(folder: Path, out_dir: Path, *, tag: str, epoch: int) -> Path:
    """Write the unpacked wheel in ``folder`` to ``out_dir`` so that equal content gives equal bytes.

    The order, times, owners and umask of the files and the locale do not change the result. Entries are sorted, with
    the dist-info folder last. Times are ``epoch``, modes are 644 or 755. RECORD and the Tag and Generator lines of
    WHEEL are written anew. Signatures of the old RECORD are left out. ``folder`` itself is not changed.

    Args:
        folder: an unpacked wheel, with one ``*.dist-info`` folder.
        out_dir: the folder for the wheel; an older wheel of the same name is replaced.
        tag: the compatibility tag, such as ``cp38-abi3-manylinux_2_36_x86_64``.
        epoch: the time of all entries in seconds since 1970 (SOURCE_DATE_EPOCH), moved into the range of zip.

    Raises:
        WheelError: ``folder`` is not an unpacked wheel, or holds a link, a device or a name that is not UTF-8.
    """
    return _pack(folder, out_dir, tag=tag, epoch=epoch, method=zipfile.ZIP_DEFLATED)


def record_problems(folder: Path) -> list[str]:
    """List all disagreements between an unpacked wheel and its RECORD: hashes, sizes, missing and unlisted files."""
    dist_info = _only_dist_info(folder, {child.name for child in folder.iterdir()})
    record = f"{dist_info}/RECORD"
    try:
        if (folder / record).stat().st_size > _MAX_RECORD_SIZE:
            return [f"{record} is larger than {files.size(_MAX_RECORD_SIZE)}"]
        rows = list(csv.reader(io.StringIO((folder / record).read_text("utf-8"), newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        return [f"{record} cannot be read: {_one_line(error)}"]
    problems, recorded = [], set()
    unsigned = {record, *(f"{dist_info}/{name}" for name in _SIGNATURES)}
    present = set(members(folder))
    for row in rows:
        if len(row) != 3:
            problems.append(f"{record} has a line of {len(row)} fields, not 3: {shown(','.join(row)[:80])}")
            continue
        name, digest, size = row
        if name in recorded:
            problems.append(f"{shown(name)} is in RECORD twice")
        recorded.add(name)
        if name not in present:
            problems.append(f"{shown(name)} is in RECORD but does not exist")
        elif name in unsigned:
            continue
        elif not digest.startswith("sha256="):
            problems.append(f"{name} has no sha256 in RECORD")
        elif (actual := _hash(folder / name)) != digest:
            problems.append(f"{name} does not match its hash in RECORD: its hash is {actual}")
        elif size and size != str((folder / name).stat().st_size):
            problems.append(f"{name} does not have its size in RECORD, {shown(size)} bytes")
    problems += [f"{name} is missing from RECORD" for name in sorted(present - recorded - unsigned)]
    return problems


def platform_tag(path: Path, exclude: Sequence[str] = PROVIDED) -> PlatformTag:
    """Return the platform tag that a wheel's binaries allow, by auditwheel's manylinux policies (PEP 600).

    Args:
        path: the wheel; its own platform tag is ignored.
        exclude: patterns of SONAMEs that other wheels or the driver provide.

    Raises:
        WheelError: auditwheel cannot analyse the wheel.
    """
    from auditwheel.error import AuditwheelError, NonPlatformWheelError  # type: ignore[import-untyped]
    from auditwheel.libc import Libc  # type: ignore[import-untyped]
    from auditwheel.wheel_abi import analyze_wheel_abi, get_wheel_elfdata  # slow to import, and seldom needed

    # CUDA exists for glibc only; without the first argument auditwheel refuses an extension that does not link the C
    # library. auditwheel caches by path, but another wheel may have been written to the same path since.
    get_wheel_elfdata.cache_clear()
    try:
        analysis = analyze_wheel_abi(
            Libc.GLIBC, None, path, frozenset(exclude), disable_isa_ext_check=False, allow_graft=False
        )  # fmt: skip
    except NonPlatformWheelError:
        return PlatformTag("any", "it holds no binaries", None, None)
    except Exception as error:
        # auditwheel raises AuditwheelError, RuntimeError, ValueError and the errors of pyelftools.
        kind = (
            "is not accepted by auditwheel"
            if isinstance(error, AuditwheelError)
            else "cannot be analysed by auditwheel"
        )
        raise WheelError(f"{path} {kind}: {_one_line(error)}") from error
    versions = {version for group in analysis.versioned_symbols.values() for version in group}
    glibc, libstdcxx = _newest("GLIBC", versions), _newest("GLIBCXX", versions)
    return PlatformTag(analysis.overall_policy.name, _tag_reason(analysis, glibc, libstdcxx), glibc, libstdcxx)


def finish(
    path: Path,
    out_dir: Path,
    *,
    runpath: Mapping[str, Sequence[str]],
    exclude: Sequence[str] = PROVIDED,
    epoch: int,
    complete: Callable[[Path, int], None] = lambda *_: None,
) -> Path:
    """Turn a build backend's wheel into the one to publish: strip it, set RUNPATHs and tag, normalise it.

    Args:
        path: the wheel.
        out_dir: the folder for the finished wheel.
        runpath: RUNPATH entries by pattern of path inside the wheel: ``{"vllm/*.so": ["$ORIGIN/../torch/lib"]}``;
            binaries that match no pattern keep theirs.
        exclude: see :func:`platform_tag`.
        epoch: see :func:`normalise`.
        complete: called with the unpacked wheel and the epoch, to add files such as the SBOM.

    Raises:
        WheelError: the wheel is malformed, or a pattern matches no binary in it.
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
        # auditwheel must see the stripped binaries, so pack twice, the first time without compression.
        provisional = _pack(folder, Path(name), tag=f"{prefix}-linux_x86_64", epoch=epoch, method=zipfile.ZIP_STORED)
        platform = platform_tag(provisional, exclude)
        return normalise(folder, out_dir, tag=f"{prefix}-{platform.tag}", epoch=epoch)


def dist_info(folder: Path) -> Path:
    """Return the dist-info folder of an unpacked wheel.

    Raises:
        WheelError: there is none, or there are several.
    """
    return folder / _only_dist_info(folder, {child.name for child in folder.iterdir()})


def set_runpaths(folder: Path, runpath: Mapping[str, Sequence[str]]) -> None:
    """Set the RUNPATHs of an unpacked wheel, as for :func:`finish`; the last matching pattern wins.

    Raises:
        WheelError: a pattern matches no binary.
    """
    binaries = _binaries(folder)
    wanted = {file: entries for pattern, entries in runpath.items() for file in _matching(folder, pattern, binaries)}
    for file, entries in wanted.items():
        elf.set_runpath(folder / file, entries)


def members(folder: Path) -> list[str]:
    """Return the paths of all files in ``folder``, relative to it and with slashes, in no order.

    Raises:
        WheelError: an entry is neither a file nor a folder, or its name is not UTF-8.
    """
    paths, problems = [], []
    for parent, folders, names in os.walk(folder):
        for name in names + [name for name in folders if (Path(parent) / name).is_symlink()]:
            file = Path(parent) / name
            member = file.relative_to(folder).as_posix()
            if file.is_symlink() or not file.is_file():
                problems.append(f"{member} is neither a file nor a folder")
            elif not _is_utf8(member):
                problems.append(f"{member!r} is not UTF-8")
            else:
                paths.append(member)
    if problems:
        raise WheelError(f"{folder} cannot be packed as a wheel:{listed(sorted(problems))}")
    return paths


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
                    rows.append((name, _copy_hashed(content, target), entry.file_size))
        archive.writestr(_entry(f"{dist_info}/RECORD", when, method, 0o644), _record(rows, f"{dist_info}/RECORD"))
    return path


def _entry(name: str, when: tuple[int, ...], method: int, mode: int) -> zipfile.ZipInfo:
    year, month, day, hour, minute, second = when
    entry = zipfile.ZipInfo(name, (year, month, day, hour, minute, second))
    entry.compress_type = method
    entry.create_system = 3  # Unix, on every machine
    entry.external_attr = (stat.S_IFREG | mode) << 16
    return entry


def _mode(source: Path, name: str, stem: str) -> int:
    # Stock wheels of torch, numpy and triton mark shared objects as executable, as linkers do.
    script = name.startswith(f"{stem}.data/scripts/")
    executable = script or elf.is_binary(source) or source.stat().st_mode & stat.S_IXUSR
    return 0o755 if executable else 0o644


def _copy_hashed(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """Copy to ``target``, if given, and return the hash in RECORD's form (PEP 376: urlsafe base64 without padding)."""
    digest = hashlib.sha256()
    while block := source.read(files.BLOCK):
        digest.update(block)
        if target:
            target.write(block)
    return "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return _copy_hashed(file)


def _record(rows: Sequence[tuple[str, str, int]], record: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
    return text.getvalue().encode()


def _wheel_text(path: Path, tag: str) -> tuple[bytes, str]:
    """Return the WHEEL file with stable Generator and Tag lines, and the build number for the file name."""
    try:
        old = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
        tags = parse_tag(tag)
    except (OSError, ValueError) as error:
        raise WheelError(f"{path} cannot be given the tag {tag}: {_one_line(error)}") from error
    lines = [
        f"Wheel-Version: {old.get('Wheel-Version', '1.0')}",
        f"Generator: {GENERATOR}",
        f"Root-Is-Purelib: {old.get('Root-Is-Purelib', 'false')}",
        *(f"Build: {build}" for build in old.get_all("Build", [])),
        *(f"Tag: {line}" for line in sorted(map(str, tags))),
    ]
    return ("\n".join(lines) + "\n").encode(), "".join(f"{build}-" for build in old.get_all("Build", []))


def _check_entries(path: Path, archive: zipfile.ZipFile, limits: Limits) -> None:
    """Raise for entries that are not plain files inside the wheel, naming the first 20."""
    plain = [
        f"{entry.filename!r} is not a plain relative path"
        for entry in archive.infolist()
        if not name_problem(entry.filename) and str(PurePosixPath(entry.filename)) != entry.filename.removesuffix("/")
    ]
    if problems := list(itertools.islice(itertools.chain(plain, zip_problems(archive, limits)), 20)):
        raise WheelError(f"{path} is not safe to unpack:{listed(problems)}")


def _only_dist_info(where: Path, names: set[str]) -> str:
    folders = sorted(name for name in names if name.endswith(".dist-info"))
    if len(folders) != 1:
        raise WheelError(f"{where} has {len(folders)} dist-info folders instead of one")
    return folders[0]


def _project(dist_info: str) -> tuple[str, Version]:
    name, _, version = dist_info.removesuffix(".dist-info").rpartition("-")
    try:
        return canonicalize_name(name), Version(version)
    except ValueError as error:
        raise WheelError(f"{dist_info} is not named after a project and its version") from error


def _small_file(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        entry = archive.getinfo(name)
    except KeyError as error:
        raise WheelError(f"{path} has no {name}") from error
    if entry.file_size > _MAX_TEXT_SIZE:
        raise WheelError(f"{path} has a {name} of {files.size(entry.file_size)}, which is too large")
    return archive.read(entry).decode()


def _declared_tags(path: Path, text: str) -> frozenset[Tag]:
    header = email.message_from_string(text)
    version = str(header.get("Wheel-Version", ""))
    if version.split(".")[0] != "1":
        raise WheelError(f"{path} has Wheel-Version {shown(version) or '(none)'}; only version 1 is supported")
    lines = [str(line) for line in header.get_all("Tag", [])]
    if len(lines) > _MAX_TAGS or any(math.prod(map(len, _alternatives(line))) > _MAX_TAGS for line in lines):
        raise WheelError(f"{path} has more than {_MAX_TAGS} tags in its WHEEL file")
    return frozenset(tag for line in lines for tag in parse_tag(line))


def _alternatives(tag: str) -> list[list[str]]:
    """Split a compressed tag set (PEP 425) into its pythons, ABIs and platforms."""
    return [part.split(".") for part in tag.split("-")]


def _binaries(folder: Path) -> list[str]:
    return [file for file in sorted(members(folder)) if elf.is_binary(folder / file)]


def _matching(folder: Path, pattern: str, binaries: Sequence[str]) -> list[str]:
    matches = {file.relative_to(folder).as_posix() for file in folder.glob(pattern)}
    if not matches.intersection(binaries):
        raise WheelError(f"no binary of the wheel matches the RUNPATH pattern {pattern!r}")
    return sorted(matches.intersection(binaries))


def _newest(prefix: str, versions: set[str]) -> str | None:
    matches = (re.fullmatch(rf"{prefix}_(\d+(?:\.\d+)*)", version) for version in versions)
    return max((match[1] for match in matches if match), key=Version, default=None)


def _tag_reason(analysis: WheelAbIInfo, glibc: str | None, libstdcxx: str | None) -> str:
    foreign = sorted(analysis.external_refs[analysis.policies.lowest.name].libs)
    newest = " and ".join(
        text for text in (glibc and f"GLIBC_{glibc}", libstdcxx and f"GLIBCXX_{libstdcxx}") if text
    )  # fmt: skip
    if foreign and analysis.overall_policy == analysis.policies.linux:
        return f"it needs {', '.join(foreign)}, which no manylinux policy allows"
    if analysis.overall_policy < analysis.sym_policy:
        return f"its symbols would allow {analysis.sym_policy.name}, but its libraries or instructions do not"
    return f"its newest symbols are {newest}" if newest else "it asks for no versioned symbol"


def _one_line(error: BaseException) -> str:
    inner = getattr(error, "exceptions", None)
    text = "; ".join(map(_one_line, inner[:10])) if inner else shown(" ".join(str(error).split()))
    return text or type(error).__name__


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def metadata_bytes(path: Path) -> bytes:
    """Return the METADATA of a wheel that :meth:`Wheel.read` accepts, byte for byte, as PEP 658 serves it."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{_only_dist_info(path, _top_level_names(archive))}/METADATA")


def _top_level_names(archive: zipfile.ZipFile) -> set[str]:
    return {entry.split("/")[0] for entry in archive.namelist()}


def sbom_bytes(path: Path) -> bytes | None:
    """Return the first SBOM in the dist-info folder of a wheel that :meth:`Wheel.read` accepts (PEP 770), if any."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/sboms/[^/]+", name))
        return archive.read(names[0]) if names else None
