"""Compile vLLM's CUDA kernels a second time, as PTX for newer GPUs, beside the cubins of the wheel for 7.0."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from voltforge.compile import sandbox, scheduler, work_folder
from voltforge.compile.build import Build
from voltforge.compile.build_log import first_error
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

if TYPE_CHECKING:  # a checkout may lack volta/
    from volta.gpu.rows import Image

SOURCES = (
    "csrc/quantization/gptq/q_gemm.cu",
    "csrc/layernorm_kernels.cu",
    "csrc/pos_encoding_kernels.cu",
    "csrc/activation_kernels.cu",
    "csrc/cache_kernels.cu",
    "csrc/moe/topk_softmax_kernels.cu",
    "csrc/moe/moe_align_sum_kernels.cu",
    "csrc/moe/moe_wna16.cu",
)
"""The sources of the kernels that volta/gpu_rows has rows for."""
EXTENSIONS = ("vllm/_C.abi3.so", "vllm/_moe_C.abi3.so")
"""The extension modules of the wheel that these sources are linked into."""
GENCODE = "-gencode=arch=compute_70,code=[sm_70,compute_70]"
"""nvcc's option for a cubin and PTX from one run of its compiler."""
BUILD_HINT = "./doit wheels:vllm"
REBUILD_HINT = f"rm -f build/stages/build-vllm.json wheelhouse/receipts/vllm-*.json, then {BUILD_HINT}"
"""With a current wheel the build stage is skipped, so its records must be removed first."""
DROPPED_FLAGS = frozenset({"-MD"})
DROPPED_OPTIONS = frozenset({"-gencode", "--generate-code", "-MT", "-MF", "-o"})
"""Options of nvcc with a separate value that are not taken over from the build."""
FORMAT = 1
"""Version of the kept images. Increase it if the same build must give other images."""
_INCLUDED_SOURCE = re.compile(r'^#include "(.+\.cu)"', re.MULTILINE)
_ENTRY = re.compile(r"^\s*(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$.]+)", re.MULTILINE)


class CudaKernelError(VoltforgeError):
    """The PTX or the cubin of a kernel cannot be made or found."""


