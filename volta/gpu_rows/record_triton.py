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

os.environ["TRITON_INTERPRET"] = "0"  # compile mode: volta.numerics reads the variable

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
"""Cases that would take too long with the interpreter."""
SCALARS = {"i1": "bool", "fp16": "f16", "fp32": "f32", "fp64": "f64"}
"""Triton's names of types that differ from those in :data:`volta.gpu.rows.KINDS`."""
TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.uint8: "|u1", torch.float8_e5m2: "e5m2"}


@dataclass
class Recorder:
    """The launches of one case and the memory that they use."""

    storages: dict[int, int] = field(default_factory=dict)
    """Buffer numbers, by the address of the storage."""
    held: list[torch.UntypedStorage] = field(default_factory=list)
    """The storages, kept so that their addresses are not reused."""
    buffers: list[rows.Array] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def take(self, launch: pretended_gpu.Launch) -> None:
        """Store a launch and the content of the memory that it uses."""
        kernel, values = launch.kernel, launch.arguments
        kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        arguments = [self.argument(values[name], kind) for name, kind in kinds.items()]
        scratch = kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size
        if any(scratch):
            raise ValueError(f"{launch.function} requires {scratch} bytes of scratch memory, which rows do not support")
        grid = launch.grid(values) if callable(launch.grid) else launch.grid
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
        """Return a value as the kernel's argument."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            return Pointer(self.buffer(storage), value.data_ptr() - storage.data_ptr())
        if kind.startswith("*"):
            raise ValueError(f"a pointer argument is {value!r} and not a tensor")
        return Number(SCALARS.get(kind, kind), float(value) if kind.startswith("fp") else int(value))

    def buffer(self, storage: torch.UntypedStorage) -> int:
        """Return the buffer number of a storage; the first call stores its content."""
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = len(self.buffers)
            self.held.append(storage)
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self.buffers.append(flat.numpy().copy())
        return self.storages[storage.data_ptr()]

    def result(self, expected: Expected) -> Result:
        """Return an expected result in the form of a row."""
        output, storage = expected.output, expected.output.untyped_storage()
        if storage.data_ptr() not in self.storages:
            raise ValueError("no kernel has the memory of the result as an argument")
        size = output.element_size()
        return Result(
            self.storages[storage.data_ptr()], expected.exact.float().numpy(), TYPES[output.dtype],
            output.data_ptr() - storage.data_ptr(), tuple(size * step for step in output.stride()),
            len(output) if expected.summed else 0, expected.measure,
        )  # fmt: skip


def recorded(case: Case) -> Row:
    """Return the row of a case."""
    recorder = Recorder()
    EXPECTED.clear()
    with pretended_gpu.launches(recorder.take), np.errstate(all="ignore"):
        case.error()
    results = [recorder.result(expected) for expected in EXPECTED]
    names = " + ".join(dict.fromkeys(recorder.names))
    return Row(worded(case), names, recorder.buffers, recorder.launches, results, case.bound)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m volta.gpu_rows.record_triton", description=__doc__)
    parser.add_argument("file", type=Path, help="the archive to write")
    parser.add_argument("--jobs", type=int, help="number of processes (default: one for each core)")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options = parser.parse_args(words)
    cases = [case for case in (*CASES, *LARGER) if options.only in worded(case)]
    recorded_rows = []
    for row in parallel.run_in_processes(recorded, cases, options.jobs):
        recorded_rows.append(row)
        print(f"[{len(recorded_rows)}/{len(cases)}] {row.name}", flush=True)
    with zipfile.ZipFile(options.file, "w") as archive:
        rows.write(recorded_rows, archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
