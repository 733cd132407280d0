"""One NVIDIA card through the driver API (cuda-python): memory, kernels compiled by its JIT, launches, times."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volta.gpu.rows import FRESH, KINDS, Array, Image, Launch, Number, Pointer

LEAST = (7, 0)
PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a block has without asking for more (CUDA C++ Programming Guide)."""
CUDA_OF_PTX = {
    (7, 0): (11, 0), (7, 1): (11, 1), (7, 2): (11, 2), (7, 3): (11, 3), (7, 4): (11, 4), (7, 5): (11, 5),
    (7, 6): (11, 6), (7, 7): (11, 7), (7, 8): (11, 8), (8, 0): (12, 0), (8, 1): (12, 1), (8, 2): (12, 2),
    (8, 3): (12, 3), (8, 4): (12, 4), (8, 5): (12, 5), (8, 6): (12, 7), (8, 7): (12, 8), (8, 8): (12, 9),
    (9, 0): (13, 0),
}  # fmt: skip
"""The first CUDA release whose driver reads a version of PTX (PTX ISA, table of release notes)."""
LOST = (700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999)
"""Statuses after which a context is of no more use (cuda.h: illegal address, time-out, assertion and their like)."""
LOG = 8192
"""Bytes for what the JIT says."""


class NoCardError(Exception):
    """There is no GPU that can be used; its words are for the user."""


class CardError(Exception):
    """The card or its driver refused something; ``lost`` says that nothing more can be done in this process."""

    def __init__(self, what: str, *, lost: bool = False) -> None:
        super().__init__(what)
        self.lost = lost


def ptx_version(ptx: str) -> tuple[int, int]:
    """The version of PTX that a module is written in, as its ``.version`` says.

    Raises:
        CardError: it does not say.
    """
    found = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", ptx, re.MULTILINE)
    if not found:
        raise CardError("the kernel's PTX has no .version")
    return int(found[1]), int(found[2])


def needed(ptx: str) -> tuple[int, int]:
    """The oldest CUDA whose driver reads this PTX; a newer version than is known counts as the newest known."""
    return CUDA_OF_PTX.get(ptx_version(ptx), max(CUDA_OF_PTX.values()))


@dataclass(frozen=True)
class Memory:
    """A buffer on the card."""

    address: int
    size: int
    """Bytes."""


