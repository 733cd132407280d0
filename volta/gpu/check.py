"""Check a bundle without a GPU: the archive is undamaged, and each launch fits the kernel's PTX."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator

import numpy as np

from volta.gpu import rows
from volta.gpu.card import cuda_release_for
from volta.gpu.rows import Bundle, Pointer, Row


def check(bundle: Bundle) -> int:
    """Print the flaws of a bundle; return the exit status."""
    try:
        broken = bundle.archive.testzip()
    except zlib.error as error:
        broken = f"a part of it ({error})"
    if broken:
        print(f"x {broken} is damaged: make or copy the bundle again", file=sys.stderr)
        return 1
    problems, launches = [], 0
    for number in range(len(bundle.listed)):
        row = bundle.row(number)
        launches += len(row.launches)
        problems += [f"{row.kernels}: {row.name}: {flaw}" for flaw in flaws(row)]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    count = len(bundle.listed)
    print(f"{count} rows with {launches} launches; {len(problems)} flaws. No kernel was run, since that needs a GPU.")
    return 1 if problems or not count else 0


def flaws(row: Row) -> Iterator[str]:
    """Yield the flaws of a row that are visible without a GPU."""
    for launch in row.launches:
        sizes = parameters(launch.image.ptx, launch.symbol)
        if sizes is None:
            yield f"{launch.symbol} is not in its PTX"
            continue
        given = [
            8 if isinstance(argument, Pointer) else np.dtype(rows.KINDS[argument.kind]).itemsize
            for argument in launch.arguments
        ]
        if given != sizes:
            yield f"{launch.symbol} has parameters of {sizes} bytes, but the launch has arguments of {given}"
        for argument in launch.arguments:
            if isinstance(argument, Pointer) and not 0 <= argument.offset <= row.buffers[argument.buffer].nbytes:
                yield f"{launch.symbol} has an argument with an address outside its buffer"
        if ".target sm_70" not in launch.image.ptx:
            yield f"the PTX of {launch.symbol} is not for 7.0"
        if not launch.image.cubin.startswith(b"\x7fELF"):
            yield f"{launch.symbol} has no cubin for 7.0"
        cuda_release_for(launch.image.ptx)
    if not row.results:
        yield "no result is compared"
    for result in row.results:
        right = result.right
        if right.dtype.kind == "f" and not np.isfinite(right[~np.isnan(right)]).any():
            yield "its expected result contains only NaN or infinity"
        before = row.buffers[result.buffer].tobytes()
        if rows.error(result, before) <= row.bound:
            yield "it passes before a kernel is launched"


def parameters(ptx: str, symbol: str) -> list[int] | None:
    """Return the sizes of a kernel's parameters in bytes, from its PTX; ``None`` if the kernel is not in the PTX.

    A parameter is ``.param .u64 name``, ``.param .align 4 .b8 name[12]``, ``.param .u64 .ptr .global .align 1 name``
    (PTX ISA, kernel function parameters).
    """
    at = ptx.find(f".entry {symbol}(")
    if at < 0:
        return None
    sizes = []
    for line in ptx[at : ptx.index(")", at)].split(".param")[1:]:
        words = line.replace(",", " ").split()
        kind = next(word for word in words if word[1:2] in "usbf" and word[2:].isdigit())
        size = int(kind[2:]) // 8
        name = words[-1]
        sizes.append(size * int(name[name.index("[") + 1 : -1]) if name.endswith("]") else size)
    return sizes
