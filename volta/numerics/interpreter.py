"""Make Triton's interpreter convert e5m2 as code for sm_70 does, and list the kernels that it runs."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np

from volta import pretended_gpu
from volta.numerics.mode import COMPILE

from triton.runtime import interpreter  # isort: skip - after the mode, which Triton reads when it is imported

PTX_OF_E5M2 = ("cvt.rz.f16.f32", "0xfffefffe;", "0x00800080;", "prmt.b32")
"""PTX instructions by which Triton converts float32 to e5m2 for sm_70; see ``e5m2_of_volta``."""


def e5m2_of_volta(values: np.ndarray) -> np.ndarray:
    """Convert float32 to e5m2 as Triton does for sm_70, which has no instruction for it.

    Triton's interpreter rounds differently: it loses a carry. The PTX has ``cvt.rz.f16.f32``,
    ``and.b32 0xfffefffe``, ``add.u32 0x00800080``, and a ``prmt.b32`` that takes the upper byte. So ties round away
    from zero, numbers that round beyond 57344 become infinite, and NaN, whose bits are 7fff after the first step,
    becomes -0.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    too_far = np.abs(half.astype(np.float32)) > np.abs(values)
    code = half.view(np.uint16) - too_far.astype(np.uint16)
    code[np.isnan(values)] = 0x7FFF
    return (((code & 0xFFFE).astype(np.uint32) + 0x80) >> 8).astype(np.uint8)


def read_by_volta(codes: np.ndarray) -> np.ndarray:
    """Convert e5m2 to float32 as Triton does for sm_70: e5m2 is the upper byte of a float16."""
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


@contextlib.contextmanager
def conversions_of_volta() -> Iterator[None]:
    """Inside the block, the interpreter converts from and to e5m2 as compiled code does.

    Its own conversion reads infinity and NaN as numbers, so that NaN in unused memory would not be noticed.
    """
    builder = interpreter.InterpreterBuilder
    original = builder.create_fp_to_fp

    def convert(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        match str(source.dtype.scalar), str(kind.scalar):
            case "fp32", "fp8e5":
                return interpreter.TensorHandle(e5m2_of_volta(source.data), kind.scalar)
            case "fp8e5", "fp32":
                return interpreter.TensorHandle(read_by_volta(source.data), kind.scalar)
        return original(self, source, kind, rounding)

    with unittest.mock.patch.object(builder, "create_fp_to_fp", convert):
        yield


@contextlib.contextmanager
def kernels() -> Iterator[dict[str, str]]:
    """Inside the block, add each kernel that starts: its name, with its PTX for sm_70 if it is compiled."""
    seen: dict[str, str] = {}
    if COMPILE:
        with pretended_gpu.launches() as launched:
            yield seen
        seen.update({launch.function: launch.kernel.asm["ptx"] for launch in launched})
        return
    original = interpreter.GridExecutor.__call__

    def recording(self: Any, *args: Any, **options: Any) -> None:
        seen[self.fn.__name__] = ""
        original(self, *args, **options)

    with unittest.mock.patch.object(interpreter.GridExecutor, "__call__", recording):
        yield seen
