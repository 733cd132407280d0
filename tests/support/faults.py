"""Make rows with faults, with kernels written by hand, to test the messages of a bundle's runner on a real card.

``python -m tests.support.faults FILE.zip`` writes them;
``python -m volta.gpu.run --bundle FILE.zip --patience 10`` runs them.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np

from volta.gpu import rows
from volta.gpu.rows import Image, Launch, Number, Pointer, Result, Row

HEAD = (
    ".version {version}\n.target sm_70\n.address_size 64\n.visible .entry {name}(.param .u64 out, .param .u32 count)\n"
)
BODIES = {
    "fill": """{ .reg .u64 %p, %o; .reg .u32 %i, %n; .reg .pred %q; ld.param.u64 %p, [out]; ld.param.u32 %n, [count];
        mov.u32 %i, %tid.x; setp.ge.u32 %q, %i, %n; @%q bra end; mul.wide.u32 %o, %i, 4; add.u64 %p, %p, %o;
        st.global.u32 [%p], %i; end: ret; }""",
    "spin": """{ .reg .u64 %p; .reg .u32 %v; .reg .pred %q; ld.param.u64 %p, [out];
        again: ld.volatile.global.u32 %v, [%p]; setp.eq.u32 %q, %v, 7; @%q bra again; ret; }""",
    "astray": "{ .reg .u64 %p; .reg .u32 %v; mov.u64 %p, 64; mov.u32 %v, 1; st.global.u32 [%p], %v; ret; }",
    "garbled": "{ no.such.instruction; }",
}
COUNT = 32
RIGHT = np.arange(COUNT, dtype=np.float64)


def image(name: str, version: str = "7.0") -> Image:
    """Return a kernel of this name in PTX of this version, without a cubin."""
    return Image(HEAD.format(version=version, name=name) + BODIES[name])


def row(
    name: str, kernel: str = "fill", *, size: int = 4 * COUNT, right: rows.Array = RIGHT, version: str = "7.0",
    symbol: str = "", before: rows.Array | None = None,
) -> Row:  # fmt: skip
    """Return a row with one launch; the kernel ``fill`` writes 0, 1, 2, … to the buffer."""
    launch = Launch(
        image(kernel, version), symbol or kernel, (1, 1, 1), (COUNT, 1, 1), [Pointer(0), Number("u32", COUNT)]
    )
    buffer = rows.fresh(size) if before is None else before
    return Row(name, kernel, [buffer], [launch], [Result(0, right, "<i4", measure="each")], 0.0)


def every() -> list[Row]:
    """Return the rows with faults, each followed by a good row, which must still run."""
    bad = [
        row("wrong number", right=RIGHT + (RIGHT == 5)),
        row("hangs", "spin", before=np.full(COUNT, 7, np.int32)),
        row("writes to a wrong address", "astray"),
        row("no PTX", "garbled"),
        row("no such kernel", symbol="missing"),
    ]
    good = row("good")
    return [row for pair in zip(bad, [good] * len(bad), strict=True) for row in pair]


if __name__ == "__main__":
    with zipfile.ZipFile(Path(sys.argv[1]), "w") as archive:
        rows.write(every(), archive)
