"""Compile every case for 7.0 and measure what each kernel needs: registers, spills, shared memory, instructions.

Usage: ``python -m volta.triton_kernels.measure``. It prints a line of JSON for each kernel of each case, and exits with
status 3 if a kernel does not compile or exceeds a limit; ``--markdown`` also writes docs/kernels.md. Triton 3.5.0
compiles without a GPU. The numbers come from its ptxas and nvdisasm.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from volta import parallel, pretended_gpu
from volta.triton_kernels import tables, verified_cases
from volta.triton_kernels.attention import Attention
from volta.triton_kernels.case import Case, Tensors

import triton  # isort: skip - after pretended_gpu, which sets the environment

REGISTERS = 255
"""The registers of a thread of 7.0 (CUDA C++ Programming Guide, table of compute capabilities)."""
SHARED = 96 << 10
"""The largest shared memory of a block of 7.0, in bytes (same table)."""
SPILL = 64
"""Bytes that a thread may spill: ptxas accepts a few so that one more block fits on an SM."""
SPILLS = {
    "fused_moe_kernel": 768,  # 64 rows, for more tokens than experts
    "fused_moe_kernel_gptq_awq": 5120,  # 64 rows, for more than 40 tokens
    "sample_recovered_tokens_kernel": 1536,  # a whole vocabulary in one block
    "_lora_shrink_kernel": 9216,  # 32 rows and 256 columns, for less than 128 tokens
    "_lora_expand_kernel": 12288,  # 64 rows and 128 columns
}
"""Larger limits, by kernel, where upstream's own tiles spill more."""
BROKEN = 3
"""The exit status if a kernel does not compile or exceeds a limit. Python itself exits with 1."""
COUNTED = ("FFMA", "HMMA", "LDG", "STG", "LDS", "STS", "LDL", "STL")
"""Instructions that are also counted separately; LDL and STL are spills."""


@dataclass(frozen=True)
class KernelResources:
    """The resources of one kernel of one case."""

    case: str
    kernel: str = ""
    tile: int | None = None
    warps: int = 0
    registers: int = 0
    spill: int = 0
    """Bytes of spill stores per thread."""
    shared: int = 0
    """Bytes of shared memory per block."""
    instructions: dict[str, int] = field(default_factory=dict)
    key: str = ""
    """The key of Triton's cache."""
    seconds: float = 0.0
    """The time to compile it; 0 if an earlier case compiled the same kernel."""
    problem: str = ""

    def over(self) -> Iterator[str]:
        """Yield each limit that the kernel exceeds."""
        bound = SPILLS.get(self.kernel, SPILL)
        for resource, value, limit in (
            ("registers", self.registers, REGISTERS),
            ("bytes of shared memory", self.shared, SHARED),
            ("bytes spilled", self.spill, bound),
        ):
            if value > limit:
                yield f"{value} {resource}, and the limit is {limit}"


class Compiler:
    """Compiles cases, each kernel once."""

    def __init__(self) -> None:
        self.known: dict[str, KernelResources] = {}
        """The kernels that are already compiled, by Triton's key."""

    def rows(self, case: Case) -> Iterator[KernelResources]:
        """Yield a row for each kernel of a case, or one row with the problem."""
        began = time.perf_counter()
        failure, errors = None, []
        with _captured_stderr() as lines:
            try:
                with pretended_gpu.launches() as seen:
                    case.call(**case.tensors(Tensors()))
            except pretended_gpu.KernelCompileError as error:
                failure, errors = error, [line for line in lines() if "error:" in line]
        if failure:
            why = errors[0] if errors and "error" not in failure.why else failure.why
            problem = f"{case.name}: {failure.function} does not compile for 7.0: {why}"
            yield KernelResources(case.name, failure.function, problem=problem)
            return
        if not seen or not {launch.function for launch in seen} <= set(case.kernels):
            names = ", ".join(sorted({launch.function for launch in seen})) or "nothing"
            problem = f"{case.name}: vLLM launches {names}, where {' or '.join(case.kernels)} was expected"
            yield KernelResources(case.name, problem=problem)
            return
        took = time.perf_counter() - began
        fresh = [launch for launch in _once(seen) if launch.kernel.hash not in self.known]
        self.known |= {launch.kernel.hash: _measured(launch) for launch in fresh}
        for launch in _once(seen):
            known = self.known[launch.kernel.hash]
            seconds = round(took / len(fresh), 2) if launch in fresh else 0.0
            row = replace(known, case=case.name, seconds=seconds)
            problem = "; ".join(f"{case.name}: {row.kernel} takes {excess}" for excess in row.over())
            yield replace(row, problem=problem)