class Card:
    """A card with a context of this process."""

    def __init__(self, driver: Any, number: int = 0) -> None:
        """Take a card into use; ``driver`` is the module ``cuda.bindings.driver``.

        Raises:
            NoCardError: there is none, or none that is new enough.
        """
        self.driver = driver
        try:
            self.call("cuInit", 0)
            count = self.call("cuDeviceGetCount")
        except CardError as error:
            raise NoCardError(f"the NVIDIA driver of this machine cannot be used ({error})") from error
        except (RuntimeError, OSError) as error:  # cuda-python's own
            raise NoCardError("this machine has no NVIDIA driver: libcuda.so.1 is not found") from error
        if not 0 <= number < count:
            raise NoCardError(f"this machine has {count} NVIDIA cards, none with the number {number}")
        self.device = self.call("cuDeviceGet", number)
        self.name = self.call("cuDeviceGetName", 96, self.device).split(b"\0")[0].decode()
        kinds = driver.CUdevice_attribute
        self.capability: tuple[int, int] = tuple(  # type: ignore[assignment]
            self.call("cuDeviceGetAttribute", kind, self.device)
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )  # fmt: skip
        version = self.call("cuDriverGetVersion")
        self.version = version // 1000, version % 1000 // 10
        """The newest CUDA that the driver knows."""
        if self.capability < LEAST:
            raise NoCardError(f"{self.name} has compute capability {dotted(self.capability)}; 7.0 or newer is needed")
        try:
            self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
            self.call("cuCtxSetCurrent", self.context)
        except CardError as error:
            raise NoCardError(f"{self.name} cannot be used: {error}") from error
        self.modules: dict[str, Any] = {}

    def call(self, function: str, *arguments: Any) -> Any:
        """One function of the driver; gives what it gives besides its status.

        Raises:
            CardError: its status is an error.
        """
        status, *given = getattr(self.driver, function)(*arguments)
        if int(status):
            _, text = self.driver.cuGetErrorString(status)
            raise CardError(f"{function}: {(text or b'').decode() or int(status)}", lost=int(status) in LOST)
        return given[0] if len(given) == 1 else given or None

    def free(self) -> int:
        """Bytes of memory that can be had."""
        return int(self.call("cuMemGetInfo")[0])

    @contextlib.contextmanager
    def buffers(self, contents: Sequence[Array]) -> Iterator[list[Memory]]:
        """Memory on the card with these contents, for the time of the block.

        Raises:
            CardError: there is not enough.
        """
        wanted, free = sum(one.nbytes for one in contents), self.free()
        if wanted > free:
            raise CardError(f"it needs {wanted >> 20} MiB of the card's memory, of which {free >> 20} MiB are free")
        made: list[Memory] = []
        try:
            for one in contents:
                made.append(Memory(int(self.call("cuMemAlloc", max(one.nbytes, 1))), one.nbytes))
            self.fill(made, contents)
            yield made
        finally:
            for memory in made:
                with contextlib.suppress(CardError):
                    self.call("cuMemFree", memory.address)

    def fill(self, memories: Sequence[Memory], contents: Sequence[Array]) -> None:
        """Copy contents to the card."""
        for memory, one in zip(memories, contents, strict=True):
            if one.dtype == np.uint8 and one.nbytes and one.flat[0] == FRESH and (one == FRESH).all():
                self.call("cuMemsetD8", memory.address, FRESH, memory.size)
            elif one.nbytes:
                data = np.ascontiguousarray(one)
                self.call("cuMemcpyHtoD", memory.address, data.ctypes.data, data.nbytes)

    def read(self, memory: Memory) -> bytes:
        """A buffer's bytes, after everything that was launched before."""
        self.call("cuCtxSynchronize")
        data = np.empty(memory.size, np.uint8)
        self.call("cuMemcpyDtoH", data.ctypes.data, memory.address, memory.size)
        return data.tobytes()

    def kernel(self, image: Image, symbol: str) -> Any:
        """A kernel of an image: its cubin on a card of 7.0, otherwise its PTX, compiled by the driver.

        Raises:
            CardError: the driver is older than the PTX, or refuses it.
        """
        if image.name not in self.modules:
            self.modules[image.name] = self.load(image)
        return self.call("cuModuleGetFunction", self.modules[image.name], symbol.encode())

    def load(self, image: Image) -> Any:
        """An image as a module of the driver's."""
        if self.capability == LEAST and image.cubin:
            return self.call("cuModuleLoadData", np.frombuffer(image.cubin, np.uint8).ctypes.data)
        if (need := needed(image.ptx)) > self.version:
            raise CardError(
                f"its PTX is of CUDA {dotted(need)}, and the driver knows CUDA up to {dotted(self.version)}: "
                "a newer driver is needed"
            )
        option = self.driver.CUjit_option
        log = b" " * LOG  # the binding wants bytes, and has the driver write into them
        options = [option.CU_JIT_ERROR_LOG_BUFFER, option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        try:
            return self.call("cuModuleLoadDataEx", image.ptx.encode() + b"\0", 2, options, [log, LOG])
        except CardError as error:
            said = " ".join(log.split(b"\0")[0].decode(errors="replace").split())
            raise CardError(f"{error}{f' ({said[:300]})' if said else ''}", lost=error.lost) from error

    def launch(self, launch: Launch, memories: Sequence[Memory], stream: Any = 0) -> None:
        """Start a kernel.

        Raises:
            CardError: the driver refuses it.
        """
        kernel = self.kernel(launch.image, launch.symbol)
        if launch.shared > PLAIN_SHARED:
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.call("cuFuncSetAttribute", kernel, attribute, launch.shared)
        values = [_value(one, memories) for one in launch.arguments]
        places = np.array([one.ctypes.data for one in values], np.uint64)
        where = places.ctypes.data if values else 0
        self.call("cuLaunchKernel", kernel, *launch.grid, *launch.block, launch.shared, stream, where, 0)

    def seconds(self, launches: Sequence[Launch], memories: Sequence[Memory], times: int = 20) -> float:
        """How long all launches take together on the card: the median of some runs of a graph that repeats them.

        A graph, for between two launches of its own Python would be slower than most of these kernels.
        """
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        stream = self.call("cuStreamCreate", 0)
        self.call("cuStreamBeginCapture", stream, mode)
        for _ in range(times):
            for launch in launches:
                self.launch(launch, memories, stream)
        graph = self.call("cuStreamEndCapture", stream)
        runs = self.call("cuGraphInstantiate", graph, 0)
        begin, end = (self.call("cuEventCreate", 0) for _ in range(2))
        taken = []
        for _ in range(6):
            self.call("cuEventRecord", begin, stream)
            self.call("cuGraphLaunch", runs, stream)
            self.call("cuEventRecord", end, stream)
            self.call("cuEventSynchronize", end)
            taken.append(float(self.call("cuEventElapsedTime", begin, end)) / 1000 / times)
        for function, what in (("cuGraphExecDestroy", runs), ("cuGraphDestroy", graph), ("cuEventDestroy", begin),
                               ("cuEventDestroy", end), ("cuStreamDestroy", stream)):  # fmt: skip
            self.call(function, what)
        return float(np.median(taken[1:]))  # the first one also uploads the graph


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The release of the kernel's driver, such as ``580.159.04``; empty where the kernel does not say."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def dotted(version: tuple[int, int]) -> str:
    """``7.0``."""
    return f"{version[0]}.{version[1]}"


def _value(one: Pointer | Number, memories: Sequence[Memory]) -> Array:
    if isinstance(one, Pointer):
        return np.array(memories[one.buffer].address + one.offset, np.uint64)
    return np.array(one.value, KINDS[one.kind])
