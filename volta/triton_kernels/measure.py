"""Compiles every case for 7.0 and says what each kernel takes of a Volta: ``python -m volta.triton_kernels.measure``.

It prints a line of JSON for each kernel of each case, and ends with status 3 if a kernel does not compile or is over
a limit; ``--markdown`` writes docs/kernels.md besides. Triton 3.5.0 compiles without a GPU; what is counted comes from
its ptxas and nvdisasm.
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
from volta.triton_kernels import matrix, tables
from volta.triton_kernels.attention import Attention
from volta.triton_kernels.case import Case, Tensors

import triton  # isort: skip - after pretended_gpu, which settles what imports find

REGISTERS = 255
"""The most that a thread of 7.0 has (CUDA C++ Programming Guide, table of compute capabilities)."""
SHARED = 96 << 10
"""The most bytes of shared memory that a block of 7.0 can ask for (the same)."""
SPILL = 64
"""Bytes of registers that a thread may keep in memory: ptxas itself prefers some to losing a block of an SM."""
SPILLS = {
    "fused_moe_kernel": 768,  # 64 rows, for more tokens than experts
    "fused_moe_kernel_gptq_awq": 5120,  # 64 rows, for more than 40 tokens
    "sample_recovered_tokens_kernel": 1536,  # a whole vocabulary in one block
    "_lora_shrink_kernel": 9216,  # 32 rows and 256 columns, for less than 128 tokens
    "_lora_expand_kernel": 12288,  # 64 rows and 128 columns
}
"""Where upstream's own tiles spill more, by kernel: known, and left as it is."""
BROKEN = 3
"""The status if a kernel does not compile or is over a limit; 1 is what Python ends with by itself."""
COUNTED = ("FFMA", "HMMA", "LDG", "STG", "LDS", "STS", "LDL", "STL")
"""Instructions that are counted besides all of them; LDL and STL are the spilled."""


@dataclass(frozen=True)
class Row:
    """What one kernel of one case takes."""

    case: str
    kernel: str = ""
    tile: int | None = None
    warps: int = 0
    registers: int = 0
    spill: int = 0
    """Bytes per thread that are stored."""
    shared: int = 0
    """Bytes per block."""
    instructions: dict[str, int] = field(default_factory=dict)
    key: str = ""
    """Triton's, of its cache."""
    seconds: float = 0.0
    """To compile it; 0 if another case had the very same."""
    problem: str = ""

    def over(self) -> Iterator[str]:
        """Each limit that it breaks."""
        bound = SPILLS.get(self.kernel, SPILL)
        for what, has, most in (
            ("registers", self.registers, REGISTERS),
            ("bytes of shared memory", self.shared, SHARED),
            ("bytes spilled", self.spill, bound),
        ):
            if has > most:
                yield f"{has} {what}, and the limit is {most}"


class Compiler:
    """Compiles cases in a cache folder of its own, so that ptxas is heard each time."""

    def __init__(self) -> None:
        self.known: dict[str, Row] = {}
        """By Triton's key."""

    def rows(self, case: Case) -> Iterator[Row]:
        """What each kernel of a case takes, or one row that says why it cannot be said."""
        began = time.perf_counter()
        refused, errors = None, []
        with _errors() as lines:
            try:
                with pretended_gpu.launches() as seen:
                    case.call(**case.tensors(Tensors()))
            except pretended_gpu.DoesNotCompile as error:
                refused, errors = error, [line for line in lines() if "error:" in line]
        if refused:
            why = errors[0] if errors and "error" not in refused.why else refused.why
            problem = f"{case.name}: {refused.function} does not compile for 7.0: {why}"
            yield Row(case.name, refused.function, problem=problem)
            return
        if not seen or not {launch.function for launch in seen} <= set(case.kernels):
            names = ", ".join(sorted({launch.function for launch in seen})) or "nothing"
            problem = f"{case.name}: vLLM launches {names}, where {' or '.join(case.kernels)} was expected"
            yield Row(case.name, problem=problem)
            return
        took = time.perf_counter() - began
        fresh = [launch for launch in _once(seen) if launch.kernel.hash not in self.known]
        self.known |= {launch.kernel.hash: _measured(launch) for launch in fresh}
        for launch in _once(seen):
            known = self.known[launch.kernel.hash]
            seconds = round(took / len(fresh), 2) if launch in fresh else 0.0
            made = replace(known, case=case.name, seconds=seconds)
            over = "; ".join(f"{case.name}: {made.kernel} takes {one}" for one in made.over())
            yield replace(made, problem=over)


