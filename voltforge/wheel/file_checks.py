"""Check the files of a wheel: names, tags, requirements, device code and binaries."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name

from voltforge.binary import fatbin
from voltforge.errors import VoltforgeError
from voltforge.system import files
from voltforge.wheel.examined_wheel import (
    ExaminedWheel,
)
from voltforge.wheel.findings import Finding, examples, of_problems
from voltforge.wheel.wheelfile import (
    WheelError,
    record_problems,
)

_PRIVATE = re.compile(
    rb"/(?:home|root|tmp|var/tmp)/(?![\w.+/-]*XXXXXX)[\w.+/-]+\.(?:c|cc|cpp|cxx|cu|cuh|h|hpp|hxx|inl)(?![\w.+/-])"
)
"""Paths of source files in private folders, as ``__FILE__`` leaves them in a binary.

A folder without a source file is no leak. A template of mkstemps(3) is none either: NCCL uses ``/tmp/nccl-XXXXXX`` at
run time, and PyTorch's fuser ``/tmp/pytorch_fuserXXXXXX.cpp``.
"""
_WIDTH = 60
"""The number of characters of a mangled name in a finding."""


def check_record(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that RECORD matches the files (PEP 376), and that all binaries can be parsed."""
    problems = [*record_problems(subject.folder), *subject.malformed]
    return of_problems("wheel", problems, f"{len(subject.members)} files, each with the hash of RECORD")


