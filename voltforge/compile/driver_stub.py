"""A stand-in for the NVIDIA driver's library: it lets programs link and import where there is no driver."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from voltforge.sources import environment
from voltforge.sources.fetch import Store
from voltforge.system import files
from voltforge.system.process import run
from voltforge.system.records import CheckoutPath

SONAME = "libcuda.so.1"
STATUS = 34
"""CUDA_ERROR_STUB_LIBRARY of cuda.h: every function of the stub returns it."""


@dataclass(frozen=True)
class DriverStub:
    """A folder with a ``libcuda.so.1`` that exports the driver's API and drives nothing."""

    path: CheckoutPath

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.path / SONAME


def from_lock(lock: Path, folder: Path, store: Store, cc: str | Path) -> DriverStub:
    """Compile the stub in ``folder`` from the ``cuda.h`` of the locked wheels.

    Raises:
        InstallError: the wheels of the lock cannot be installed.
        ProgramFailed: the C compiler ``cc`` fails.
    """
    with files.replacing_folder(folder) as beside, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        environment.install_into(lock, Path(scratch), store.indexes, offline=store.offline)
        (header,) = Path(scratch).glob("nvidia/*/include/cuda.h")
        compile_stub(header.parent, beside, cc)
    return DriverStub(folder)


def compile_stub(include: Path, folder: Path, cc: str | Path) -> None:
    """Compile a ``libcuda.so.1`` that exports every function declared by ``include/cuda.h``, old versions included.

    Without these symbols the linker would drop the driver from NEEDED, and the linked extension would not load.

    Raises:
        ProgramFailed: the C compiler ``cc`` fails.
    """
    names: set[str] = set()
    files.write(folder / "declarations.c", '#include "cuda.h"\n')
    for flag in ("-U__CUDA_API_VERSION_INTERNAL", "-D__CUDA_API_VERSION_INTERNAL"):
        text = run([cc, "-E", "-P", flag, f"-I{include}", folder / "declarations.c"]).output
        names |= set(re.findall(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(", text))
    source = "".join(f"int {name}(void) {{ return {STATUS}; }}\n" for name in sorted(names))
    files.write(folder / "stub.c", source)
    library = folder / SONAME
    run([cc, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{SONAME}", "-o", f"{library}.new", folder / "stub.c"])
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(SONAME)
    Path(f"{library}.new").replace(library)
    for name in ("declarations.c", "stub.c"):
        (folder / name).unlink()
