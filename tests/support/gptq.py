"""Run vLLM's GPTQ matrix product on the CPU, from the source text that nvcc compiles.

g++ compiles the .cu and .cuh files of a tree against tests/native/cuda_on_cpu.h. Two things in the text are no C++ and
are rewritten: launches, ``kernel<<<grid, block, 0, stream>>>(...)``, and declarations of shared memory.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from volta.gpu_rows.gptq import Layer

NATIVE = Path(__file__).resolve().parents[1] / "native"
FOLDER = Path("csrc/quantization/gptq")
HEADERS = (
    "torch/all.h",
    "c10/cuda/CUDAGuard.h",
    "ATen/cuda/CUDAContext.h",
    "cuda_runtime.h",
    "cuda_fp16.h",
)
"""Headers that q_gemm.cu includes and that cuda_on_cpu.h replaces."""

Array = NDArray[np.generic]


class CallReport(ctypes.Structure):
    """Counters that a call returns in addition to its result."""

    _fields_ = (("rows_by_cublas", ctypes.c_int32), ("overruns", ctypes.c_int32))
    rows_by_cublas: int
    overruns: int


def plain(text: str) -> str:
    """Translate CUDA C++ to C++ for cuda_on_cpu.h."""
    text = re.sub(r"(\w+)<<<(\w+), (\w+), 0, stream>>>\(", r"launch(\1, \2, \3, ", text)
    return re.sub(r"__shared__ (\w+ (\w+)(?:\[\w+\])+);", r"static \1; shared_memory(\2, sizeof(\2));", text)


def layer(
    rng: np.random.Generator, inputs: int, outputs: int, bits: int = 4, group: int = 128, *, act_order: bool = False
) -> Layer:
    """Return a random layer; with ``act_order`` the groups of its inputs are in random order."""
    count = inputs // group
    groups = np.arange(inputs) // group
    return Layer(
        values=rng.integers(0, 1 << bits, (inputs, outputs)),
        zeros=rng.integers(1, (1 << bits) + 1, (count, outputs)),
        scales=rng.uniform(0.5, 1.5, (count, outputs)).astype(np.float16) / np.float16(8 << bits),
        bits=bits,
        groups=rng.permutation(groups) if act_order else groups,
    )


def packed(values: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Pack rows of small numbers into 32-bit words in GPTQ's order, first number lowest, also for 3 bits."""
    one = (values[:, :, None] >> np.arange(bits)) & 1
    flat = one.reshape(values.shape[0], -1, 32).astype(np.uint64)
    return np.asarray((flat << np.arange(32, dtype=np.uint64)).sum(axis=2), dtype=np.uint32)


def columns(layer: Layer) -> NDArray[np.uint32]:
    """Return the weights as a checkpoint stores them: packed along the inputs."""
    return np.ascontiguousarray(packed(layer.values.T, layer.bits).T)


class Kernels:
    """The functions gptq_gemm and gptq_shuffle of one tree."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Compile the sources of ``tree`` in ``folder``, which is created."""
        for header in HEADERS:
            stand_in = folder / header
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text('#include "cuda_on_cpu.h"\n')
        for source in (tree / FOLDER).iterdir():
            (folder / source.name).write_text(plain(source.read_text()))
        words = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{NATIVE}"]
        library = folder / "gptq.so"
        subprocess.run(["g++", *words, "-o", library, NATIVE / "gptq_on_cpu.cpp"], check=True, timeout=600)
        self._library = ctypes.CDLL(str(library))
        self._library.gemm.restype = CallReport

    def shuffled(self, layer: Layer) -> tuple[NDArray[np.uint32], NDArray[np.int32] | None]:
        """Return the weights in vLLM's layout for these kernels, and the order of the inputs."""
        words = columns(layer)
        order = layer.order
        inputs, outputs = layer.values.shape
        self._library.shuffle(_pointer(words), _pointer(order), outputs, inputs, layer.bits)
        return words, order

    def gemm(
        self, a: NDArray[np.float16], layer: Layer, *, v2: bool = False, exllama: bool = True, order: int = 0
    ) -> tuple[NDArray[np.float16], CallReport]:
        """Return ``a`` times the layer's weights, computed by the tree's gptq_gemm, and the call's counters.

        ``v2`` selects the checkpoint format of zero points. ``exllama`` is False only for layers with act-order that
        are split over their inputs. ``order`` is the order of blocks: 0 as in CUDA, 1 backwards, otherwise a seed.
        """
        rows, inputs = a.shape
        outputs = layer.values.shape[1]
        words, permutation = self.shuffled(layer) if exllama else (columns(layer), layer.groups.astype(np.int32))
        zeros = packed(layer.zeros - (not v2), layer.bits)
        result = np.empty((rows, outputs), np.float16)
        pointers = [_pointer(one) for one in (a, words, zeros, layer.scales, permutation, result)]
        counts = (rows, outputs, inputs, len(layer.scales), int(exllama), int(v2), layer.bits, order)
        told = self._library.gemm(*pointers, *counts)
        return result, told

    def add(self, a: NDArray[np.float16], b: NDArray[np.float16]) -> NDArray[np.float16]:
        """Call ``__hadd`` of cuda_on_cpu.h."""
        return self._each("add", a, b)

    def fused(self, a: NDArray[np.float16], b: NDArray[np.float16], c: NDArray[np.float16]) -> NDArray[np.float16]:
        """Call ``__hfma`` of cuda_on_cpu.h."""
        return self._each("fused", a, b, c)

    def narrowed(self, values: NDArray[np.float32]) -> NDArray[np.float16]:
        """Call ``__float2half_rn`` of cuda_on_cpu.h."""
        return self._each("narrowed", values)

    def _each(self, function: str, *arrays: Array) -> NDArray[np.float16]:
        result = np.empty(arrays[0].size, np.float16)
        getattr(self._library, function)(*map(_pointer, arrays), _pointer(result), result.size)
        return result


def _pointer(array: Array | None) -> ctypes.c_void_p | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
