"""Pretend a GPU: tell vLLM and Triton its compute capability, and compile kernels instead of launching them.

Import this before vllm, because vllm looks for a GPU when it is imported. Everything between vLLM's own Python function
and the launch is real. So the compiled code and its cache key are the same as on a machine with such a card.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Without a GPU vllm/triton_utils/importing.py replaces Triton with a placeholder, unless this variable is empty, as it
# is in a worker process whose card is set later.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to standard output

import torch
import triton
import vllm.platforms
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

VOLTA = (7, 0)
NAME = "the card"


@dataclass(frozen=True)
class Launch:
    """A kernel that would have been launched."""

    function: str
    """The name in the source: ``kernel_unified_attention_2d``."""
    kernel: Any
    """Triton's CompiledKernel."""
    grid: Any
    log: str
    """The output of ptxas; empty if the kernel was in the cache or Triton does not print it."""
    arguments: Mapping[str, Any]
    """The arguments of the call, by the names in the source."""


class Driver:
    """The methods of Triton's driver that a compilation calls."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


class Platform(NonNvmlCudaPlatform):
    """A CUDA platform without a device.

    The capability is a class attribute, because vLLM's modules keep the platform that they found at import.
    """

    capability = VOLTA
    nvlink = False
    """True if NVLink connects all cards."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        """Return the pretended capability."""
        return DeviceCapability(*Platform.capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return a name that no tuned configuration of vLLM has and that fits into its messages."""
        return NAME

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Return the memory of the card in bytes."""
        return 16 << 30

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        """Return True if NVLink connects the cards."""
        return cls.nvlink


class KernelCompileError(Exception):
    """Triton does not compile a kernel; ``function`` is the kernel's name."""

    def __init__(self, function: str, why: str) -> None:
        super().__init__(f"{function}: {why}")
        self.function = function
        self.why = why
        """The line of the compiler's output that names the error."""


def capability(of: tuple[int, int] = VOLTA, target: tuple[int, int] | None = None) -> None:
    """Pretend a card of capability ``of`` from now on; Triton compiles for ``target``, by default ``of``."""
    Platform.capability = of
    if not isinstance(vllm.platforms._current_platform, Platform):
        vllm.platforms._current_platform = Platform()
    torch.cuda.get_device_capability = lambda device=None: of
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda device=None: NAME
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=80)
    triton.runtime.driver.set_active(Driver(target or of))


@contextlib.contextmanager
def launches(callback: Callable[[Launch], object] = lambda launch: None) -> Iterator[list[Launch]]:
    """Inside the block, compile each Triton kernel and add its launch to the list instead of launching it.

    ``callback`` is called with each launch at once. vLLM's own CUDA kernels are skipped, since there is no GPU.

    Raises:
        KernelCompileError: Triton does not compile a kernel.
    """
    import vllm._custom_ops as ops

    seen: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise KernelCompileError(self.fn.__name__, _line(error)) from error
        given = {parameter.name: parameter.default for parameter in self.params} | dict(
            zip(self.arg_names, args, strict=False)
        )
        given |= {name: value for name, value in options.items() if name in given}
        seen.append(Launch(self.fn.__name__, kernel, grid, log.getvalue(), given))
        callback(seen[-1])
        return kernel

    def skip(*_: Any, **__: Any) -> None:
        return None

    cuda_kernels = [(ops, name) for name in ("moe_align_block_size", "moe_wna16_gemm", "moe_sum")]
    cuda_kernels += [(torch.ops._C, "silu_and_mul")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for owner, name in cuda_kernels:
            stack.enter_context(mock.patch.object(owner, name, skip))
        yield seen


def _line(error: BaseException) -> str:
    """Return the position and the error from a compiler's message of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = re.match(r"at (\d+:\d+)", lines[0]) if lines else None
    message = next(
        (line for line in lines if re.search(r"\berror\b", line)), lines[-1] if lines else type(error).__name__
    )
    return f"at {place[1]} of the kernel: {message}" if place else message
