"""vLLM's own CUDA kernels for 7.0, twice: as PTX for any later card, and as the wheel has them for a Volta."""

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

from voltforge.compile import build, sandbox, scheduler
from voltforge.compile.build import Workshop
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

if TYPE_CHECKING:  # a checkout without volta/ can do without it until it is asked for kernels
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
"""Those that volta/gpu_rows has rows for."""
EXTENSIONS = ("vllm/_C.abi3.so", "vllm/_moe_C.abi3.so")
"""The files of the wheel that they are linked into."""
GENCODE = "-gencode=arch=compute_70,code=[sm_70,compute_70]"
"""What nvcc calls 7.0+PTX: both from one run of its compiler."""
HINT = "./doit wheels:vllm"
AGAIN = f"rm -f build/stages/build-vllm.json wheelhouse/receipts/vllm-*.json, then {HINT}"
"""A kept wheel makes its build needless, so that it has to be forgotten first."""
ALONE = frozenset({"-MD"})
FOLLOWED = frozenset({"-gencode", "--generate-code", "-MT", "-MF", "-o"})
"""Options of nvcc that are not taken over, without and with a value of their own."""
MAKING = 1
"""Goes up when the same build would give other images."""
_SOURCE = re.compile(r'^#include "(.+\.cu)"', re.MULTILINE)
_ENTRY = re.compile(r"^\s*(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$.]+)", re.MULTILINE)


class ImageError(VoltforgeError):
    """Code of a kernel that cannot be had."""


@dataclass(frozen=True)
class Bench:
    """The workshop that a wheel was compiled in, and what ninja did there."""

    shop: Workshop
    commands: Mapping[str, Sequence[str]]
    """The words that compile each source, by its path in the tree: those of the file that includes it, if one does."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Bench:
        """That of the wheel which the checkout keeps.

        Raises:
            ImageError: its work folder is gone, or is of other inputs than today's.
            NotRun: it was never built here.
        """
        vllm = pipeline.source_build("vllm")
        record = vllm.build.record()
        if record and record.key != vllm.build.key():
            raise ImageError("the build of vllm is of other sources or tools than today's", hint=HINT)
        around = vllm.build.result().sandbox
        shop = vllm.workshop(Sandbox(around) if around else sandbox.choose(pipeline.settings.sandbox))
        tree = shop.folders["tree"]
        scripts = sorted(tree.glob("build/temp*/build.ninja")) if tree.is_dir() else []
        if not scripts:
            raise ImageError(f"the work folder of vllm's build, {shop.work}, is gone", hint=AGAIN)
        seen = files.read_json(shop.work / build.PLACE)
        if seen != str(shop.places["tree"]):
            raise ImageError(f"vllm was built in {seen}, which this sandbox cannot show", hint="the sandbox= it had")
        ninja = (shop.environment.path / "bin" / "ninja").resolve()
        asked = run([ninja, "-C", scripts[-1].parent, "-t", "compdb"]).output
        return cls(shop, followed(commands(asked[asked.index("[") :], shop.places["tree"]), tree))


def commands(compdb: str, tree: Path) -> dict[str, list[str]]:
    """How ninja compiles each source below ``tree``, from the JSON that ``ninja -t compdb`` prints.

    Without what asks for leave: it is one command at a time.
    """
    found = {}
    for one in json.loads(compdb):
        source = Path(one["file"])
        if source.is_relative_to(tree):
            words = shlex.split(one["command"])
            asks = next((place for place, word in enumerate(words) if Path(word).name == scheduler.LAUNCHER.name), -1)
            found[str(source.relative_to(tree))] = words[asks + 1 :]
    return found


def followed(commands: Mapping[str, Sequence[str]], tree: Path) -> dict[str, Sequence[str]]:
    """The commands, and those of the sources that a compiled one includes whole."""
    found = dict(commands)
    for source, words in commands.items():
        for name in _SOURCE.findall((tree / source).read_text(errors="replace")):
            found.setdefault(os.path.normpath(Path(source).parent / name), words)
    return found


def rewritten(words: Sequence[str], out: Path) -> list[str]:
    """A command of ninja's for nvcc that leaves the device code alone, for 7.0 and as PTX, in a file of its own.

    Raises:
        ImageError: it does not compile one source for 7.0.
    """
    made, rest, archs, compiles = [], iter(words), [], False
    for word in rest:
        if word in FOLLOWED:
            value = next(rest, "")
            archs += [value] if "gen" in word else []
        elif word.startswith(("-gencode=", "--generate-code=")):
            archs.append(word.partition("=")[2])
        elif word == "-c":
            compiles = True
            made.append("-fatbin")
        elif word not in ALONE:
            made.append(word)
    if not compiles or set(archs) != {"arch=compute_70,code=sm_70"}:
        asked = ", ".join(dict.fromkeys(archs)) or "no architecture"
        raise ImageError(f"a command of the build compiles for {asked}, not for 7.0 alone: {shlex.join(words)[:200]}")
    return [*made, GENCODE, "-o", str(out)]


def images(pipeline: Pipeline, sources: Sequence[str] = SOURCES) -> dict[str, Image]:
    """Each source's kernels, beside those it is compiled with: once more for their PTX, with the wheel's own cubin.

    It takes minutes the first time; ``build/gpu/images/`` keeps them for as long as the build stands.

    Raises:
        ImageError: there is no finished build to take the commands from, or a source is not in it.
        NotRun: vllm was never built here.
    """
    from volta.gpu.rows import Image

    build = pipeline.source_build("vllm").build.record()
    wheel = pipeline.package(pipeline.recipes["vllm"]).wheels.result()  # fails with the command that makes one
    if build is None:
        raise ImageError("there is no build of vllm here, only its wheel", hint=AGAIN)
    key = files.digest({"build": build.key, "wheel": wheel.sha256, "sources": list(sources), "making": MAKING})
    folder = pipeline.scratch / "gpu" / "images" / key[:16]
    if not folder.is_dir():
        bench = Bench.of(pipeline)
        shipped = cubins(pipeline.wheelhouse.path / wheel.file, pipeline.toolchain.result())
        with files.replacing_folder(folder) as made:
            known: dict[str, Image] = {}
            for source in sources:
                command = shlex.join(bench.commands.get(source, [source]))
                if command not in known:
                    one = compiled(bench, source, pipeline.scratch / "logs" / "gpu-images.log")
                    known[command] = Image(one.ptx, the_wheels(one, shipped))
                one = known[command]
                files.write(made / _file(source, "ptx"), one.ptx)
                files.write(made / _file(source, "cubin"), one.cubin)
    return {
        source: Image((folder / _file(source, "ptx")).read_text(), (folder / _file(source, "cubin")).read_bytes())
        for source in sources
    }


def compiled(bench: Bench, source: str, log: Path) -> Image:
    """One source compiled in the workshop, beside what its build made.

    Raises:
        ImageError: the build has no such source, or it does not compile.
    """
    if source not in bench.commands:
        raise ImageError(f"the build of vllm does not compile {source}", hint="is it of this version?")
    console.step(f"compile {source} for 7.0, as PTX and as cubin")
    name = "gpu-image.fatbin"
    made = bench.shop.folders["home"] / name
    files.remove(made)
    try:
        bench.shop.run(rewritten(bench.commands[source], bench.shop.places["home"] / name), log=log)
        return extracted(made, bench.shop.toolchain)
    except ProgramFailed as error:
        first = build.first_error(log)
        raise ImageError(f"{source} was not compiled for its PTX: {first}", hint=f"the whole log is {log}") from error
    finally:
        files.remove(made)


def extracted(path: Path, toolchain: Toolchain) -> Image:
    """The one PTX and the one cubin of a fatbin.

    Raises:
        ImageError: it has not one of each.
    """
    from volta.gpu.rows import Image

    texts, codes = _listed(path, toolchain, "ptx"), _listed(path, toolchain, "elf")
    if len(texts) != 1 or len(codes) != 1:
        raise ImageError(f"{path} has {len(texts)} PTX and {len(codes)} cubins, not one of each")
    return Image(texts[0].decode(), codes[0])


def cubins(wheel: Path, toolchain: Toolchain) -> list[bytes]:
    """The device code for 7.0 in a wheel's extensions, one cubin for each source that was linked into them."""
    found: list[bytes] = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for name in EXTENSIONS:
            found += _listed(Path(archive.extract(name, folder)), toolchain, "elf")
    return found


