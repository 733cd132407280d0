"""A wheel under examination, what its recipe expects of it, and the findings."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from voltforge.binary.elf import Elf
from voltforge.system.process import run
from voltforge.wheel.wheelfile import (
    PROVIDED,
    PlatformTag,
    Wheel,
    members,
    platform_tag,
)

DRIVER = "libcuda.so.1"
"""The library of the NVIDIA driver. No wheel contains it, and a build machine may lack it."""
PATIENCE = 600.0
"""The time limit of a program that runs in the environment, in seconds. A first import of torch from a cold disk takes
60.
"""
_ABOUT = """
import json, sys, sysconfig
print(json.dumps([sys.executable, sysconfig.get_path("platlib")]))
"""


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