@dataclass(frozen=True)
class BuildCommands:
    """The build of the wheel, and the commands that ninja ran in it."""

    build: Build
    commands: Mapping[str, Sequence[str]]
    """The nvcc command of each source, by its path in the tree."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> BuildCommands:
        """Read the commands of vLLM's build.

        Raises:
            CudaKernelError: the work folder is missing, or belongs to other inputs than the current ones.
            NotRun: vLLM was never built in this checkout.
        """
        vllm = pipeline.source_build("vllm")
        record = vllm.build.record()
        if record and record.key != vllm.build.key():
            raise CudaKernelError("the build of vllm does not match the current sources or tools", hint=BUILD_HINT)
        kind = vllm.build.result().sandbox
        build = vllm.build_in(Sandbox(kind) if kind else sandbox.choose(pipeline.settings.sandbox))
        tree = build.folders["tree"]
        scripts = sorted(tree.glob("build/temp*/build.ninja")) if tree.is_dir() else []
        if not scripts:
            raise CudaKernelError(f"the work folder of vllm's build is missing: {build.work}", hint=REBUILD_HINT)
        built_in = files.read_json(build.work / work_folder.PLACE)
        if built_in != str(build.places["tree"]):
            raise CudaKernelError(
                f"vllm was built in {built_in}, which this sandbox cannot provide", hint="use the same sandbox= again"
            )
        ninja = (build.environment.path / "bin" / "ninja").resolve()
        output = run([ninja, "-C", scripts[-1].parent, "-t", "compdb"]).output
        commands = parse_compdb(output[output.index("[") :], build.places["tree"])
        return cls(build, with_included_sources(commands, tree))


def parse_compdb(compdb: str, tree: Path) -> dict[str, list[str]]:
    """Return the compile command of each source below ``tree``, without the scheduler's launcher.

    Args:
        compdb: the JSON that ``ninja -t compdb`` prints.
        tree: the sources, as the build saw them.
    """
    commands = {}
    for rule in json.loads(compdb):
        source = Path(rule["file"])
        if source.is_relative_to(tree):
            words = shlex.split(rule["command"])
            names = [Path(word).name for word in words]
            start = names.index(scheduler.LAUNCHER.name) + 1 if scheduler.LAUNCHER.name in names else 0
            commands[str(source.relative_to(tree))] = words[start:]
    return commands


def with_included_sources(commands: Mapping[str, Sequence[str]], tree: Path) -> dict[str, Sequence[str]]:
    """Return the commands, and for each ``.cu`` file that a source includes the command of that source."""
    complete = dict(commands)
    for source, command in commands.items():
        for name in _INCLUDED_SOURCE.findall((tree / source).read_text(errors="replace")):
            complete.setdefault(os.path.normpath(Path(source).parent / name), command)
    return complete


def fatbin_command(command: Sequence[str], output: Path) -> list[str]:
    """Change a compile command so that nvcc writes a fatbin with a cubin for 7.0 and PTX to ``output``.

    Raises:
        CudaKernelError: the command does not compile one source for 7.0 alone.
    """
    changed, rest, archs, compiles = [], iter(command), [], False
    for word in rest:
        if word in DROPPED_OPTIONS:
            value = next(rest, "")
            archs += [value] if "gen" in word else []
        elif word.startswith(("-gencode=", "--generate-code=")):
            archs.append(word.partition("=")[2])
        elif word == "-c":
            compiles = True
            changed.append("-fatbin")
        elif word not in DROPPED_FLAGS:
            changed.append(word)
    if not compiles or set(archs) != {"arch=compute_70,code=sm_70"}:
        targets = ", ".join(dict.fromkeys(archs)) or "no architecture"
        raise CudaKernelError(
            f"a command of the build compiles for {targets}, not for 7.0 alone: {shlex.join(command)[:200]}"
        )
    return [*changed, GENCODE, "-o", str(output)]


def images(pipeline: Pipeline, sources: Sequence[str] = SOURCES) -> dict[str, Image]:
    """Return the PTX and the wheel's cubin of each source.

    The first call takes minutes. The results are kept in ``build/gpu/images/`` for the current build.

    Raises:
        CudaKernelError: there is no finished build, or a source is not part of it.
        NotRun: vLLM was never built in this checkout.
    """
    from volta.gpu.rows import Image

    record = pipeline.source_build("vllm").build.record()
    wheel = pipeline.package(pipeline.recipes["vllm"]).wheels.result()
    if record is None:
        raise CudaKernelError("vllm has a wheel but no build in this checkout", hint=REBUILD_HINT)
    key = files.digest({"build": record.key, "wheel": wheel.sha256, "sources": list(sources), "making": FORMAT})
    folder = pipeline.scratch / "gpu" / "images" / key[:16]
    if not folder.is_dir():
        cubins = wheel_cubins(pipeline.wheelhouse.path / wheel.file, pipeline.toolchain.result())
        _write_images(pipeline, sources, cubins, folder)
    return {
        source: Image((folder / _file(source, "ptx")).read_text(), (folder / _file(source, "cubin")).read_bytes())
        for source in sources
    }


def _write_images(pipeline: Pipeline, sources: Sequence[str], cubins: Sequence[bytes], folder: Path) -> None:
    """Compile the sources, each command once, and write their PTX and cubins to ``folder``."""
    from volta.gpu.rows import Image

    build_commands = BuildCommands.of(pipeline)
    log = pipeline.scratch / "logs" / "gpu-images.log"
    by_command: dict[str, Image] = {}
    with files.replacing_folder(folder) as temporary:
        for source in sources:
            command = shlex.join(build_commands.commands.get(source, [source]))
            if command not in by_command:
                compiled = compile_source(build_commands, source, log)
                by_command[command] = Image(compiled.ptx, matching_cubin(compiled, cubins))
            image = by_command[command]
            files.write(temporary / _file(source, "ptx"), image.ptx)
            files.write(temporary / _file(source, "cubin"), image.cubin)


def compile_source(build_commands: BuildCommands, source: str, log: Path) -> Image:
    """Compile one source with the tools of its build. The files of the build stay as they are.

    Raises:
        CudaKernelError: the source is not part of the build, or does not compile.
    """
    if source not in build_commands.commands:
        raise CudaKernelError(f"the build of vllm does not compile {source}", hint="check its path in this version")
    console.step(f"compile {source} for 7.0, as PTX and cubin")
    build, name = build_commands.build, "gpu-image.fatbin"
    fatbin = build.folders["home"] / name
    files.remove(fatbin)
    try:
        build.run(fatbin_command(build_commands.commands[source], build.places["home"] / name), log=log)
        return read_fatbin(fatbin, build.toolchain)
    except ProgramFailed as error:
        message = first_error(log)
        raise CudaKernelError(f"{source} does not compile as PTX: {message}", hint=f"see {log}") from error
    finally:
        files.remove(fatbin)


def read_fatbin(path: Path, toolchain: Toolchain) -> Image:
    """Return the PTX and the cubin of a fatbin.

    Raises:
        CudaKernelError: it does not have exactly one of each.
    """
    from volta.gpu.rows import Image

    ptx, cubins = _extract(path, toolchain, "ptx"), _extract(path, toolchain, "elf")
    if len(ptx) != 1 or len(cubins) != 1:
        raise CudaKernelError(f"{path} has {len(ptx)} PTX and {len(cubins)} cubins, not one of each")
    return Image(ptx[0].decode(), cubins[0])


def wheel_cubins(wheel: Path, toolchain: Toolchain) -> list[bytes]:
    """Return the cubins for 7.0 in the wheel's extension modules: one for each linked source."""
    cubins: list[bytes] = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for name in EXTENSIONS:
            cubins += _extract(Path(archive.extract(name, folder)), toolchain, "elf")
    return cubins


