"""The CUDA toolkit that compiles for the wanted archs: found on this machine or assembled, with its identity."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.version import Version

from voltforge.binary import loader
from voltforge.compile import driver_stub
from voltforge.errors import VoltforgeError, listed
from voltforge.sources import environment, materials
from voltforge.sources.archive import unpack
from voltforge.sources.fetch import Artifact, DownloadError, Store
from voltforge.sources.materials import Material
from voltforge.sources.recipe import CudaRecipe, Provision
from voltforge.sources.transfer import MOST
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.system.records import CheckoutPath

CHOICES = ("auto", "system", "redist", "distro")
COMPILERS = (
    "bin/nvcc", "bin/cudafe++", "bin/ptxas", "bin/fatbinary", "bin/nvlink",
    "nvvm/bin/cicc", "nvvm/libdevice/libdevice.10.bc",
)  # fmt: skip
"""The files of a CUDA_HOME that decide the machine code."""
LIBRARIES = (
    "include/cuda.h",
    "include/cuda_runtime.h",
    "include/crt/host_config.h",
    "include/cublas_v2.h",
    "lib64/libcudart.so",
)
"""Files that prove that headers and libraries exist."""
HOST_PARTS = ("cc1plus", "as", "collect2", "ld")
"""The programs behind g++, by the names that ``-print-prog-name`` knows."""
PLACES = (
    (r"/cicc$", "nvvm/bin/cicc"),
    (r"/libdevice[^/]*\.bc$", "nvvm/libdevice/libdevice.10.bc"),
    (r"/lib(?:64)?/(lib[^/]+\.(?:a|so[.0-9]*))$", r"lib64/\1"),
    (r"/bin/((?:crt/)?[^/]+)$", r"bin/\1"),
    (r"^.*?/include/(.+)$", r"include/\1"),
)
"""The place in a CUDA_HOME for each file of an archive or a wheel, by the first pattern that matches its path."""
NOT_PLACED = re.compile(r"/compute-sanitizer(?:/|$)|/usr/bin/nvcc$|/(?:gcc|g\+\+|nvcc\.profile|__init__\.py)$")
"""Files that are not placed, such as Debian's wrappers, which call trixie's compilers by absolute paths."""
NVCC_PROFILE = """\
TOP                = $(_HERE_)/..
CICC_PATH          = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
LD_LIBRARY_PATH   += $(TOP)/lib64:
PATH              += $(CICC_PATH):$(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib64/stubs" "-L$(TOP)/lib64"
CUDAFE_FLAGS      +=
PTXAS_FLAGS       +=
"""
"""nvcc's own configuration, in the form of the toolkits' bin/nvcc.profile."""


class ToolchainError(VoltforgeError):
    """No toolkit works; ``reasons`` has one sentence for each that was tried."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(
            f"no CUDA toolkit can compile this:{listed(list(self.reasons))}",
            hint="set CUDA_HOME to a CUDA 12 toolkit, or put the files named above into build/downloads/ or a mirror",
        )


@dataclass(frozen=True)
class HostCompiler:
    """The C++ compiler that nvcc runs, and its C compiler."""

    cxx: Path
    cc: Path
    version: str


@dataclass(frozen=True)
class Toolchain:
    """A CUDA toolkit and its host compiler."""

    home: CheckoutPath
    origin: str
    """``system``, ``redist`` or ``distro``."""
    version: str
    """nvcc's version: ``12.4.131``."""
    host: HostCompiler
    identity: Mapping[str, str]
    """The inputs of the machine code: the SHA-256 of each compiler by its name, and the origin of the headers."""
    programs: Mapping[str, CheckoutPath] = field(default_factory=dict)
    """The files of the compilers by the names of :attr:`identity`."""
    materials: tuple[Material, ...] = ()
    """The compilers, and the archives and wheels that the toolkit was put together from."""

    @property
    def tag(self) -> str:
        """The local part of a version: ``cu124``."""
        major, minor = Version(self.version).release[:2]
        return f"cu{major}{minor}"

    def __str__(self) -> str:
        return f"CUDA {self.version} ({self.origin}), g++ {self.host.version}"


