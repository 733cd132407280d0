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

This page lists the registers, shared memory and spills of vLLM's Triton kernels. Triton 3.5.0 compiled them for sm_70
on a machine without a GPU. Nothing here was run on a Volta card. The first command writes this page; it needs an
environment with the vLLM wheel. The second makes the same checks with the wheel in `wheelhouse/`:

```console
$ python -m volta.triton_kernels.measure --markdown docs/kernels.md
$ ./doit verify:triton    # in a temporary environment
```

Each case calls vLLM's own Python function with a simulated driver, so the compiled kernels are those that a server
launches. On 7.0 a block can use 96 KiB of shared memory and a thread 255 registers. A kernel that spills more than 64
bytes fails the check; `volta/triton_kernels/measure.py` has larger limits for five kernels with upstream's tiles. No
kernel contains a tensor core instruction (HMMA): for 7.0, Triton 3.5.0 compiles every `tl.dot` to FMAs.
"""


def summary(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each kernel and group of cases, with the smallest and largest of each resource."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["instructions"]:
            groups.setdefault((row["kernel"], _kind(row)), {})[_identity(row)] = row
    return [
        (kernel, kind, str(len(members)), *_ranges(list(members.values())))
        for (kernel, kind), members in groups.items()
    ]


def counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of cases and kernels, as a sentence."""
    kernels = {_identity(row) for row in rows if row["instructions"]}
    return f"{len({row['case'] for row in rows})} cases, {len(kernels)} different kernels."


def tiles(compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Return two rows for each case: with the tiles before patch 0015, and after."""
    lines: list[tuple[str, ...]] = []
    for case, *both in compared:
        for when, row in zip(("before", "after"), both, strict=True):
            code = row["instructions"]
            lines.append(
                (
                    str(case["head_size"]), str(case["heads"] // case["kv_heads"]), row["kernel"].rpartition("_")[2],
                    when, str(row["tile"]), str(row["warps"]), str(row["registers"]), f"{row['spill']:,}",
                    f"{row['shared'] / 1024:g}", str(code["all"]), str(code["FFMA"]), str(code["LDL"] + code["STL"]),
                )
            )  # fmt: skip
    return lines


def document(
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]],
    not_covered: Mapping[str, str],
) -> str:
    """Return the text of docs/kernels.md."""
    parts = [
        INTRODUCTION,
        "## Attention tiles, before and after patch 0015\n\n" + TILES_TEXT,
        markdown(TILES, tiles(compared)),
        f"## All kernels\n\n{counted(rows)} The table gives the smallest and largest value of each group.\n",
        markdown(HEADINGS, summary(rows)),
        "## What is not covered\n",
        markdown(("Triton kernels of", "reason"), list(not_covered.items())),
    ]
    return "\n".join(parts)


TILES_TEXT = """\
"Before" means the tiles for tensor cores. With them, attention with head size 256 spills, and head sizes 128 and 64
spill if 32 or 48 query heads share one kv head. "After" means the tiles of the patch: below 7.5, the tile and the
number of warps depend on BLOCK_M times the padded head size. In fp16 all these tiles use 48 KiB or less.

Larger tiles fit into 96 KiB of shared memory but spill. At head size 256, tiles of 64 (80 KiB) spill 628 bytes with 8
warps and 19.8 kB with 4. 64 rows of 256 (80 KiB) spill at least 412 bytes, and 128 rows of 128 (72 KiB) at least 420.
Registers are the limit, not shared memory. In fp32, 32 rows of 256 use 64 KiB.
"""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _kind(row: Mapping[str, Any]) -> str:
    fields = dict(re.findall(r"(\w+)=(\S+)", row["case"]))
    if size := fields.get("head_size"):
        return f"head size {size}"
    if "moe" in row["kernel"]:
        return f"{fields.get('bits', '16')} bits"
    return ""


def _identity(row: Mapping[str, Any]) -> str:
    return str(row.get("key") or row["case"] + row["kernel"])


def _ranges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def extent(values: list[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    return [
        extent([row["registers"] for row in rows]), extent([row["spill"] for row in rows]),
        extent([row["shared"] / 1024 for row in rows]), extent([row["instructions"]["all"] for row in rows]),
        extent([row["instructions"]["FFMA"] for row in rows]),
    ]  # fmt: skip
