"""Check a wheel before it enters the wheelhouse. All checks run, and all findings are reported at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from voltforge.binary.elf import Elf, ElfError, is_binary
from voltforge.wheel import file_checks, installed_checks
from voltforge.wheel.examined_wheel import (
    ExaminedWheel,
    Expectation,
    InstalledPython,
)
from voltforge.wheel.findings import Finding, of_problems
from voltforge.wheel.signing import Trust
from voltforge.wheel.wheelfile import (
    Wheel,
    WheelError,
    members,
    unpack,
)
from voltforge.wheel.wheelhouse import Wheelhouse

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


def check_in_wheelhouse(house: Wheelhouse, path: Path, trust: Trust) -> list[Finding]:
    """Check a wheel of the wheelhouse against its index, receipt, provenance and signature."""
    problems, by = house.wheel_problems(Wheel.read(path), trust)
    return [*of_problems("provenance", problems, f"wheel, index, receipt and provenance agree; signed by {by}")]


CHECKS: tuple[Check, ...] = (
    file_checks.check_record,
    file_checks.check_tag,
    file_checks.check_requirements,
    file_checks.check_size,
    file_checks.check_extensions,
    file_checks.check_images,
    file_checks.check_absent,
    file_checks.check_paths,
    file_checks.check_runpath,
    file_checks.check_stripped,
    installed_checks.check_symbols,
    installed_checks.check_imports,
    installed_checks.check_config,
    installed_checks.check_answers,
)
"""All checks, the cheapest first."""


def _binaries(folder: Path) -> tuple[dict[str, Elf], tuple[str, ...]]:
    binaries, malformed = {}, []
    for name in sorted(members(folder)):
        if is_binary(folder / name):
            try:
                binaries[name] = Elf.read(folder / name)
            except ElfError as error:
                malformed.append(error.what.replace(str(folder / name), name))
    return binaries, tuple(malformed)
