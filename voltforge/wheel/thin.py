"""Remove the device code of all other archs from a wheel.

In any wheel, binaries with device code are thinned (see :mod:`voltforge.binary.thinning`), all binaries are stripped,
and the version gets a local part. A project's recipe can add rules. Libraries of NVIDIA are never changed, because
their licence forbids it.
"""

from __future__ import annotations

import calendar
import hashlib
import mmap
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from voltforge.binary import elf, fatbin
from voltforge.binary.elf import Elf
from voltforge.binary.thinning import ThinError, thin_binary
from voltforge.errors import VoltforgeError, listed
from voltforge.sources.recipe import Stub, Thin
from voltforge.system import console, files, programs
from voltforge.system.process import run
from voltforge.wheel.wheelfile import Wheel, members, normalise, set_runpaths, unpack

NVIDIA = (
    "libcuda[.-]*", "libcudart[.-]*", "libcublas*", "libcudnn*", "libcufft*", "libcufile*", "libcupti*", "libcurand*",
    "libcusolver*", "libcusparse*", "libnccl[.-]*", "libnvJitLink*", "libnvrtc*", "libnvshmem*", "libnvToolsExt*",
)  # fmt: skip
"""File names of NVIDIA's libraries as wheels bundle them, such as ``libcudart-218eec4c.so.12``: they stay unchanged."""

STUB_FLAGS = (
    "-shared", "-fPIC", "-O1", "-std=c11", "-w", "-fno-builtin", "-fno-ident", "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-nostartfiles", "-Wl,-s", "-Wl,-z,now",
    "-Wl,--build-id=none", "-Wl,--hash-style=gnu",
)  # fmt: skip
"""The flags with which gcc makes a stub: nothing of the machine enters it but the compiler's version."""
_STUB = """\
extern long write(int, const void *, unsigned long);
extern _Noreturn void abort(void);
static _Noreturn void stop(const char *text, unsigned long size) { write(2, text, size); abort(); }
#define STOPS(name, text) void name(void) { static const char said[] = text "\\n"; stop(said, sizeof said - 1); }
#define ANSWERS(name, value) int name(void) { return value; }
"""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DATA = ("_ZTI", "_ZTS", "_ZTT", "_ZTV", "_ZGV")
"""The prefixes of C++ objects that are not functions (Itanium C++ ABI, 5.1.4)."""
_ALLOCATED = 2
"""SHF_ALLOC: the section is in memory when the program runs (elf(5))."""
_ARCH_LIST = re.compile(rb"(?:(?:sm|compute)_\d+[af]? )+(?:sm|compute)_\d+[af]?(?=\0)")
_NO_SETTINGS = Thin()
_VERSION_LINE = re.compile(r"^(__version__ = )(['\"]).*\2$", re.MULTILINE)


def thin_wheel(
    wheel: Path,
    out_dir: Path,
    archs: Sequence[str],
    *,
    drop_foreign: bool = False,
    settings: Thin = _NO_SETTINGS,
    complete: Callable[[Path, int], None] = lambda *_: None,
) -> Path:
    """Write ``wheel``, thinned to ``archs``, into ``out_dir``; equal wheels give equal bytes.

    Its version gets a local part: ``2.9.0`` becomes ``2.9.0+sm70.thin``. Its tags stay.

    Args:
        wheel: a wheel of any project whose licence allows changes.
        out_dir: the folder of the result, with room for the unpacked wheel meanwhile.
        archs: as in recipes: ``7.0``, ``9.0a``, ``7.0+PTX``.
        drop_foreign: remove binaries and containers with device code for other archs only; otherwise they are an error.
        settings: rules of this project's recipe.
        complete: called with the unpacked wheel and its epoch, to add files that describe the rest.

    Raises:
        ThinError: names all binaries that cannot be thinned.
        WheelError: it is not a well-formed wheel.
    """
    names = fatbin.image_names(archs)
    stock = Wheel.read(wheel)
    if stock.name.startswith("nvidia-"):
        raise ThinError(wheel, "is NVIDIA's own, and its licence does not allow changes")
    highest = max(map(fatbin.capability, names))
    stubs = {
        soname: stub for soname, stub in settings.stubs.items() if not stub.since or _capability(stub.since) > highest
    }
    version = _thinned_version(stock.version, archs)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".thin-", dir=out_dir) as scratch:
        folder = Path(scratch) / "wheel"
        unpack(wheel, folder)
        _drop_members(wheel, folder, settings.drop)
        _replace_libraries(wheel, folder, stubs)
        _thin_binaries(wheel, folder, archs, drop_foreign)
        set_runpaths(folder, settings.runpath)
        for stub in stubs.values():
            for name, line in stub.lines.items():
                _drop_line(wheel, folder, name, line)
        if settings.arch_list:
            _write_arch_list(wheel, folder, settings.arch_list, names)
        if settings.version:
            _write_version(wheel, folder, settings.version, version)
        _rewrite_metadata(folder, stock, version, [stub.requirement for stub in stubs.values() if stub.requirement])
        tag = "-".join(wheel.stem.split("-")[-3:])
        epoch = _newest_time(wheel)
        complete(folder, epoch)
        return normalise(folder, out_dir, tag=tag, epoch=epoch)


