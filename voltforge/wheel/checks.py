"""Check a wheel before it enters the wheelhouse. All checks run, and all findings are reported at once."""

from __future__ import annotations

import functools
import json
import mmap
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name

from voltforge.binary import cubin
from voltforge.binary.elf import Elf, ElfError, is_binary
from voltforge.binary.loader import Loader, system_libraries
from voltforge.errors import VoltforgeError
from voltforge.sources import options
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.signing import Trust
from voltforge.wheel.wheelfile import (
    PROVIDED,
    PlatformTag,
    Wheel,
    WheelError,
    members,
    platform_tag,
    record_problems,
    unpack,
)
from voltforge.wheel.wheelhouse import Wheelhouse

DRIVER = "libcuda.so.1"
"""The library of the NVIDIA driver. No wheel contains it, and a build machine may lack it."""
PATIENCE = 600.0
"""The time limit of a program that runs in the environment, in seconds. A first import of torch from a cold disk takes
60.
"""

_PRIVATE = re.compile(
    rb"/(?:home|root|tmp|var/tmp)/(?![\w.+/-]*XXXXXX)[\w.+/-]+\.(?:c|cc|cpp|cxx|cu|cuh|h|hpp|hxx|inl)(?![\w.+/-])"
)
"""Paths of source files in private folders, as ``__FILE__`` leaves them in a binary.

A folder without a source file is no leak. A template of mkstemps(3) is none either: NCCL uses ``/tmp/nccl-XXXXXX`` at
run time, and PyTorch's fuser ``/tmp/pytorch_fuserXXXXXX.cpp``.
"""
_SHOWN = 3
"""The number of examples in a finding."""
_WIDTH = 60
"""The number of characters of a mangled name in a finding."""
_ANSWER = "voltforge: "
_IMPORT = f"""
import importlib, os, sys
try:
    importlib.import_module(sys.argv[1])
except BaseException as problem:
    lines = str(problem).splitlines() or [""]
    print(f"\\n{_ANSWER}{{type(problem).__name__}}: {{lines[0]}}", flush=True)
    os._exit(1)
os._exit(0)  # what a library does when Python ends is not in question
"""
_OPERATORS = """
import importlib, json, os, pathlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
import torch
pathlib.Path(sys.argv[1]).write_text(json.dumps(torch._C._dispatch_get_all_op_names()))
os._exit(0)
"""
_ANSWERS = """
import importlib, json, os, pathlib, sys
names = {}
for module in sys.argv[2].split():
    importlib.import_module(module)
    names[module.split(".")[0]] = sys.modules[module.split(".")[0]]
def answer(expression):
    try:
        return [True, str(eval(expression, names))]
    except Exception as problem:
        return [False, f"{type(problem).__name__}: {problem}"]
pathlib.Path(sys.argv[1]).write_text(json.dumps([answer(expression) for expression in sys.argv[3:]]))
os._exit(0)
"""
_ABOUT = """
import json, sys, sysconfig
print(json.dumps([sys.executable, sysconfig.get_path("platlib")]))
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """The check's name, in a word or two."""
    severity: Literal["pass", "fail", "note"]
    """``fail`` keeps the wheel out of the wheelhouse; ``note`` is information."""
    detail: str


