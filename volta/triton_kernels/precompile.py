"""Compile Triton kernels ahead of time into a cache folder, without a GPU.

Usage: ``python -m volta.triton_kernels.precompile --cache DIR``. A server on 7.0 that has the folder as its
TRITON_CACHE_DIR finds the kernels of the models in volta/triton_kernels/model_shapes.py, or of the config.json that
``--model`` names, and the small launchers that Triton builds with a C compiler. Otherwise the server's first requests
wait for the compiler.

``--check`` compiles nothing and exits with status 1 if a kernel or launcher is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from volta import parallel, pretended_gpu
from volta.triton_kernels.attention import Attention, Cache
from volta.triton_kernels.awq import AwqDequantize, AwqGemm
from volta.triton_kernels.case import Case, Tensors
from volta.triton_kernels.experts import Experts
from volta.triton_kernels.model_shapes import SHAPES, TENSOR_PARALLEL, Shape
from volta.triton_kernels.rotary import Mrope

import triton  # isort: skip - after pretended_gpu, which sets the environment
from triton.backends.nvidia import driver  # isort: skip
from triton.backends.nvidia.compiler import CUDABackend  # isort: skip
from triton.runtime.build import _build, platform_key  # isort: skip

SEQUENCES = (1, 2, 16)
"""Triton compiles a kernel separately for an integer argument that is 1, one divisible by 16, and any other."""
TOKENS = (1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 48, 64, 65, 96, 100, 128, 129, 160, 200, 256, 512, 1000, 2048, 8192)
"""Token counts for experts: one for each tile size, divisible by 16 and not."""
ARCHITECTURES = (("64bit", "ELF"), ("64bit", ""))
"""The results of platform.architecture() with and without the program ``file``: part of a launcher's key."""
MAX_MODEL_LEN = 4096
"""With blocks of 16 tokens, the kernels are the same for any other length divisible by 256."""


def cases_to_compile(
    shapes: Iterable[Shape],
    parallel: Sequence[int] = TENSOR_PARALLEL,
    max_model_len: int = MAX_MODEL_LEN,
    caches: Sequence[str] = ("auto", "e5m2"),
) -> list[Case]:
    """Return the calls that models of these shapes make, for each number of cards and each KV cache."""
    cases: dict[Case, None] = {}
    for shape in shapes:
        for cards in parallel:
            if shape.heads % cards == 0:
                for cache in caches:
                    cases |= dict.fromkeys(_calls(shape, cards, max_model_len, "" if cache == "auto" else cache))
    return list(cases)