@contextlib.contextmanager
def compiler() -> Iterator[Compiler]:
    """Yield the compiler of this process, with an empty Triton cache, so that ptxas runs and its output is captured.

    There is one for each process, because Triton compiles a kernel once in a process.
    """
    with tempfile.TemporaryDirectory(prefix="volta-") as folder:
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield _COMPILER


_COMPILER = Compiler()


def _rows(case: Case) -> list[KernelResources]:
    """Return the rows of a case, in a worker process with its own compiler."""
    return list(_COMPILER.rows(case))


TILES = tuple(
    Attention(dtype="fp16", head_size=size, heads=heads, kv_heads=kv_heads, query=query)
    for size, heads, kv_heads in (
        (64, 32, 8), (80, 32, 32), (96, 32, 32), (128, 32, 8), (256, 16, 8),
        (64, 32, 1), (128, 32, 1), (256, 32, 1), (64, 48, 1), (128, 48, 1), (64, 71, 1),
    )
    for query in (16, 1)
)  # fmt: skip
"""The cases of the table of tiles: all head sizes, and kv heads that many query heads share."""


def tiles(
    by: Compiler, wanted: Sequence[Attention] = TILES
) -> Iterator[tuple[Attention, KernelResources, KernelResources]]:
    """Yield each case with its row for tensor core tiles and its row for Volta's tiles, both compiled for 7.0."""
    for case in wanted:
        pretended_gpu.capability((8, 0), target=pretended_gpu.VOLTA)
        before = next(by.rows(case))
        pretended_gpu.capability()
        yield case, before, next(by.rows(case))


def _measured(launch: pretended_gpu.Launch) -> KernelResources:
    kernel, log = launch.kernel, launch.log
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    code = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True)
    names = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code.stdout))
    constants = {kernel.src.fn.arg_names[place[0]]: value for place, value in kernel.src.constants.items()}
    return KernelResources(
        "", launch.function, constants.get("TILE_SIZE"), kernel.metadata.num_warps,
        int(_found(r"Used (\d+) registers", log)), int(_found(r"(\d+) bytes spill stores", log)),
        kernel.metadata.shared, {"all": names.total(), **{name: names[name] for name in COUNTED}},
        kernel.hash,
    )  # fmt: skip


def _found(pattern: str, log: str) -> str:
    found = re.search(pattern, log)
    if not found:
        raise ValueError(f"the output of ptxas does not match {pattern!r}: {log[:300]}")
    return found[1]


def _once(seen: Iterable[pretended_gpu.Launch]) -> list[pretended_gpu.Launch]:
    launches: dict[str, pretended_gpu.Launch] = {}
    for launch in seen:
        launches.setdefault(launch.kernel.hash, launch)
    return list(launches.values())


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Capture what the compiler writes to file descriptor 2; yields a function that returns the lines."""
    with tempfile.TemporaryFile("w+") as sink:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(sink.fileno(), 2)

        def lines() -> list[str]:
            sink.seek(0)
            return sink.read().splitlines()

        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m volta.triton_kernels.measure", description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--whole", action="store_true", help="compile every combination for attention")
    parser.add_argument("--list", action="store_true", help="list the cases and compile nothing")
    parser.add_argument("--jobs", type=int, help="number of processes (default: one for each core)")
    parser.add_argument("--tiles", action="store_true", help="compare tensor core tiles with Volta's")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args(words)
    wanted = [
        case
        for case in (verified_cases.all_attention_cases() if options.whole else verified_cases.all_cases())
        if options.only in case.name
    ]
    if options.list:
        print("\n".join(case.name for case in wanted))
        return 0
    pretended_gpu.capability()
    rows: list[KernelResources] = []
    with compiler() as by:
        if options.tiles:
            for case, before, after in tiles(by):
                row = {"case": case.name, "attention": asdict(case)}
                print(json.dumps({**row, "before": asdict(before), "after": asdict(after)}), flush=True)
            return 0
        for row in itertools.chain.from_iterable(parallel.run_in_processes(_rows, wanted, options.jobs)):
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
        if options.markdown:
            compared = [(asdict(case), asdict(before), asdict(after)) for case, before, after in tiles(by)]
            text = tables.document([asdict(row) for row in rows], compared, verified_cases.NOT_COVERED)
            options.markdown.write_text(text, encoding="utf-8")
    return BROKEN if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
