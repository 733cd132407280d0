"""vLLM's GPTQ matrix product run on the CPU, from the very source text that nvcc compiles, and its exact answer.

The .cu and .cuh files of a tree are compiled by g++ against tests/native/cuda_on_cpu.h. Two things in their text are no
C++ and are rewritten: launches, ``kernel<<<grid, block, 0, stream>>>(...)``, and declarations of shared memory.
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
"""What q_gemm.cu includes, and cuda_on_cpu.h stands in for."""

Array = NDArray[np.generic]


class Told(ctypes.Structure):
    """What a call says beside its result."""

    _fields_ = (("rows_by_cublas", ctypes.c_int32), ("overruns", ctypes.c_int32))
    rows_by_cublas: int
    overruns: int


def plain(text: str) -> str:
    """CUDA C++ as C++ that does the same with cuda_on_cpu.h."""
    text = re.sub(r"(\w+)<<<(\w+), (\w+), 0, stream>>>\(", r"launch(\1, \2, \3, ", text)
    return re.sub(r"__shared__ (\w+ (\w+)(?:\[\w+\])+);", r"static \1; shared_memory(\2, sizeof(\2));", text)


def layer(
    rng: np.random.Generator, inputs: int, outputs: int, bits: int = 4, group: int = 128, *, act_order: bool = False
) -> Layer:
    """A random layer; with ``act_order`` its inputs belong to the groups in no order."""
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
    """Rows of small numbers as rows of 32-bit words, the first number lowest: GPTQ's order, also for 3 bits."""
    one = (values[:, :, None] >> np.arange(bits)) & 1
    flat = one.reshape(values.shape[0], -1, 32).astype(np.uint64)
    return np.asarray((flat << np.arange(32, dtype=np.uint64)).sum(axis=2), dtype=np.uint32)


def columns(layer: Layer) -> NDArray[np.uint32]:
    """The weights as a checkpoint stores them: packed along the inputs."""
    return np.ascontiguousarray(packed(layer.values.T, layer.bits).T)


class Kernels:
    """gptq_gemm and gptq_shuffle of one tree."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Compile the sources of ``tree`` in ``folder``, which is made."""
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
        self._library.gemm.restype = Told

    def shuffled(self, layer: Layer) -> tuple[NDArray[np.uint32], NDArray[np.int32] | None]:
        """The weights as vLLM lays them out for these kernels after loading, and the order of the inputs."""
        words = columns(layer)
        order = layer.order
        inputs, outputs = layer.values.shape
        self._library.shuffle(_pointer(words), _pointer(order), outputs, inputs, layer.bits)
        return words, order

    def gemm(
        self, a: NDArray[np.float16], layer: Layer, *, v2: bool = False, exllama: bool = True, order: int = 0
    ) -> tuple[NDArray[np.float16], Told]:
        """``a`` times the layer's weights, by the tree's gptq_gemm.

        ``v2``: the checkpoint's format, which says how zeros are stored. ``exllama``: as vLLM calls it but for layers
        with act-order that are split over their inputs. ``order`` of blocks: 0 as CUDA counts, 1 backwards, or a seed.
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
        """The stand-in's ``__hadd``."""
        return self._each("add", a, b)

    def fused(self, a: NDArray[np.float16], b: NDArray[np.float16], c: NDArray[np.float16]) -> NDArray[np.float16]:
        """The stand-in's ``__hfma``."""
        return self._each("fused", a, b, c)

    def narrowed(self, values: NDArray[np.float32]) -> NDArray[np.float16]:
        """The stand-in's ``__float2half_rn``."""
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