def check_tag(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that file name and WHEEL have equal tags, and that the binaries run wherever these tags allow (PEP 425,
    600).
    """
    wheel = subject.wheel
    problems = []
    if wheel.tags != wheel.declared:
        problems.append(f"the file name has the tags {_tags(wheel.tags)}, but WHEEL has {_tags(wheel.declared)}")
    try:
        possible = subject.platform
    except WheelError as error:
        yield from of_problems("tag", [*problems, error.what], "")
        return
    claimed = sorted({tag.platform for tag in wheel.tags})
    for tag in claimed:
        if not _covers(tag, possible.tag):
            problems.append(
                f"{tag} allows older platforms than {possible.tag}, which the binaries require: {possible.why}"
            )
    yield from of_problems("tag", problems, f"{_tags(wheel.tags)}; {possible.why}")
    if possible.glibc or possible.libstdcxx:
        floors = {"glibc": possible.glibc, "GLIBCXX": possible.libstdcxx}
        required_versions = " and ".join(f"{name} {version}" for name, version in floors.items() if version)
        yield Finding("tag", "note", f"needs {required_versions}, or newer")


def check_requirements(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the requirements of METADATA against the required and the forbidden projects."""
    expect, problems = subject.expect, []
    requirements = {
        canonicalize_name(requirement.name): requirement
        for requirement in subject.wheel.requires
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    }
    for wanted in map(Requirement, expect.requires):
        actual = requirements.get(canonicalize_name(wanted.name))
        if not actual:
            problems.append(f"METADATA does not require {wanted}")
        elif wanted.specifier and actual.specifier != wanted.specifier:
            problems.append(f"METADATA requires {actual} instead of {wanted}")
    for name in expect.requires_not:
        if actual := requirements.get(canonicalize_name(name)):
            problems.append(f"METADATA requires {actual}, which is not allowed")
    return of_problems("requirements", problems, f"{len(requirements)} for every user")


def check_size(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the size of the wheel file."""
    size, most = subject.wheel.path.stat().st_size, subject.expect.max_size
    if most is None:
        yield Finding("size", "note", files.size(size))
        return
    problems = [f"{files.size(size)}, more than the allowed {files.size(most)}"] if size > most else []
    yield from of_problems("size", problems, f"{files.size(size)} of at most {files.size(most)}")


def check_extensions(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that every required extension is a shared object in the wheel."""
    wanted = subject.expect.extensions
    problems = [
        f"{name} {'is not a shared object' if name in subject.members else 'is missing'}"
        for name in wanted
        if name not in subject.binaries
    ]
    return of_problems("extensions", problems, ", ".join(wanted) or "the recipe requires none")


def check_images(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the architectures of all device code, and the number of images of each linked object."""
    arch, linked = subject.expect.arch, subject.linked or {}
    if not arch:
        return
    wanted = fatbin.image_names(arch)
    problems = [f"{name} should contain device code, but is missing" for name in linked if name not in subject.binaries]
    counts = []
    for name, binary in subject.binaries.items():
        try:
            images = fatbin.images(binary.path)
        except VoltforgeError as error:
            problems.append(error.what.replace(str(binary.path), name))
            continue
        linked_images = [image for image in images if not image.relocatable]
        if len(linked_images) < len(images):
            pieces = f"{name} holds {len(images) - len(linked_images)} relocatable images"
            if linked_images:
                yield Finding("device code", "note", f"{pieces} of no use beside the linked ones")
            else:
                problems.append(f"{pieces}, which nvlink has not linked: no driver can load them")
        actual = Counter(image.name for image in linked_images)
        if foreign := {image: count for image, count in actual.items() if image not in wanted}:
            problems.append(f"{name} holds {_image_counts(foreign)}, which the recipe does not list")
        units = linked.get(name)
        for image in sorted(wanted):
            if units is not None and actual[image] != units:
                count = f"{actual[image]} images of {image}"
                problems.append(f"{name} holds {count}, but {units} CUDA objects were linked into it")
            elif actual and not actual[image]:
                problems.append(f"{name} holds no {image}")
        if present := {image: actual[image] for image in wanted if actual[image]}:
            counts.append(f"{name} {_image_counts(present)}")
    if counts:
        yield Finding("device code", "note" if problems else "pass", "; ".join(counts))
    yield from (Finding("device code", "fail", problem) for problem in problems)
    if not counts and not problems:
        yield Finding("device code", "pass", "none")


def check_absent(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that no binary and no kernel matches a forbidden pattern; see :func:`voltforge.binary.fatbin.kernels`."""
    patterns = subject.expect.absent
    problems = []
    for name, binary in subject.binaries.items():
        problems += [
            f"{name} matches the forbidden pattern {pattern}" for pattern in patterns if fnmatchcase(name, pattern)
        ]
        kernels = fatbin.kernels(binary.path) if patterns else ()
        for pattern in patterns:
            if matching := sorted(kernel for kernel in kernels if fnmatchcase(kernel, pattern)):
                count = f"{len(matching)} kernels or device variables that match {pattern}"
                problems.append(f"{name} has {count}, such as {matching[0][:_WIDTH]}")
    return of_problems("absent", problems, f"nothing compiled matches {', '.join(patterns)}" if patterns else "")


def check_paths(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that no file names a folder of the build machine. Compressed data inside a file is not searched."""
    forbidden = [path.rstrip("/").encode() for path in subject.forbidden_paths if path.rstrip("/")]
    # The path must end there: /work does not match /workspace.
    exact = re.compile(rb"(?:" + b"|".join(map(re.escape, forbidden)) + rb")(?![\w.+-])") if forbidden else None
    problems = []
    for name in subject.members:
        matches = Counter(_occurrences(subject.folder / name, exact)) if exact else Counter[str]()
        if name in subject.binaries:
            matches += Counter(_occurrences(subject.folder / name, _PRIVATE))
        if matches:
            problems.append(f"{name} names {examples(sorted(matches))}")
    return of_problems("build paths", problems, "no file names a folder of the build machine")


def check_runpath(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that every RUNPATH entry is an allowed pattern and, starting at $ORIGIN, stays inside site-packages."""
    allowed = subject.expect.runpath
    problems, seen = [], 0
    for name, binary in subject.binaries.items():
        for entry in binary.runpath + binary.rpath:
            seen += 1
            if allowed and not any(fnmatchcase(entry, pattern) for pattern in allowed):
                problems.append(f"{name} has the RUNPATH entry {entry}, which matches none of {', '.join(allowed)}")
            elif not _stays_inside(name, entry):
                problems.append(f"{name} has the RUNPATH entry {entry}, which leads out of site-packages")
    return of_problems("RUNPATH", problems, f"{seen} entries, each inside site-packages" if seen else "none")


def check_stripped(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that all binaries are stripped of symbol tables and debug information."""
    problems = []
    for name, binary in subject.binaries.items():
        if not binary.stripped:
            spare = sum(s.size for s in binary.sections if s.name in {".symtab", ".strtab"} or ".debug_" in s.name)
            problems.append(f"{name} is not stripped: {files.size(spare)} of symbols")
    return of_problems("stripped", problems, f"{len(subject.binaries)} binaries")


def _image_counts(images: Mapping[str, int]) -> str:
    """``sm_70 (29), sm_80 (52)``, in the order of the architectures."""
    order = sorted(images, key=lambda name: (name.split("_")[0] != "sm", len(name.rstrip("af")), name))
    return ", ".join(f"{name} ({images[name]})" for name in order)


def _occurrences(path: Path, pattern: re.Pattern[bytes]) -> list[str]:
    if not path.stat().st_size:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [match.decode(errors="replace") for match in pattern.findall(content)]


def _stays_inside(name: str, entry: str) -> bool:
    """Return True if a RUNPATH entry of the binary at ``name`` in site-packages stays inside site-packages."""
    first, _, rest = entry.replace("${ORIGIN}", "$ORIGIN").partition("/")
    target = os.path.normpath(PurePosixPath(name).parent / rest)
    return first == "$ORIGIN" and target.split("/")[0] != ".."


def _covers(claimed: str, possible: str) -> bool:
    """Return True if every machine that accepts the ``claimed`` platform tag also accepts the ``possible`` one."""
    if possible == "any" or claimed == possible:
        return True
    floor, least = _oldest_glibc(claimed), _oldest_glibc(possible)
    return floor[1] == least[1] and (floor[0] is None or (least[0] is not None and floor[0] >= least[0]))


def _oldest_glibc(tag: str) -> tuple[tuple[int, int] | None, str]:
    """Return the glibc version that a platform tag requires, if any, and its machine; PEP 600 maps the older tags."""
    if match := re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", tag):
        return (int(match[1]), int(match[2])), match[3]
    older = {"manylinux1_": (2, 5), "manylinux2010_": (2, 12), "manylinux2014_": (2, 17)}
    for prefix, glibc in older.items():
        if tag.startswith(prefix):
            return glibc, tag.removeprefix(prefix)
    return None, tag.removeprefix("linux_")


def _tags(tags: Iterable[Tag]) -> str:
    return ", ".join(sorted(map(str, tags)))
