"""Record the Triton kernels that vLLM launches for capability 7.0, so that a GPU can repeat the launches.

Usage: ``python -m volta.gpu_rows.record_triton FILE.zip``.

The cases are those of ``volta.numerics`` and a few larger ones. A case calls vLLM's own Python function. Each kernel is
compiled for sm_70 and not launched; its grid, its arguments and the content of memory are stored.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # volta.numerics asks

import numpy as np
import torch

from volta import parallel, pretended_gpu
from volta.gpu import rows
from volta.gpu.rows import Image, Launch, Number, Pointer, Result, Row
from volta.numerics.attention import Attention, Store
from volta.numerics.cases import CASES, Case, worded
from volta.numerics.expected import EXPECTED, Expected
from volta.numerics.quantized import Dequantize, Experts, Multiply

LARGER: tuple[Case, ...] = (
    Attention(new=(256,), old=(256,), head_size=128, kv_heads=2, group=4),
    Attention(new=(1,) * 4, old=(500,) * 4, head_size=128, kv_heads=2, group=4),
    Attention(new=(1,) * 4, old=(500,) * 4, head_size=128, kv_heads=2, group=4, cache="fp8_e5m2"),
    Attention(new=(1,), old=(1000,), head_size=256, kv_heads=1, group=8),
    Store(tokens=128, heads=8, head_size=128),
    Store(tokens=128, heads=8, head_size=128, cache="fp8_e5m2"),
    Multiply(rows=1, inputs=2048, outputs=1024, group=128),
    Dequantize(inputs=512, outputs=1024, group=128),
    Experts(rows=64, experts=8, inputs=512, outputs=512, bits=4, group=128),
)
"""What the interpreter would take too long for."""
SCALARS = {"i1": "bool", "fp16": "f16", "fp32": "f32", "fp64": "f64"}
"""Triton's names of types that are others in :data:`volta.gpu.rows.KINDS`."""
TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.uint8: "|u1", torch.float8_e5m2: "e5m2"}


@dataclass
class Recorder:
    """The launches of one case, and the memory that they work on."""

    storages: dict[int, int] = field(default_factory=dict)
    """The number of a buffer, by the address of its storage."""
    held: list[torch.UntypedStorage] = field(default_factory=list)
    """So that no other gets their addresses."""
    buffers: list[rows.Array] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def take(self, launch: pretended_gpu.Launch) -> None:
        """Keep a launch with all that it would have found in memory."""
        kernel, given = launch.kernel, launch.arguments
        kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        arguments = [self.argument(given[name], kind) for name, kind in kinds.items()]
        scratch = kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size
        if any(scratch):
            raise ValueError(f"{launch.function} wants {scratch} bytes of scratch memory")
        grid = launch.grid(given) if callable(launch.grid) else launch.grid
        x, y, z = (*grid, 1, 1)[:3]
        image = Image(kernel.asm["ptx"], kernel.asm["cubin"])
        threads = 32 * kernel.metadata.num_warps
        self.names.append(launch.function)
        self.launches.append(
            Launch(
                image, kernel.metadata.name, (int(x), int(y), int(z)), (threads, 1, 1),
                [*arguments, rows.NULL, rows.NULL], kernel.metadata.shared,
            )
        )  # fmt: skip

    def argument(self, value: Any, kind: str) -> Pointer | Number:
        """A value as the kernel takes it."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            return Pointer(self.buffer(storage), value.data_ptr() - storage.data_ptr())
        if kind.startswith("*"):
            raise ValueError(f"a pointer is no tensor but {value!r}")
        return Number(SCALARS.get(kind, kind), float(value) if kind.startswith("fp") else int(value))

    def buffer(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; its content is kept as it is now, the first time."""
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = len(self.buffers)
            self.held.append(storage)
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self.buffers.append(flat.numpy().copy())
        return self.storages[storage.data_ptr()]

    def result(self, expected: Expected) -> Result:
        """What must be in memory, as a row has it."""
        made, storage = expected.made, expected.made.untyped_storage()
        if storage.data_ptr() not in self.storages:
            raise ValueError("the result is in memory that no kernel was given")
        size = made.element_size()
        return Result(
            self.storages[storage.data_ptr()], expected.right.float().numpy(), TYPES[made.dtype],
            made.data_ptr() - storage.data_ptr(), tuple(size * step for step in made.stride()),
            len(made) if expected.summed else 0, expected.measure,
        )  # fmt: skip


def recorded(case: Case) -> Row:
    """A case as launches that a GPU can repeat."""
    recorder = Recorder()
    EXPECTED.clear()
    with pretended_gpu.launches(recorder.take), np.errstate(all="ignore"):
        case.error()
    results = [recorder.result(one) for one in EXPECTED]
    names = " + ".join(dict.fromkeys(recorder.names))
    return Row(worded(case), names, recorder.buffers, recorder.launches, results, case.bound)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m volta.gpu_rows.record_triton", description=__doc__)
    parser.add_argument("file", type=Path, help="the archive to write")
    parser.add_argument("--jobs", type=int, help="processes at once; otherwise one for each core")
    parser.add_argument("--only", default="", help="cases that have this word in them")
    asked = parser.parse_args(words)
    cases = [case for case in (*CASES, *LARGER) if asked.only in worded(case)]
    made = []
    for row in parallel.each(recorded, cases, asked.jobs):
        made.append(row)
        print(f"[{len(made)}/{len(cases)}] {row.name}", flush=True)
    with zipfile.ZipFile(asked.file, "w") as archive:
        rows.write(made, archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