@dataclass(frozen=True)
class Expectation:
    """The properties that a recipe requires of its wheel."""

    extensions: tuple[str, ...] = ()
    """Paths of shared objects that the wheel must contain: ``vllm/_C.abi3.so``."""
    arch: tuple[str, ...] = ()
    """The architectures of all device code in the wheel; empty: not checked.

    Written as in TORCH_CUDA_ARCH_LIST: ``7.0``, ``9.0a``, ``7.0+PTX``.
    """
    absent: tuple[str, ...] = ()
    """Patterns that no path of a binary and no mangled name of a kernel may match: ``*_vllm_fa*``, ``*marlin*``.

    Python files are exempt: ``gptq_marlin.py`` may stay although its kernels are left out.
    """
    max_size: int | None = None
    """The largest allowed size of the wheel file in bytes."""
    runpath: tuple[str, ...] = ()
    """Patterns of allowed RUNPATH entries; if empty, every entry inside site-packages is allowed."""
    requires: tuple[str, ...] = ()
    """Requirements that the wheel must have without extras: a name, or an exact specifier, ``triton==3.5.0``."""
    requires_not: tuple[str, ...] = ()
    """Names of projects that the wheel must not require."""
    imports: tuple[str, ...] = ()
    """Modules that must import once the wheel is installed: ``vllm._C``."""
    ops: tuple[str, ...] = ()
    """PyTorch operators that these modules must register: ``_C::rms_norm``."""
    config: str | None = None
    """A Python expression for the build configuration as text with ``NAME=VALUE`` pairs: ``torch.__config__.show()``.
    """
    variables: Mapping[str, str] = field(default_factory=dict)
    """The build's variables. Those that the configuration names must agree with it."""
    says: Mapping[str, str] = field(default_factory=dict)
    """Python expressions, and the patterns that ``str()`` of their values must match."""
    provided: tuple[str, ...] = PROVIDED
    """Patterns of SONAMEs that other wheels and the driver provide."""


@dataclass(frozen=True)
class InstalledPython:
    """A Python interpreter and its site-packages, with the wheel or its requirements installed."""

    python: Path
    """The interpreter."""
    site: Path
    """The site-packages folder."""

    @classmethod
    def of(cls, python: Path) -> InstalledPython:
        """Find the executable and the site-packages of an interpreter by running it.

        Raises:
            ProgramFailed: it cannot be run, or fails.
        """
        executable, site = json.loads(run([python, "-I", "-c", _ABOUT], timeout=PATIENCE).output.splitlines()[-1])
        return cls(Path(executable), Path(site))


@dataclass(frozen=True)
class ExaminedWheel:
    """A wheel with all values that the checks use."""

    wheel: Wheel
    folder: Path
    """The folder with its unpacked files."""
    expect: Expectation
    linked: Mapping[str, int] | None = None
    forbidden_paths: tuple[str, ...] = ()
    environment: InstalledPython | None = None
    driver_stub: Path | None = None
    binaries: Mapping[str, Elf] = field(default_factory=dict)
    """Its programs and shared objects, by path in the wheel."""
    malformed: tuple[str, ...] = ()
    """A message for each file with an ELF header that could not be parsed."""

    @functools.cached_property
    def members(self) -> list[str]:
        """The paths of its files, sorted."""
        return sorted(members(self.folder))

    @functools.cached_property
    def platform(self) -> PlatformTag:
        """The platform tag that its binaries allow."""
        return platform_tag(self.wheel.path, self.expect.provided)


Check = Callable[[ExaminedWheel], Iterable[Finding]]


