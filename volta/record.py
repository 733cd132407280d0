"""Records what vLLM launches of Triton on a Volta, for a GPU to repeat: ``python -m volta.record FILE.zip``.

The cases are those of ``volta.numbers`` and a few larger ones. vLLM's own Python functions are called, each kernel is
compiled for sm_70, and what it would have been launched with is kept: grid, arguments, and the content of memory.
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

os.environ["TRITON_INTERPRET"] = "0"  # volta.numbers asks

import numpy as np
import torch

from volta import numbers, pretend, workers
from volta.gpu import rows
from volta.gpu.rows import Image, Launch, Number, Pointer, Result, Row

LARGER: tuple[numbers.Case, ...] = (
    numbers.Attention(new=(256,), old=(256,), head_size=128, kv_heads=2, group=4),
    numbers.Attention(new=(1,) * 4, old=(500,) * 4, head_size=128, kv_heads=2, group=4),
    numbers.Attention(new=(1,) * 4, old=(500,) * 4, head_size=128, kv_heads=2, group=4, cache="fp8_e5m2"),
    numbers.Attention(new=(1,), old=(1000,), head_size=256, kv_heads=1, group=8),
    numbers.Store(tokens=128, heads=8, head_size=128),
    numbers.Store(tokens=128, heads=8, head_size=128, cache="fp8_e5m2"),
    numbers.Multiply(rows=1, inputs=2048, outputs=1024, group=128),
    numbers.Dequantize(inputs=512, outputs=1024, group=128),
    numbers.Experts(rows=64, experts=8, inputs=512, outputs=512, bits=4, group=128),
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

    def take(self, launch: pretend.Launch) -> None:
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

    def result(self, expected: numbers.Expected) -> Result:
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


def recorded(case: numbers.Case) -> Row:
    """A case as launches that a GPU can repeat."""
    recorder = Recorder()
    numbers.EXPECTED.clear()
    with pretend.launches(recorder.take), np.errstate(all="ignore"):
        case.error()
    results = [recorder.result(one) for one in numbers.EXPECTED]
    names = " + ".join(dict.fromkeys(recorder.names))
    return Row(numbers.worded(case), names, recorder.buffers, recorder.launches, results, case.bound)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m volta.record", description=__doc__)
    parser.add_argument("file", type=Path, help="the archive to write")
    parser.add_argument("--jobs", type=int, help="processes at once; otherwise one for each core")
    parser.add_argument("--only", default="", help="cases that have this word in them")
    asked = parser.parse_args(words)
    cases = [case for case in (*numbers.CASES, *LARGER) if asked.only in numbers.worded(case)]
    made = []
    for row in workers.each(recorded, cases, asked.jobs):
        made.append(row)
        print(f"[{len(made)}/{len(cases)}] {row.name}", flush=True)
    with zipfile.ZipFile(asked.file, "w") as archive:
        rows.write(made, archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