def _calls(shape: Shape, cards: int, max_model_len: int, kv: str) -> Iterator[Case]:
    heads, kv_heads, size = shape.heads // cards, max(1, shape.kv_heads // cards), shape.head_size
    for window in shape.windows:
        for sequences in SEQUENCES:
            for query in (1, 16):
                yield Attention(
                    dtype=shape.dtype, kv=kv, head_size=size, heads=heads, kv_heads=kv_heads, window=window,
                    softcap=shape.softcap, alibi=shape.alibi, sequences=sequences, query=query,
                    blocks=-(max_model_len // -16),
                )  # fmt: skip
    yield Cache(dtype=shape.dtype, kv=kv, heads=heads, kv_heads=kv_heads, head_size=size)
    if shape.mrope:
        for tokens in SEQUENCES:
            yield Mrope(
                dtype=shape.dtype, heads=heads, kv_heads=kv_heads, head_size=size, sections=shape.mrope, tokens=tokens
            )
    if shape.awq:
        yield AwqDequantize(rows=4096, columns=4096, group=shape.awq)
        for tokens in SEQUENCES:
            yield AwqGemm(rows=4096, columns=4096, group=shape.awq, tokens=tokens)
    if shape.experts:
        for bits in shape.bits:
            for tokens in TOKENS:
                yield Experts(
                    bits=bits, zeros=shape.zeros and bits < 16, group=shape.group, experts=shape.experts,
                    top_k=shape.top_k, hidden=shape.hidden, width=shape.width // cards, tokens=tokens,
                )  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The contents of a cache."""

    kernels: int
    launchers: int
    size: int
    """Bytes."""


class MissingError(Exception):
    """A kernel or launcher is not in the cache."""


def fill(
    cache: Path,
    wanted: Sequence[Case],
    place: Path | None = None,
    *,
    jobs: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Contents:
    """Compile the kernels of the calls into ``cache``, which will be moved to ``place``.

    Raises:
        KernelCompileError: Triton does not compile a kernel.
    """
    cache.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(cache)
    triton.knobs.compilation.store_binary_only = True
    # With line numbers, the code contains paths of this environment. The variable is part of the key and stays unset.
    triton.knobs.propagate_env = False
    triton.knobs.compilation.disable_line_info = True
    for number, case in enumerate(parallel.run_in_processes(_compiled, wanted, jobs), 1):
        tell(f"{number} of {len(wanted)}: {case}")
    launched = _called(wanted)  # finds the kernels in the cache, or raises the error of one
    with mock.patch("triton.runtime.build._build", _without_paths):
        for architecture in ARCHITECTURES:
            with mock.patch("platform.architecture", lambda result=architecture: result):
                platform_key.cache_clear()
                _launchers(launched)
    platform_key.cache_clear()
    for source in cache.glob("*/*.source"):  # Triton's intermediate form, with this machine's paths
        source.unlink()
    relocate(cache, place or cache)
    files = [path for path in cache.rglob("*") if path.is_file()]
    return Contents(len(launched), len(list(cache.glob("*/*.so"))), sum(path.stat().st_size for path in files))


def _without_paths(name: str, source: str, folder: str, *words: Any) -> str:
    """Run Triton's C compilation so that ``__FILE__`` does not name a temporary folder."""
    *words, flags = words
    return str(_build(name, source, folder, *words, [*flags, f"-ffile-prefix-map={folder}=."]))


@contextlib.contextmanager
def only_from(cache: Path) -> Iterator[None]:
    """Inside the block, raise ``MissingError`` instead of running Triton's compiler, ptxas or the C compiler."""

    def refuse(*_: object, **__: object) -> None:
        raise MissingError("it is not in the cache")

    triton.knobs.cache.dir = str(cache)
    with mock.patch.object(CUDABackend, "add_stages", refuse), mock.patch("triton.runtime.build._build", refuse):
        yield


def check(cache: Path, wanted: Sequence[Case]) -> int:
    """Make the same calls without a compiler; return the number of kernels in the cache.

    Raises:
        KernelCompileError: a kernel is not in the cache.
        MissingError: a launcher is not in the cache.
    """
    with only_from(cache):
        launched = _called(wanted)
        _launchers(launched)
    return len(launched)


def _launchers(launched: Mapping[str, pretended_gpu.Launch]) -> None:
    """Build the small libraries that launch kernels, or find them in the cache."""
    driver.CudaUtils()
    for launch in launched.values():
        driver.CudaLauncher(launch.kernel.src, launch.kernel.metadata)


def _compiled(case: Case) -> str:
    """Compile the kernels of one call into the cache; return the call's name."""
    with contextlib.suppress(pretended_gpu.KernelCompileError):
        _called([case])
    return case.name


def _called(wanted: Sequence[Case]) -> dict[str, pretended_gpu.Launch]:
    """Return the launches of the calls, by Triton's key."""
    launched: dict[str, pretended_gpu.Launch] = {}
    for case in wanted:
        with pretended_gpu.launches() as launches:
            case.call(**case.tensors(Tensors()))
        launched |= {launch.kernel.hash: launch for launch in launches}
    return launched


def relocate(cache: Path, place: Path) -> None:
    """Rewrite the paths in a cache for its new ``place``: Triton stores absolute paths of a kernel's files.

    The path of the linked library is reduced to its name, because it lies in the environment that compiled.
    """
    for group in cache.glob("*/__grp__*.json"):
        names = [name for name in json.loads(group.read_text())["child_paths"] if (group.parent / name).exists()]
        paths = {name: str(place / group.parent.name / name) for name in sorted(names)}
        _write(group, {"child_paths": paths})
        metadata = group.with_name(group.name.removeprefix("__grp__"))
        libraries = [[name, Path(path).name] for name, path in json.loads(metadata.read_text())["extern_libs"]]
        _write(metadata, {**json.loads(metadata.read_text()), "extern_libs": libraries})


def _write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m volta.triton_kernels.precompile", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--at", type=Path, help="the folder's final path, if it will be moved")
    parser.add_argument("--model", type=Path, action="append", help="a config.json, instead of the common models")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=TENSOR_PARALLEL)
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    parser.add_argument("--kv", choices=("auto", "e5m2"), nargs="+", default=("auto", "e5m2"), help="KV caches")
    parser.add_argument("--jobs", type=int, help="number of processes (default: one for each core)")
    parser.add_argument("--progress", action="store_true", help="print a line for each call")
    parser.add_argument("--check", action="store_true", help="compile nothing; fail if a kernel is missing")
    options = parser.parse_args(words)
    try:
        shapes = [Shape.of(json.loads(path.read_text()), path.parent.name) for path in options.model or ()] or SHAPES
    except KeyError as error:
        parser.error(f"--model has no {error}, which a transformer's config.json must have")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.error(f"--model cannot be read as a config.json: {error}")
    pretended_gpu.capability()
    wanted = cases_to_compile(shapes, options.tensor_parallel, options.max_model_len, options.kv)
    try:
        if options.check:
            print(f"{check(options.cache, wanted)} kernels, all in the cache")
            return 0
        tell = functools.partial(print, flush=True) if options.progress else lambda _: None
        contents = fill(options.cache.resolve(), wanted, options.at, jobs=options.jobs, tell=tell)
    except (pretended_gpu.KernelCompileError, MissingError) as error:
        print(f"volta.triton_kernels.precompile: {error}", file=sys.stderr)
        return 1
    print(f"{contents.kernels} kernels and {contents.launchers} launchers, {contents.size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