def verify(
    path: Path,
    expect: Expectation,
    *,
    linked: Mapping[str, int] | None = None,
    forbidden_paths: Sequence[str] = (),
    environment: Path | None = None,
    driver_stub: Path | None = None,
) -> list[Finding]:
    """Check a wheel and return all findings, good and bad.

    Args:
        path: the wheel.
        expect: the properties that its recipe requires.
        linked: the number of CUDA objects linked into each extension, by path in the wheel, if known.
        forbidden_paths: folders of the build machine that no file may name.
        environment: the interpreter of an environment with the wheel's requirements, and for the import checks the
            wheel itself. Without it, the checks that need it note that they did not run.
        driver_stub: a folder with a stub of ``libcuda.so.1``, for machines without a driver.

    Returns:
        the findings in the order of :data:`CHECKS`. A malformed wheel has a single finding, a failure.

    Raises:
        ProgramFailed: the environment's interpreter fails.
    """
    where = InstalledPython.of(environment) if environment else None
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        folder = Path(name)
        try:
            wheel = Wheel.read(path)
            unpack(path, folder)
        except WheelError as error:
            return [Finding("wheel", "fail", error.what)]
        binaries, malformed = _binaries(folder)
        subject = ExaminedWheel(
            wheel, folder, expect, linked, tuple(forbidden_paths), where, driver_stub, binaries, malformed
        )  # fmt: skip
        return [finding for check in CHECKS for finding in check(subject)]


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings of severity ``fail``."""
    return [finding for finding in findings if finding.severity == "fail"]


def report(findings: Iterable[Finding]) -> None:
    """Print the findings as a table."""
    marks = {"pass": "ok", "fail": "FAIL", "note": "note"}
    console.table("", ("", "check", "found"), ((marks[f.severity], f.check, f.detail) for f in findings))


def check_record(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that RECORD matches the files (PEP 376), and that all binaries can be parsed."""
    problems = [*record_problems(subject.folder), *subject.malformed]
    return _findings("wheel", problems, f"{len(subject.members)} files, each with the hash of RECORD")


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
        yield from _findings("tag", [*problems, error.what], "")
        return
    claimed = sorted({tag.platform for tag in wheel.tags})
    for tag in claimed:
        if not _covers(tag, possible.tag):
            problems.append(
                f"{tag} allows older platforms than {possible.tag}, which the binaries require: {possible.why}"
            )
    yield from _findings("tag", problems, f"{_tags(wheel.tags)}; {possible.why}")
    if possible.glibc or possible.libstdcxx:
        floors = {"glibc": possible.glibc, "GLIBCXX": possible.libstdcxx}
        needs = " and ".join(f"{name} {version}" for name, version in floors.items() if version)
        yield Finding("tag", "note", f"needs {needs}, or newer")


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
    return _findings("requirements", problems, f"{len(requirements)} for every user")