def make_stub(path: Path, soname: str, symbols: Iterable[str], stub: Stub) -> None:
    """Compile a library that exports ``symbols``: functions that return a value, or print a sentence and end the
    program.

    The sentence goes to standard error: the called function, its library, and the stub's ``why``.

    Raises:
        ThinError: a symbol cannot be a function.
        ProgramMissing: gcc is not installed.
        ProgramFailed: gcc fails.
    """
    source = _STUB
    for symbol in sorted(symbols):
        if not _IDENTIFIER.fullmatch(symbol) or symbol.startswith(_DATA):
            raise ThinError(Path(soname), f"exports {symbol}, which is not a function and cannot be replaced by a stub")
        if symbol in stub.answers:
            source += f"ANSWERS({symbol}, {stub.answers[symbol]})\n"
        else:
            source += f'STOPS({symbol}, "{symbol} was called, a function of {soname}, {stub.why}.")\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="voltforge-") as scratch:
        text = Path(scratch) / "stub.c"
        text.write_text(source, encoding="ascii")
        run(
            [programs.find("gcc", "install gcc"), *STUB_FLAGS, f"-Wl,-soname,{soname}", "-o", path, text],
            cwd=text.parent,
        )


def _drop_members(wheel: Path, folder: Path, patterns: Iterable[str]) -> None:
    names = members(folder)
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ThinError(wheel, f"has no file that matches {pattern}, which the recipe drops")
        for name in matching:
            (folder / name).unlink()


def _replace_libraries(wheel: Path, folder: Path, stubs: Mapping[str, Stub]) -> None:
    """Write the stubs, with the functions that the binaries import from the replaced libraries."""
    if not stubs:
        return
    binaries = {name: Elf.read(folder / name) for name in _binary_names(folder)}
    for soname, stub in stubs.items():
        member = f"{stub.folder}/{soname}"
        replaced = binaries.pop(member, None)
        imported = {symbol for binary in binaries.values() for symbol in binary.undefined}
        if replaced:
            exported = {name for binary in binaries.values() for name in binary.names}
            symbols = {symbol for symbol in imported if symbol.name in replaced.names - exported}
        else:
            symbols = {symbol for symbol in imported if symbol.name.startswith(stub.prefix)}
        if not symbols or not any(soname in binary.needed for binary in binaries.values()):
            raise ThinError(wheel, f"imports nothing from {soname}, which the recipe replaces")
        if versioned := sorted(str(symbol) for symbol in symbols if symbol.version):
            raise ThinError(wheel, f"imports {versioned[0]} from {soname}, and a stub cannot have symbol versions")
        make_stub(folder / member, soname, {symbol.name for symbol in symbols}, stub)


def _thin_binaries(wheel: Path, folder: Path, archs: Sequence[str], drop_foreign: bool) -> None:
    """Thin and strip every binary in place; all problems are reported at once."""
    names = fatbin.image_names(archs)
    problems: list[str] = []
    for name in _binary_names(folder):
        path = folder / name
        if any(fnmatchcase(path.name, pattern) for pattern in NVIDIA):
            continue
        try:
            images = fatbin.images(path)
            if images and not any(image.name in names for image in images):
                if not drop_foreign:
                    present = ", ".join(dict.fromkeys(image.name for image in images))
                    problems.append(f"{name} has device code only for {present}")
                    continue
                path.unlink()
                console.note(f"left out {name}, which has no device code for {', '.join(archs)}")
                continue
            if images:
                thinned = thin_binary(path, path, archs, drop_foreign=drop_foreign)
                console.note(f"{name}: {files.size(thinned.before)} to {files.size(thinned.after)}")
            _strip(path)
        except VoltforgeError as error:
            problems.append(error.what.replace(str(path), name))
    if problems:
        raise ThinError(wheel, f"has binaries that cannot be thinned:{listed(problems)}")


def _strip(path: Path) -> None:
    """Strip a binary in place, and check that it still loads: strip damages some files that patchelf has changed.

    Raises:
        ThinError: it does not.
    """
    before = _loaded_sections(path)
    elf.strip(path)
    if _loaded_sections(path) != before:
        raise ThinError(path, "is damaged by strip; binutils of another release may do better")


