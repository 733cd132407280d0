"""The stub of the driver's library exports the driver's API and returns an error from every function."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from voltforge.compile import driver_stub as module
from voltforge.compile.driver_stub import STATUS, DriverStub
from voltforge.compile.toolchain import Toolchain
from voltforge.sources.environment import InstallError
from voltforge.sources.fetch import Store

pytestmark = pytest.mark.slow


def exported(library: Path) -> tuple[set[str], list[str]]:
    """The names of the dynamic symbols, and the SONAMEs."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        names = {symbol.name for symbol in elf.get_section_by_name(".dynsym").iter_symbols()}
        return names, [tag.soname for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_SONAME")]


def test_the_stub_exports_every_function_of_the_driver_and_returns_its_error(driver_stub: DriverStub) -> None:
    names, sonames = exported(driver_stub.library)
    assert sonames == ["libcuda.so.1"]
    assert {"cuPointerGetAttribute", "cuMemAlloc_v2", "cuInit"} < names
    assert ctypes.CDLL(str(driver_stub.library)).cuInit(0) == STATUS


def test_the_stub_exports_every_function_that_a_toolkits_own_header_declares(
    driver_stub: DriverStub, toolchain: Toolchain
) -> None:
    header = (toolchain.home / "include/cuda.h").read_text(errors="replace")
    declared = set(re.findall(r"\bCUDAAPI (cu[A-Z]\w+)\(", header))
    assert len(declared) > 400
    assert declared - exported(driver_stub.library)[0] == set()


def test_a_lock_that_cannot_be_installed_leaves_no_stub(repository: Path, tmp_path: Path) -> None:
    lock = tmp_path / "driver.txt"
    lock.write_text(f"nobody-has-this==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(InstallError):
        module.from_lock(lock, tmp_path / "stub", Store(tmp_path / "downloads", offline=True), "gcc")
    assert not (tmp_path / "stub").exists()