def matching_cubin(image: Image, cubins: Sequence[bytes]) -> bytes:
    """Return the wheel's cubin for an image: the same bytes, or else the cubin with the same kernels.

    The comparison is by mangled names. nvcc puts a hash of the source into the names of internal functions, but no
    kernel of :data:`SOURCES` has such a name; in the wheel only the template arguments of gguf_kernel.cu do.

    Raises:
        CudaKernelError: no cubin, or more than one, has the kernels.
    """
    if image.cubin in cubins:
        return image.cubin
    wanted = frozenset(ptx_kernels(image.ptx))
    matches = [cubin for cubin in cubins if wanted <= cubin_kernels(cubin)]
    if not wanted or len(matches) != 1:
        first = min(wanted, default="no kernel")
        count = f"{len(matches)} of the wheel's {len(cubins)} cubins"
        raise CudaKernelError(f"{count} have {first}; exactly 1 is expected", hint=BUILD_HINT)
    console.warn("the wheel's cubin differs from the cubin that the same command gives now")
    return matches[0]


def ptx_kernels(ptx: str) -> list[str]:
    """Return the mangled names of the kernels that a PTX text defines."""
    return _ENTRY.findall(ptx)


def cubin_kernels(cubin: bytes) -> frozenset[str]:
    """Return the mangled names of the kernels that a cubin defines.

    Raises:
        CudaKernelError: the bytes are not a cubin.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        # The code of each kernel is in a section .text.<name> (CUDA Binary Utilities, 2.3).
        names = [section.name for section in ELFFile(BytesIO(cubin)).iter_sections()]
    except ELFError as error:
        raise CudaKernelError(f"not a cubin: {error}") from error
    return frozenset(name.removeprefix(".text.") for name in names if name.startswith(".text."))


def _extract(path: Path, toolchain: Toolchain, kind: str) -> list[bytes]:
    """Return the device images for 7.0 that cuobjdump extracts from a file, ``ptx`` or ``elf``, in the file's order."""
    cuobjdump = (toolchain.home / "bin" / "cuobjdump").resolve()
    if not cuobjdump.is_file():
        raise CudaKernelError(f"{toolchain} has no cuobjdump", hint="cuda=distro")
    with tempfile.TemporaryDirectory() as folder:
        # cuobjdump writes to the current folder and numbers the files.
        run([cuobjdump, f"-x{kind}", "all", path.resolve()], cwd=Path(folder))
        suffix = {"ptx": "ptx", "elf": "cubin"}[kind]
        extracted = sorted(Path(folder).glob(f"*.sm_70.{suffix}"), key=_numbers)
        return [image.read_bytes() for image in extracted]


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _file(source: str, suffix: str) -> str:
    return f"{source.replace('/', '-')}.{suffix}"