@contextlib.contextmanager
def compiler() -> Iterator[Compiler]:
    """A compiler; Triton compiles a kernel once in a process, so that there can be one of these in each."""
    with tempfile.TemporaryDirectory(prefix="volta-") as folder:
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield _COMPILER


_COMPILER = Compiler()


def _rows(case: Case) -> list[Row]:
    """What a worker says of a case: each has a compiler of its own, which knows what its process has compiled."""
    return list(_COMPILER.rows(case))


TILES = tuple(
    Attention(dtype="fp16", head_size=size, heads=heads, kv_heads=kv_heads, query=query)
    for size, heads, kv_heads in (
        (64, 32, 8), (80, 32, 32), (96, 32, 32), (128, 32, 8), (256, 16, 8),
        (64, 32, 1), (128, 32, 1), (256, 32, 1), (64, 48, 1), (128, 48, 1), (64, 71, 1),
    )
    for query in (16, 1)
)  # fmt: skip
"""What the table of tiles shows: all head sizes, and the kv heads that many query heads share."""


def tiles(by: Compiler, wanted: Sequence[Attention] = TILES) -> Iterator[tuple[Attention, Row, Row]]:
    """Each case with the tiles that tensor cores get, and with Volta's; both compiled for 7.0."""
    for case in wanted:
        pretended_gpu.capability((8, 0), target=pretended_gpu.VOLTA)
        before = next(by.rows(case))
        pretended_gpu.capability()
        yield case, before, next(by.rows(case))


def _measured(launch: pretended_gpu.Launch) -> Row:
    kernel, log = launch.kernel, launch.said
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    code = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True)
    names = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code.stdout))
    constants = {kernel.src.fn.arg_names[place[0]]: value for place, value in kernel.src.constants.items()}
    return Row(
        "", launch.function, constants.get("TILE_SIZE"), kernel.metadata.num_warps,
        int(_found(r"Used (\d+) registers", log)), int(_found(r"(\d+) bytes spill stores", log)),
        kernel.metadata.shared, {"all": names.total(), **{name: names[name] for name in COUNTED}},
        kernel.hash,
    )  # fmt: skip


def _found(pattern: str, log: str) -> str:
    found = re.search(pattern, log)
    if not found:
        raise ValueError(f"ptxas says nothing like {pattern!r}: {log[:300]}")
    return found[1]


def _once(seen: Iterable[pretended_gpu.Launch]) -> list[pretended_gpu.Launch]:
    found: dict[str, pretended_gpu.Launch] = {}
    for launch in seen:
        found.setdefault(launch.kernel.hash, launch)
    return list(found.values())


@contextlib.contextmanager
def _errors() -> Iterator[Any]:
    """What the compiler, which is not Python, says on standard error; yields a function that gives the lines."""
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
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m volta.triton_kernels.measure", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--whole", action="store_true", help="every combination of attention's matrix, instead")
    parser.add_argument("--list", action="store_true", help="name the cases and compile nothing")
    parser.add_argument("--jobs", type=int, help="processes at once; otherwise one for each core")
    parser.add_argument("--tiles", action="store_true", help="attention with the tiles before and after")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    asked = parser.parse_args(words)
    wanted = [case for case in (matrix.whole() if asked.whole else matrix.every()) if asked.only in case.name]
    if asked.list:
        print("\n".join(case.name for case in wanted))
        return 0
    pretended_gpu.capability()
    rows: list[Row] = []
    with compiler() as by:
        if asked.tiles:
            for case, before, after in tiles(by):
                told = {"case": case.name, "attention": asdict(case)}
                print(json.dumps({**told, "before": asdict(before), "after": asdict(after)}), flush=True)
            return 0
        for row in itertools.chain.from_iterable(parallel.each(_rows, wanted, asked.jobs)):
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
        if asked.markdown:
            compared = [(asdict(case), asdict(before), asdict(after)) for case, before, after in tiles(by)]
            text = tables.document([asdict(row) for row in rows], compared, matrix.NOT_COVERED)
            asked.markdown.write_text(text, encoding="utf-8")
    return BROKEN if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
