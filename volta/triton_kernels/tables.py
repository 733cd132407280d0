"""Write the tables of docs/kernels.md from the rows that ``volta.triton_kernels.measure`` prints.

This module needs the standard library only, so that it can be imported where torch is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("kernel", "of", "kernels", "registers", "spilled, bytes", "shared, KiB", "instructions", "of them FFMA")
TILES = ("head size", "queries per kv head", "kernel", "", "tile", "warps", "registers", "spilled, bytes",
         "shared, KiB", "instructions", "of them FFMA", "of them spills")  # fmt: skip
INTRODUCTION = """\
# Triton kernels on 7.0

What vLLM's Triton kernels take of a Volta, as Triton 3.5.0 compiles them for sm_70 on a machine without a GPU: nothing
here was run on a Volta card. This file is written by the command that it speaks of, in an environment with the wheel:

```console
$ python -m volta.triton_kernels.measure --markdown docs/kernels.md
$ ./doit verify:triton    # the same checks of the kept wheel, in an environment made for it
```

Each case calls vLLM's own Python function with a pretended driver, so what is compiled is what the server would launch.
A block of 7.0 can have 96 KiB of shared memory, a thread 255 registers; more than 64 bytes spilled is a failure, or
more than the bound in volta/triton_kernels/measure.py for five kernels whose tiles are upstream's. No kernel has a
tensor core instruction (HMMA): for 7.0, Triton 3.5.0 compiles every dot to FMAs.
"""


def summary(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each kernel and what distinguishes its cases most; smallest and largest of what they take."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["instructions"]:
            groups.setdefault((row["kernel"], _kind(row)), {})[_identity(row)] = row
    return [(kernel, kind, str(len(found)), *_ranges(list(found.values()))) for (kernel, kind), found in groups.items()]


def counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much there is."""
    kernels = {_identity(row) for row in rows if row["instructions"]}
    return f"{len({row['case'] for row in rows})} cases, {len(kernels)} different kernels."


def tiles(compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Two rows for each case: the tiles before, and after."""
    found: list[tuple[str, ...]] = []
    for case, *both in compared:
        for when, row in zip(("before", "after"), both, strict=True):
            code = row["instructions"]
            found.append(
                (
                    str(case["head_size"]), str(case["heads"] // case["kv_heads"]), row["kernel"].rpartition("_")[2],
                    when, str(row["tile"]), str(row["warps"]), str(row["registers"]), f"{row['spill']:,}",
                    f"{row['shared'] / 1024:g}", str(code["all"]), str(code["FFMA"]), str(code["LDL"] + code["STL"]),
                )
            )  # fmt: skip
    return found


def document(
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]],
    left: Mapping[str, str],
) -> str:
    """docs/kernels.md."""
    parts = [
        INTRODUCTION,
        "## Attention tiles, before and after patch 0015\n\n" + TILES_SAY,
        markdown(TILES, tiles(compared)),
        f"## All kernels\n\n{counted(rows)} Smallest and largest of each group:\n",
        markdown(HEADINGS, summary(rows)),
        "## What is not covered\n",
        markdown(("Triton kernels of", "why they have no case"), list(left.items())),
    ]
    return "\n".join(parts)


TILES_SAY = """\
With the tiles that suit tensor cores, attention of head size 256 spills, and so do 128 and 64 where 32 or 48 query
heads share one kv head. Below 7.5 the tile and the number of warps follow BLOCK_M times the padded head size. In fp16
all stay within 48 KiB. What 96 KiB would allow besides: tiles of 64 at head size 256 (80 KiB), which spill 628 bytes
with 8 warps and 19.8 kB with 4; and 64 rows of 256 (80 KiB) or 128 rows of 128 (72 KiB), which spill 412 and 420 bytes
at best. Registers are the limit, not shared memory. In fp32, 32 rows of 256 take 64 KiB.
"""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _kind(row: Mapping[str, Any]) -> str:
    said = dict(re.findall(r"(\w+)=(\S+)", row["case"]))
    if size := said.get("head_size"):
        return f"head size {size}"
    if "moe" in row["kernel"]:
        return f"{said.get('bits', '16')} bits"
    return ""


def _identity(row: Mapping[str, Any]) -> str:
    return str(row.get("key") or row["case"] + row["kernel"])


def _ranges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def told(values: list[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    return [
        told([row["registers"] for row in rows]), told([row["spill"] for row in rows]),
        told([row["shared"] / 1024 for row in rows]), told([row["instructions"]["all"] for row in rows]),
        told([row["instructions"]["FFMA"] for row in rows]),
    ]  # fmt: skip
