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

import triton  # isort: skip - after pretended_gpu, which settles what imports find
from triton.backends.nvidia import driver  # isort: skip
from triton.backends.nvidia.compiler import CUDABackend  # isort: skip
from triton.runtime.build import _build, platform_key  # isort: skip

SEQUENCES = (1, 2, 16)
"""Triton compiles anew for an integer that is 1, one that 16 divides, and any other."""
TOKENS = (1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 48, 64, 65, 96, 100, 128, 129, 160, 200, 256, 512, 1000, 2048, 8192)
"""For experts: what the tiles depend on, and what 16 divides or not."""
ARCHITECTURES = (("64bit", "ELF"), ("64bit", ""))
"""What platform.architecture() says where there is a program ``file``, and where not: part of a launcher's key."""
MAX_MODEL_LEN = 4096
"""Any other that 256 divides is the same to the kernels, with blocks of 16 tokens."""


def needed(
    shapes: Iterable[Shape],
    parallel: Sequence[int] = TENSOR_PARALLEL,
    max_model_len: int = MAX_MODEL_LEN,
    caches: Sequence[str] = ("auto", "e5m2"),
) -> list[Case]:
    """The calls that models of these shapes make on so many cards each, with each of these KV caches."""
    found: dict[Case, None] = {}
    for shape in shapes:
        for cards in parallel:
            if shape.heads % cards == 0:
                for cache in caches:
                    found |= dict.fromkeys(_of(shape, cards, max_model_len, "" if cache == "auto" else cache))
    return list(found)


def _of(shape: Shape, cards: int, max_model_len: int, kv: str) -> Iterator[Case]:
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
class Warmed:
    """What a cache has."""

    kernels: int
    launchers: int
    size: int
    """Bytes."""


class Missing(Exception):  # noqa: N818 - it says what happened
    """A kernel that is not in the cache."""


def fill(
    cache: Path,
    wanted: Sequence[Case],
    place: Path | None = None,
    *,
    jobs: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Warmed:
    """Compile what the calls launch into a cache that will lie at ``place``.

    Raises:
        DoesNotCompile: Triton refuses a kernel.
    """
    cache.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(cache)
    triton.knobs.compilation.store_binary_only = True
    # Line numbers bring the paths of this environment into the code. The variable is part of the key, and stays unset.
    triton.knobs.propagate_env = False
    triton.knobs.compilation.disable_line_info = True
    for number, case in enumerate(parallel.each(_compiled, wanted, jobs), 1):
        tell(f"{number} of {len(wanted)}: {case}")
    seen = _called(wanted)  # which finds them, or says what is wrong with one
    with mock.patch("triton.runtime.build._build", _without_paths):
        for architecture in ARCHITECTURES:
            with mock.patch("platform.architecture", lambda said=architecture: said):
                platform_key.cache_clear()
                _launchers(seen)
    platform_key.cache_clear()
    for source in cache.glob("*/*.source"):  # Triton's intermediate form, with this machine's paths
        source.unlink()
    relocate(cache, place or cache)
    files = [path for path in cache.rglob("*") if path.is_file()]
    return Warmed(len(seen), len(list(cache.glob("*/*.so"))), sum(path.stat().st_size for path in files))


def _without_paths(name: str, source: str, folder: str, *words: Any) -> str:
    """Triton's call of the C compiler, whose ``__FILE__`` would be the name of a temporary folder."""
    *words, flags = words
    return str(_build(name, source, folder, *words, [*flags, f"-ffile-prefix-map={folder}=."]))


@contextlib.contextmanager
def only_from(cache: Path) -> Iterator[None]:
    """Inside, Triton's compiler, ptxas and the C compiler refuse: what is not in the cache is ``Missing``."""

    def refuse(*_: object, **__: object) -> None:
        raise Missing("it is not in the cache")

    triton.knobs.cache.dir = str(cache)
    with mock.patch.object(CUDABackend, "add_stages", refuse), mock.patch("triton.runtime.build._build", refuse):
        yield


def check(cache: Path, wanted: Sequence[Case]) -> int:
    """Make the same calls where nothing can be compiled; gives how many kernels were found.

    Raises:
        DoesNotCompile: one of them was not.
        Missing: a launcher was not.
    """
    with only_from(cache):
        seen = _called(wanted)
        _launchers(seen)
    return len(seen)


def _launchers(seen: Mapping[str, pretended_gpu.Launch]) -> None:
    """Make the small libraries by which kernels are launched, or find them."""
    driver.CudaUtils()
    for launch in seen.values():
        driver.CudaLauncher(launch.kernel.src, launch.kernel.metadata)


def _compiled(case: Case) -> str:
    """Fill the cache for one call; gives its name."""
    with contextlib.suppress(pretended_gpu.DoesNotCompile):
        _called([case])
    return case.name


def _called(wanted: Sequence[Case]) -> dict[str, pretended_gpu.Launch]:
    """What the calls launch, by Triton's key."""
    seen: dict[str, pretended_gpu.Launch] = {}
    for case in wanted:
        with pretended_gpu.launches() as launched:
            case.call(**case.tensors(Tensors()))
        seen |= {launch.kernel.hash: launch for launch in launched}
    return seen


def relocate(cache: Path, place: Path) -> None:
    """Let a cache say that it lies at ``place``: Triton notes the files of a kernel by their whole paths.

    The path of the library that was linked goes, too: it was read for the compile, and is the environment's.
    """
    for group in cache.glob("*/__grp__*.json"):
        names = [name for name in json.loads(group.read_text())["child_paths"] if (group.parent / name).exists()]
        paths = {name: str(place / group.parent.name / name) for name in sorted(names)}
        _write(group, {"child_paths": paths})
        notes = group.with_name(group.name.removeprefix("__grp__"))
        libraries = [[name, Path(path).name] for name, path in json.loads(notes.read_text())["extern_libs"]]
        _write(notes, {**json.loads(notes.read_text()), "extern_libs": libraries})


def _write(path: Path, value: Any) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m volta.triton_kernels.precompile", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--at", type=Path, help="where it will lie, if elsewhere")
    parser.add_argument("--model", type=Path, action="append", help="a config.json, instead of the common models")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=TENSOR_PARALLEL)
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    parser.add_argument("--kv", choices=("auto", "e5m2"), nargs="+", default=("auto", "e5m2"), help="KV caches")
    parser.add_argument("--jobs", type=int, help="processes at once; otherwise one for each core")
    parser.add_argument("--progress", action="store_true", help="say a line for each call")
    parser.add_argument("--check", action="store_true", help="only look whether all is there")
    asked = parser.parse_args(words)
    try:
        shapes = [Shape.of(json.loads(path.read_text()), path.parent.name) for path in asked.model or ()] or SHAPES
    except KeyError as error:
        parser.error(f"--model has no {error}, which a transformer's config.json has")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.error(f"--model is no config.json that can be read: {error}")
    pretended_gpu.capability()
    wanted = needed(shapes, asked.tensor_parallel, asked.max_model_len, asked.kv)
    try:
        if asked.check:
            print(f"{check(asked.cache, wanted)} kernels, all in the cache")
            return 0
        tell = functools.partial(print, flush=True) if asked.progress else lambda _: None
        warmed = fill(asked.cache.resolve(), wanted, asked.at, jobs=asked.jobs, tell=tell)
    except (pretended_gpu.DoesNotCompile, Missing) as error:
        print(f"volta.triton_kernels.precompile: {error}", file=sys.stderr)
        return 1
    print(f"{warmed.kernels} kernels and {warmed.launchers} launchers, {warmed.size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
