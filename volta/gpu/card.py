"""Control one NVIDIA card through the driver API (cuda-python): memory, JIT compilation, launches, times."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volta.gpu.rows import FRESH, KINDS, Array, Image, Launch, Number, Pointer

MINIMUM = (7, 0)
"""The smallest compute capability that can run the kernels."""
PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a block has without the opt-in for more (CUDA C++ Programming Guide)."""
CUDA_OF_PTX = {
    (7, 0): (11, 0), (7, 1): (11, 1), (7, 2): (11, 2), (7, 3): (11, 3), (7, 4): (11, 4), (7, 5): (11, 5),
    (7, 6): (11, 6), (7, 7): (11, 7), (7, 8): (11, 8), (8, 0): (12, 0), (8, 1): (12, 1), (8, 2): (12, 2),
    (8, 3): (12, 3), (8, 4): (12, 4), (8, 5): (12, 5), (8, 6): (12, 7), (8, 7): (12, 8), (8, 8): (12, 9),
    (9, 0): (13, 0),
}  # fmt: skip
"""The first CUDA release whose driver compiles a version of PTX (PTX ISA, table of release notes)."""
LOST = (700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999)
"""Statuses after which a context cannot be used (cuda.h: illegal address, timeout, assertion and so on)."""
LOG = 8192
"""Bytes of the buffer for the JIT's log."""


class NoCardError(Exception):
    """There is no usable GPU; the text is a message to the user."""