def the_wheels(image: Image, shipped: Sequence[bytes]) -> bytes:
    """That of the wheel's cubins which is an image's own: the same bytes, else the one that has the same kernels.

    Names that carry nvcc's hash of a source, as those of functions that no other source sees, stand in none of
    :data:`SOURCES`; in the wheel they are arguments of gguf_kernel.cu's templates alone.

    Raises:
        ImageError: none has them, or more than one.
    """
    if image.cubin in shipped:
        return image.cubin
    wanted = frozenset(entries(image.ptx))
    holding = [one for one in shipped if wanted <= kernels(one)]
    if not wanted or len(holding) != 1:
        first = min(wanted, default="no kernel")
        raise ImageError(f"{len(holding)} of the wheel's {len(shipped)} cubins have {first}, not one", hint=HINT)
    console.warn("the wheel's cubin is not the one that the same command gives now")
    return holding[0]


def shipped(pipeline: Pipeline, symbol: str) -> list[bytes]:
    """The cubins of the kept wheel that define a kernel, by its mangled name."""
    wheel = pipeline.wheelhouse.path / pipeline.package(pipeline.recipes["vllm"]).wheels.result().file
    return [one for one in cubins(wheel, pipeline.toolchain.result()) if symbol in kernels(one)]


def entries(ptx: str) -> list[str]:
    """The mangled names of the kernels that a PTX defines."""
    return _ENTRY.findall(ptx)


def kernels(cubin: bytes) -> frozenset[str]:
    """The mangled names of the kernels that a cubin defines.

    Raises:
        ImageError: it is none.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        # Each kernel's code has a section of its own, and what it takes another (CUDA Binary Utilities, 2.3).
        names = [section.name for section in ELFFile(BytesIO(cubin)).iter_sections()]
    except ELFError as error:
        raise ImageError(f"it is no cubin: {error}") from error
    return frozenset(name.removeprefix(".text.") for name in names if name.startswith(".text."))


def _listed(path: Path, toolchain: Toolchain, kind: str) -> list[bytes]:
    """What cuobjdump takes out of a file: ``ptx`` or ``elf``, in the file's order."""
    tool = (toolchain.home / "bin" / "cuobjdump").resolve()
    if not tool.is_file():
        raise ImageError(f"{toolchain} has no cuobjdump", hint="cuda=distro")
    with tempfile.TemporaryDirectory() as folder:
        # It writes where it stands, under names that it makes of the file's.
        run([tool, f"-x{kind}", "all", path.resolve()], cwd=Path(folder))
        ending = {"ptx": "ptx", "elf": "cubin"}[kind]
        return [one.read_bytes() for one in sorted(Path(folder).glob(f"*.sm_70.{ending}"), key=_number)]


def _number(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _file(source: str, ending: str) -> str:
    return f"{source.replace('/', '-')}.{ending}"