def check_size(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the size of the wheel file."""
    size, most = subject.wheel.path.stat().st_size, subject.expect.max_size
    if most is None:
        yield Finding("size", "note", files.size(size))
        return
    problems = [f"{files.size(size)}, more than the allowed {files.size(most)}"] if size > most else []
    yield from _findings("size", problems, f"{files.size(size)} of at most {files.size(most)}")


def check_extensions(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that every required extension is a shared object in the wheel."""
    wanted = subject.expect.extensions
    problems = [
        f"{name} {'is not a shared object' if name in subject.members else 'is missing'}"
        for name in wanted
        if name not in subject.binaries
    ]
    return _findings("extensions", problems, ", ".join(wanted) or "none are asked for")


def check_images(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the architectures of all device code, and the number of images of each linked object."""
    arch, linked = subject.expect.arch, subject.linked or {}
    if not arch:
        return
    wanted = cubin.image_names(arch)
    problems = [f"{name} should contain device code, but is missing" for name in linked if name not in subject.binaries]
    counts = []
    for name, binary in subject.binaries.items():
        try:
            images = cubin.images(binary.path)
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
    """Check that no binary and no kernel matches a forbidden pattern; see :func:`voltforge.binary.cubin.kernels`."""
    patterns = subject.expect.absent
    problems = []
    for name, binary in subject.binaries.items():
        problems += [
            f"{name} matches the forbidden pattern {pattern}" for pattern in patterns if fnmatchcase(name, pattern)
        ]
        kernels = cubin.kernels(binary.path) if patterns else ()
        for pattern in patterns:
            if matching := sorted(kernel for kernel in kernels if fnmatchcase(kernel, pattern)):
                count = f"{len(matching)} kernels or device variables that match {pattern}"
                problems.append(f"{name} has {count}, such as {matching[0][:_WIDTH]}")
    return _findings("absent", problems, f"nothing compiled matches {', '.join(patterns)}" if patterns else "")


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
            problems.append(f"{name} names {_examples(sorted(matches))}")
    return _findings("build paths", problems, "no file names a folder of the build machine")


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
    return _findings("RUNPATH", problems, f"{seen} entries, each inside site-packages" if seen else "none")


def check_stripped(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that all binaries are stripped of symbol tables and debug information."""
    problems = []
    for name, binary in subject.binaries.items():
        if not binary.stripped:
            spare = sum(s.size for s in binary.sections if s.name in {".symtab", ".strtab"} or ".debug_" in s.name)
            problems.append(f"{name} is not stripped: {files.size(spare)} of symbols")
    return _findings("stripped", problems, f"{len(subject.binaries)} binaries")


def check_symbols(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that ld.so would find every library and every strong symbol of every binary."""
    environment = subject.environment
    if not subject.binaries:
        return
    if not environment:
        yield Finding("symbols", "note", "not checked: it needs an environment with what the wheel requires")
        return
    site = environment.site
    loader = Loader(
        site,
        staged=subject.folder,
        program=environment.python,
        lent=(site / "torch" / "lib", *sorted(site.glob("nvidia/*/lib"))),
        last=(subject.driver_stub,) if subject.driver_stub else (),
    )
    problems, lent, total = [], {}, 0
    for name, binary in subject.binaries.items():
        try:
            resolved = loader.resolve(name)
        except ElfError as error:
            problems.append(error.what)
            continue
        total += len(binary.undefined)
        if resolved.missing:
            problems.append(f"{name} needs {', '.join(resolved.missing)}, which no folder of the search path contains")
        if resolved.unresolved:
            count = f"{len(resolved.unresolved)} of its {len(binary.undefined)} symbols"
            problems.append(f"{name} finds {count} nowhere: {_examples(map(str, resolved.unresolved))}")
        if resolved.lent:
            lent[name] = resolved.lent
    yield from _findings("symbols", problems, f"all {total} that {len(subject.binaries)} binaries ask for are found")
    if lent:
        names = sorted({library for libraries in lent.values() for library in libraries})
        yield Finding(
            "symbols", "note", f"{_examples(lent)} find {', '.join(names)} only where torch has been imported before"
        )  # fmt: skip


def check_imports(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that the modules import, and that the operators of the recipe are registered."""
    expect, environment = subject.expect, subject.environment
    if not (expect.imports or expect.ops):
        return
    if not environment:
        yield Finding("imports", "note", "not checked: it needs an environment with the wheel installed")
        return
    if different := [
        name for name in subject.binaries if not _same_content(subject.folder / name, environment.site / name)
    ]:
        yield Finding(
            "imports", "fail", f"{environment.site} has a different build of {_examples(different)}, or lacks it"
        )
        return
    problems = []
    for module in expect.imports:
        problem = _run_script(subject, environment, _IMPORT, module)
        if problem:
            problems.append(f"import {module}: {problem}")
    yield from _findings("imports", problems, ", ".join(expect.imports))
    if expect.ops and not problems:
        yield from _operators(subject, environment)


def check_config(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that the configuration reported by the installed wheel agrees with the variables of its build."""
    expression, wanted = subject.expect.config, subject.expect.variables
    if not expression or not subject.environment:
        return
    answers, problem = _values(subject, subject.environment, [expression])
    if problem or not answers[0][0]:
        yield Finding("configuration", "fail", problem or f"{expression}: {answers[0][1]}")
        return
    reported = dict(re.findall(r"\b([A-Z][A-Z0-9_]*)=([^\s,;]*)", answers[0][1]))
    common = sorted(wanted.keys() & reported.keys())
    problems = [f"it reports {name}={reported[name]}, but was built with {wanted[name]}" for name in common
                if not options.same_value(reported[name], wanted[name])]  # fmt: skip
    if not common:
        problems = [f"{expression} reports none of the variables of its build"]
    yield from _findings("configuration", problems, f"{len(common)} variables as in the recipe: {', '.join(common)}")


def check_answers(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the values of the recipe's expressions in an environment with the wheel installed."""
    says = subject.expect.says
    if not says:
        return
    if not subject.environment:
        yield Finding("answers", "note", "not checked: it needs an environment with the wheel installed")
        return
    answers, problem = _values(subject, subject.environment, list(says))
    if problem:
        yield Finding("answers", "fail", problem)
        return
    for (expression, pattern), (fine, answer) in zip(says.items(), answers, strict=True):
        if not fine or not fnmatchcase(answer.strip(), pattern):
            yield Finding("answers", "fail", f"{expression} is {answer.strip()[:300]!r}, not {pattern!r}")
        else:
            yield Finding("answers", "pass", f"{expression} is {answer.strip()[:300]}")


def check_in_wheelhouse(house: Wheelhouse, path: Path, trust: Trust) -> list[Finding]:
    """Check a wheel of the wheelhouse against its index, receipt, provenance and signature."""
    problems, by = house.wheel_problems(Wheel.read(path), trust)
    return [*_findings("provenance", problems, f"wheel, index, receipt and provenance agree; signed by {by}")]


CHECKS: tuple[Check, ...] = (
    check_record,
    check_tag,
    check_requirements,
    check_size,
    check_extensions,
    check_images,
    check_absent,
    check_paths,
    check_runpath,
    check_stripped,
    check_symbols,
    check_imports,
    check_config,
    check_answers,
)
"""All checks, the cheapest first."""


def _findings(check: str, problems: Iterable[str], fine: str) -> Iterator[Finding]:
    """Yield a failure for each problem, or a single pass with the detail ``fine`` if there is none."""
    failures = [Finding(check, "fail", problem) for problem in problems]
    yield from failures or ([Finding(check, "pass", fine)] if fine else [])


def _operators(subject: ExaminedWheel, environment: InstalledPython) -> Iterator[Finding]:
    wanted = set(subject.expect.ops)
    spaces = {name.partition("::")[0] for name in wanted}
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        answer = Path(name) / "operators.json"
        if problem := _run_script(subject, environment, _OPERATORS, str(answer), *subject.expect.imports):
            yield Finding("operators", "fail", problem)
            return
        # An operator's overloads follow its name after a dot.
        registered = {full.partition(".")[0] for full in json.loads(answer.read_bytes())}
    own = {full for full in registered if full.partition("::")[0] in spaces}
    missing = [f"{name} is not registered" for name in sorted(wanted - own)]
    yield from _findings("operators", missing, f"all {len(wanted)} are registered")
    if own - wanted:
        yield Finding(
            "operators", "note", f"{len(own - wanted)} more are registered: {_examples(sorted(own - wanted))}"
        )


def _values(
    subject: ExaminedWheel, environment: InstalledPython, expressions: Sequence[str]
) -> tuple[list[tuple[bool, str]], str]:
    """Return a pair for each expression, (evaluated, value or error as text), and a message if the script failed."""
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        answer = Path(name) / "answers.json"
        modules = " ".join(subject.expect.imports)
        if problem := _run_script(subject, environment, _ANSWERS, str(answer), modules, *expressions):
            return [], problem
        return [(fine, text) for fine, text in json.loads(answer.read_bytes())], ""


def _run_script(subject: ExaminedWheel, environment: InstalledPython, script: str, *words: str) -> str:
    """Run a script in the environment; return an empty string, or its error in one line."""
    variables = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    variables.setdefault("LOGNAME", "voltforge")  # torch needs a user name, and a user id in a container may have none
    if subject.driver_stub and DRIVER not in system_libraries():
        variables["LD_LIBRARY_PATH"] = str(subject.driver_stub)
    try:
        run([environment.python, "-I", "-c", script, *words], env=variables, timeout=PATIENCE)
    except ProgramFailed as error:
        lines = [line for line in error.output.splitlines() if line.strip()]
        messages = [line.removeprefix(_ANSWER) for line in lines if line.startswith(_ANSWER)]
        return (messages or lines or [error.what])[-1] if error.status == 1 else error.what
    return ""


def _binaries(folder: Path) -> tuple[dict[str, Elf], tuple[str, ...]]:
    binaries, malformed = {}, []
    for name in sorted(members(folder)):
        if is_binary(folder / name):
            try:
                binaries[name] = Elf.read(folder / name)
            except ElfError as error:
                malformed.append(error.what.replace(str(folder / name), name))
    return binaries, tuple(malformed)


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


def _same_content(first: Path, second: Path) -> bool:
    return second.is_file() and files.sha256(first) == files.sha256(second)


def _tags(tags: Iterable[Tag]) -> str:
    return ", ".join(sorted(map(str, tags)))


def _examples(names: Iterable[str]) -> str:
    examples = list(names)
    more = f" and {len(examples) - _SHOWN} more" if len(examples) > _SHOWN else ""
    return ", ".join(examples[:_SHOWN]) + more