class CardError(Exception):
    """A call of the driver failed; if ``lost`` is true, this process cannot use the card any more."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


def ptx_version(ptx: str) -> tuple[int, int]:
    """Return the PTX version of a module, from its ``.version`` directive.

    Raises:
        CardError: the directive is missing.
    """
    found = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", ptx, re.MULTILINE)
    if not found:
        raise CardError("the kernel's PTX has no .version")
    return int(found[1]), int(found[2])


def cuda_release_for(ptx: str) -> tuple[int, int]:
    """Return the first CUDA release whose driver compiles this PTX; for an unknown version, the newest release."""
    return CUDA_OF_PTX.get(ptx_version(ptx), max(CUDA_OF_PTX.values()))


@dataclass(frozen=True)
class Buffer:
    """A buffer on the card."""

    address: int
    size: int
    """Bytes."""


class Card:
    """A card with a CUDA context in this process."""

    def __init__(self, driver: Any, number: int = 0) -> None:
        """Create a context on card ``number``; ``driver`` is the module ``cuda.bindings.driver``.

        Raises:
            NoCardError: there is no such card, or it is too old or cannot be used.
        """
        self.driver = driver
        try:
            self.call("cuInit", 0)
            count = self.call("cuDeviceGetCount")
        except CardError as error:
            raise NoCardError(f"the NVIDIA driver of this machine cannot be used ({error})") from error
        except (RuntimeError, OSError) as error:  # raised by cuda-python
            raise NoCardError("this machine has no NVIDIA driver: libcuda.so.1 is not found") from error
        if not 0 <= number < count:
            raise NoCardError(f"this machine has no NVIDIA card number {number}: it has {count}, numbered from 0")
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
        """The newest CUDA release that the driver supports."""
        if self.capability < MINIMUM:
            raise NoCardError(f"{self.name} has compute capability {dotted(self.capability)}; 7.0 or newer is needed")
        try:
            self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
            self.call("cuCtxSetCurrent", self.context)
        except CardError as error:
            raise NoCardError(f"{self.name} cannot be used: {error}") from error
        self.modules: dict[str, Any] = {}

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver; return its results without the status.

        Raises:
            CardError: the status is an error.
        """
        status, *results = getattr(self.driver, function)(*arguments)
        if int(status):
            _, text = self.driver.cuGetErrorString(status)
            raise CardError(f"{function}: {(text or b'').decode() or int(status)}", lost=int(status) in LOST)
        return results[0] if len(results) == 1 else results or None

    def free(self) -> int:
        """Return the free memory of the card in bytes."""
        return int(self.call("cuMemGetInfo")[0])

    @contextlib.contextmanager
    def buffers(self, contents: Sequence[Array]) -> Iterator[list[Buffer]]:
        """Allocate memory on the card with these contents, until the block ends.

        Raises:
            CardError: the card does not have enough memory.
        """
        wanted, free = sum(content.nbytes for content in contents), self.free()
        if wanted > free:
            raise CardError(f"the row needs {wanted >> 20} MiB of the card's memory, and {free >> 20} MiB are free")
        memories: list[Buffer] = []
        try:
            for content in contents:
                memories.append(Buffer(int(self.call("cuMemAlloc", max(content.nbytes, 1))), content.nbytes))
            self.fill(memories, contents)
            yield memories
        finally:
            for memory in memories:
                with contextlib.suppress(CardError):
                    self.call("cuMemFree", memory.address)

    def fill(self, memories: Sequence[Buffer], contents: Sequence[Array]) -> None:
        """Copy contents to the card."""
        for memory, content in zip(memories, contents, strict=True):
            if content.dtype == np.uint8 and content.nbytes and (content == FRESH).all():
                self.call("cuMemsetD8", memory.address, FRESH, memory.size)
            elif content.nbytes:
                data = np.ascontiguousarray(content)
                self.call("cuMemcpyHtoD", memory.address, data.ctypes.data, data.nbytes)

    def read(self, memory: Buffer) -> bytes:
        """Wait for all earlier launches and return a buffer's bytes."""
        self.call("cuCtxSynchronize")
        data = np.empty(memory.size, np.uint8)
        self.call("cuMemcpyDtoH", data.ctypes.data, memory.address, memory.size)
        return data.tobytes()

    def kernel(self, image: Image, symbol: str) -> Any:
        """Return a kernel of an image: from its cubin on a card of 7.0, otherwise from its PTX.

        Raises:
            CardError: the driver is older than the PTX, or cannot compile it.
        """
        if image.name not in self.modules:
            self.modules[image.name] = self.load(image)
        return self.call("cuModuleGetFunction", self.modules[image.name], symbol.encode())

    def load(self, image: Image) -> Any:
        """Load an image as a module of the driver."""
        if self.capability == MINIMUM and image.cubin:
            return self.call("cuModuleLoadData", np.frombuffer(image.cubin, np.uint8).ctypes.data)
        if (need := cuda_release_for(image.ptx)) > self.version:
            raise CardError(
                f"its PTX needs a driver for CUDA {dotted(need)}, and this one supports CUDA {dotted(self.version)}: "
                "install a newer driver"
            )
        option = self.driver.CUjit_option
        log = b" " * LOG  # the binding requires bytes, and the driver writes to them
        options = [option.CU_JIT_ERROR_LOG_BUFFER, option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        try:
            return self.call("cuModuleLoadDataEx", image.ptx.encode() + b"\0", 2, options, [log, LOG])
        except CardError as error:
            output = " ".join(log.split(b"\0")[0].decode(errors="replace").split())
            raise CardError(f"{error}{f' ({output[:300]})' if output else ''}", lost=error.lost) from error

    def launch(self, launch: Launch, memories: Sequence[Buffer], stream: Any = 0) -> None:
        """Launch a kernel.

        Raises:
            CardError: the launch fails.
        """
        kernel = self.kernel(launch.image, launch.symbol)
        if launch.shared > PLAIN_SHARED:
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.call("cuFuncSetAttribute", kernel, attribute, launch.shared)
        values = [_value(argument, memories) for argument in launch.arguments]
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        parameters = addresses.ctypes.data if values else 0
        self.call("cuLaunchKernel", kernel, *launch.grid, *launch.block, launch.shared, stream, parameters, 0)

    def seconds(self, launches: Sequence[Launch], memories: Sequence[Buffer], times: int = 20) -> float:
        """Return the time of all launches together in seconds: the median of several runs of a graph of them.

        The launches are in a CUDA graph because a launch from Python takes longer than most of these kernels.
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
        for function, handle in (("cuGraphExecDestroy", runs), ("cuGraphDestroy", graph), ("cuEventDestroy", begin),
                               ("cuEventDestroy", end), ("cuStreamDestroy", stream)):  # fmt: skip
            self.call(function, handle)
        return float(np.median(taken[1:]))  # the first run also uploads the graph


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the release of NVIDIA's kernel driver, such as ``580.159.04``; empty if unknown."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def dotted(version: tuple[int, int]) -> str:
    """Return a version as text: ``7.0``."""
    return f"{version[0]}.{version[1]}"


def _value(argument: Pointer | Number, memories: Sequence[Buffer]) -> Array:
    if isinstance(argument, Pointer):
        return np.array(memories[argument.buffer].address + argument.offset, np.uint64)
    return np.array(argument.value, KINDS[argument.kind])