def _loaded_sections(path: Path) -> set[tuple[str, int, bool, str]]:
    """Return the loaded sections of a binary: name, address, True if it loads at that address, and SHA-256.

    Their order in the section table does not count, because strip may change it.
    """
    with elf.open_elf(path) as (file, _), path.open("rb") as content:
        sections = set()
        for section in file.iter_sections():
            if section["sh_flags"] & _ALLOCATED and section["sh_type"] != "SHT_NOBITS":
                begin, size, address = section["sh_offset"], section["sh_size"], section["sh_addr"]
                digest = hashlib.sha256()
                content.seek(begin)
                for at in range(0, size, files.BLOCK):
                    digest.update(content.read(min(files.BLOCK, size - at)))
                in_place = begin in file.address_offsets(address, size)
                sections.add((section.name, address, in_place, digest.hexdigest()))
        return sections


def _binary_names(folder: Path) -> list[str]:
    return [name for name in sorted(members(folder)) if elf.is_binary(folder / name)]


def _member_path(wheel: Path, folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ThinError(wheel, f"has no {name}, which the recipe changes")
    return folder / name


def _drop_line(wheel: Path, folder: Path, name: str, line: str) -> None:
    path = _member_path(wheel, folder, name)
    text = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at = [number for number, content in enumerate(text) if content.strip() == line]
    if len(at) != 1:
        raise ThinError(wheel, f"has the line {line} {len(at)} times in {name}; the recipe expects it once")
    del text[at[0]]
    files.write(path, "".join(text))


def _write_arch_list(wheel: Path, folder: Path, name: str, names: frozenset[str]) -> None:
    """Shorten the list of archs that is compiled into a library, padded with spaces: torch splits it at those."""
    with _member_path(wheel, folder, name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        lists = [(match.start(), match[0]) for match in _ARCH_LIST.finditer(content)]
        if len(lists) != 1:
            raise ThinError(wheel, f"has {len(lists)} lists of archs in {name}, not one")
        begin, listed_archs = lists[0]
        remaining = [arch for arch in listed_archs.split() if arch.decode() in names]
        if not remaining:
            raise ThinError(wheel, f"lists none of the wanted archs in {name}: {listed_archs.decode()}")
        content[begin : begin + len(listed_archs)] = b" ".join(remaining).ljust(len(listed_archs))


def _capability(arch: str) -> int:
    """Return ``7.0`` as 70."""
    return int(arch.replace(".", ""))


def _thinned_version(version: Version, archs: Iterable[str]) -> Version:
    parts = [version.local] if version.local else []
    parts += [name.replace("_", "") for arch in archs for name in sorted(fatbin.image_names([arch]), reverse=True)]
    return Version(f"{version.public}+{'.'.join([*dict.fromkeys(parts), 'thin'])}")


def _write_version(wheel: Path, folder: Path, name: str, version: Version) -> None:
    path = _member_path(wheel, folder, name)
    text, count = _VERSION_LINE.subn(rf"\g<1>\g<2>{version}\g<2>", path.read_text(encoding="utf-8"))
    if count != 1:
        raise ThinError(wheel, f"sets __version__ {count} times in {name}, not once")
    files.write(path, text)


def _rewrite_metadata(folder: Path, stock: Wheel, version: Version, dropped: Sequence[str]) -> None:
    """Give the unpacked wheel its new version, in METADATA and folder names, and drop requirements."""
    for old in [path for path in folder.iterdir() if path.suffix in {".dist-info", ".data"}]:
        old.rename(old.with_name(f"{old.stem.split('-')[0]}-{version}{old.suffix}"))
    metadata = next(folder.glob("*.dist-info")) / "METADATA"
    head, blank, body = metadata.read_bytes().decode().replace("\r\n", "\n").partition("\n\n")
    lines, missing = [], set(dropped)
    for line in head.split("\n"):
        key, _, value = line.partition(": ")
        if key.lower() == "requires-dist" and (name := _requirement_name(value)) in dropped:
            missing.discard(name)
            continue
        lines.append(f"{key}: {version}" if key.lower() == "version" else line)
    if missing:
        raise ThinError(stock.path, f"does not require {', '.join(sorted(missing))}, which the recipe removes")
    files.write(metadata, "\n".join(lines) + blank + body)


def _requirement_name(requirement: str) -> str:
    try:
        return canonicalize_name(Requirement(requirement).name)
    except InvalidRequirement:
        return ""


def _newest_time(wheel: Path) -> int:
    """Return the time of its newest entry, in seconds since 1970."""
    with zipfile.ZipFile(wheel) as archive:
        return max(calendar.timegm((*entry.date_time, 0, 0, 0)) for entry in archive.infolist())