def select(
    recipe: CudaRecipe, choice: str, store: Store, folder: Path, environ: Mapping[str, str] = os.environ
) -> Toolchain:
    """Return the first toolkit that works: the machine's own, NVIDIA's archives, the distribution's package.

    ``choice`` is one of them, or ``auto`` for this order. Rejected toolkits are reported with the reason.

    Raises:
        ToolchainError: none works.
    """
    if choice not in CHOICES:
        raise VoltforgeError(
            f"cuda={choice} is not a valid choice", hint=" or ".join(f"cuda={name}" for name in CHOICES)
        )
    makers: dict[str, Callable[[], Toolchain]] = {
        "system": lambda: _system(recipe, environ),
        "redist": lambda: _provided(recipe, recipe.redist, "redist", store, folder, environ),
        "distro": lambda: _provided(recipe, recipe.distro, "distro", store, folder, environ),
    }
    reasons: list[str] = []
    for origin in CHOICES[1:] if choice == "auto" else (choice,):
        try:
            return makers[origin]()
        except DownloadError as error:
            first = error.missing[0]
            why = first.attempts[-1].outcome if first.attempts else "is missing"
            reasons.append(f"{origin}: {first.artifact.file} could not be downloaded, {why}")
        except ToolchainError as error:
            reasons += [f"{origin}: {reason}" for reason in error.reasons]
        except VoltforgeError as error:
            reasons.append(f"{origin}: {error.what}")
        if origin != CHOICES[-1] and choice == "auto":
            console.note(f"skipped: {reasons[-1].splitlines()[0]}")
    raise ToolchainError(reasons)


def candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the toolkits of this machine: CUDA_HOME, then the one with the nvcc on PATH."""
    seen: set[Path] = set()
    named = [Path(environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if environ.get(key)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    for home in [*named, *([Path(nvcc).resolve().parent.parent] if nvcc else [])]:
        if home.resolve() not in seen:
            seen.add(home.resolve())
            yield home


def unsuitable(recipe: CudaRecipe, home: Path) -> str | None:
    """Return why the toolkit at ``home`` cannot be used, or ``None`` if it can."""
    if not (home / "bin" / "nvcc").exists():
        return f"{home} has no bin/nvcc"
    try:
        version = nvcc_version(home)
    except VoltforgeError as error:
        return error.what
    if Version(version) < Version(recipe.at_least):
        return f"{home} is CUDA {version}, older than {recipe.at_least}"
    if Version(version) >= Version(recipe.below):
        return f"{home} is CUDA {version}: {recipe.below_because}"
    missing = [name for name in (*COMPILERS, *LIBRARIES) if not (home / name).exists()]
    return f"{home} is CUDA {version}, but lacks {', '.join(missing)}" if missing else None


def nvcc_version(home: Path) -> str:
    """Return nvcc's version: ``12.4.131``.

    Raises:
        VoltforgeError: it does not run, or prints no version.
    """
    try:
        output = run([home / "bin" / "nvcc", "--version"]).output
    except ProgramFailed as error:
        raise VoltforgeError(f"{home}/bin/nvcc does not run: {error.output or error.what}") from error
    match = re.search(r"\bV(\d+\.\d+\.\d+)", output)
    if not match:
        raise VoltforgeError(f"{home}/bin/nvcc prints no version")
    return match[1]


def host_compiler(home: Path, environ: Mapping[str, str] = os.environ) -> HostCompiler:
    """Return the first g++ that the toolkit's headers accept: CXX, g++, then g++-N from the newest.

    Raises:
        ToolchainError: there is none; the error names those found and the newest that works.
    """
    text = (home / "include/crt/host_config.h").read_text(errors="replace")
    match = re.search(r"#\s*if\s+__GNUC__\s*>\s*(\d+)", text)
    newest = int(match[1]) if match else 99
    named = [environ["CXX"]] if environ.get("CXX") else []
    found: list[str] = []
    for name in [*named, "g++", *(f"g++-{major}" for major in range(newest, 8, -1))]:
        path = shutil.which(name, path=environ.get("PATH"))
        if not path:
            continue
        try:
            version = run([path, "-dumpfullversion"]).output.strip()
        except ProgramFailed:
            continue
        if re.fullmatch(r"\d+(\.\d+)*", version):
            cc = shutil.which(re.sub(r"g\+\+", "gcc", Path(path).name), path=str(Path(path).parent))
            if int(version.split(".")[0]) <= newest and cc:
                return HostCompiler(Path(path), Path(cc), version)
            found.append(f"{path} is g++ {version}")
    known = "; ".join(found) or "no g++ on PATH"
    raise ToolchainError([f"it needs g++ {newest} or older (found: {known}); apt-get install g++-{newest}"])


def state(toolchain: Toolchain) -> dict[str, list[int]]:
    """Return size, time (ns) and inode of every compiler. While they stay, the compilers are not hashed again.

    Raises:
        OSError: a compiler is missing.
    """
    found = {name: path.stat() for name, path in toolchain.programs.items()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}


def _system(recipe: CudaRecipe, environ: Mapping[str, str]) -> Toolchain:
    reasons = []
    for home in candidates(environ):
        if reason := unsuitable(recipe, home):
            reasons.append(reason)
        else:
            return _described(home, "system", f"toolkit {nvcc_version(home)}", host_compiler(home, environ))
    raise ToolchainError(reasons or ["CUDA_HOME is not set, and there is no nvcc on PATH"])


def _provided(
    recipe: CudaRecipe, provision: Provision, origin: str, store: Store, folder: Path, environ: Mapping[str, str]
) -> Toolchain:
    """Assemble a CUDA_HOME from archives and wheels, or reuse the one that was assembled before."""
    lock = recipe.beside(provision.lock)
    libraries = files.sha256(lock)
    key = files.digest([[archive.sha256 for archive in provision.archives], libraries, NVCC_PROFILE])[:12]
    home = folder / f"{origin}-{provision.version}-{key}"
    if not home.is_dir():
        archives = [archive.artifact for archive in provision.archives]
        # Smallest archive first, so that a dead host fails early.
        store.get(min(archives, key=lambda archive: archive.size or MOST))
        console.note(f"assembling CUDA {provision.version} from {', '.join(archive.file for archive in archives)}")
        with files.replacing_folder(home) as beside:
            _assemble(archives, lock, store, beside)
    host = host_compiler(home, environ)
    if not (home / "lib64/stubs" / driver_stub.SONAME).exists():
        driver_stub.compile_stub(home / "include", home / "lib64/stubs", host.cc)
    made_from = [replace(materials.of_source(archive), kind="compiler") for archive in provision.archives]
    return _described(home, origin, f"lock {libraries}", host, [*made_from, *materials.of_lock(lock)])


def _assemble(archives: Sequence[Artifact], lock: Path, store: Store, home: Path) -> None:
    parts = home / "parts"
    with contextlib.closing(store.arriving(archives)) as arriving:  # unpack one archive while others are downloading
        for archive, path in arriving:
            part = parts / str(archives.index(archive))
            part.mkdir(parents=True)
            unpack(path, part)
    environment.install_into(lock, parts / "wheels", store.indexes, offline=store.offline)
    for path in sorted(parts.rglob("*")):
        place = _place(path.as_posix().removeprefix(parts.as_posix()))
        if place and path.is_file() and not (home / place).exists():
            (home / place).parent.mkdir(parents=True, exist_ok=True)
            os.link(path.resolve(), home / place)
    files.remove(parts)
    for folder in ("bin", "lib64"):  # archives of other origins can lack them
        (home / folder).mkdir(exist_ok=True)
    (home / "lib").symlink_to("lib64")
    loader.link_libraries(home / "lib64")
    (home / "bin/nvcc.profile").write_text(NVCC_PROFILE)
    device_runtime = home / "lib64/libcudadevrt.a"
    if not device_runtime.exists():
        device_runtime.write_bytes(b"!<arch>\n")  # an empty archive: no kernel here launches kernels
    if missing := [name for name in (*COMPILERS, *LIBRARIES) if not (home / name).exists()]:
        raise ToolchainError([f"the archives lack {', '.join(missing)}"])


def _place(name: str) -> str | None:
    """Return the place in a CUDA_HOME for a file of an archive or a wheel; ``None`` for files that are not needed."""
    if NOT_PLACED.search(name):
        return None
    for pattern, place in PLACES:
        if match := re.search(pattern, name):
            return match.expand(place)
    return None


def _described(
    home: Path, origin: str, libraries: str, host: HostCompiler, made_from: Sequence[Material] = ()
) -> Toolchain:
    host_parts = {f"g++/{name}": path for name, path in _host_parts(host).items()}
    programs = {**{name: home / name for name in COMPILERS}, **host_parts}
    hashes = {name: files.sha256(path) for name, path in programs.items()}
    version = nvcc_version(home)
    compilers = [
        Material(name, "compiler", host.version if name in host_parts else version, "", (sha256,))
        for name, sha256 in hashes.items()
    ]
    identity = {**hashes, "headers and libraries": libraries, "g++": host.version}
    return Toolchain(home, origin, version, host, identity, programs, (*compilers, *made_from))


def _host_parts(host: HostCompiler) -> dict[str, Path]:
    asked = {name: run([host.cxx, f"-print-prog-name={name}"]).output.strip() for name in HOST_PARTS}
    return {name: Path(shutil.which(found) or found).resolve() for name, found in asked.items()}
