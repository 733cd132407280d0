"""A GPU that is not there: vLLM and Triton are told its capability, launches end after the compile.

Import this before vllm: it settles what the imports of vllm ask. Everything between vLLM's own Python function and the
launch is the real thing, so what is compiled, and the key that it is cached under, is what the same call gives on a
machine with such a card.
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

# Without a GPU vllm/triton_utils/importing.py puts an empty shell in Triton's place, unless this variable is empty:
# so it looks in a worker that is given its card later.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it speaks on standard output

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
    """Its name in the source: ``kernel_unified_attention_2d``."""
    kernel: Any
    """Triton's CompiledKernel."""
    grid: Any
    said: str
    """What ptxas said, if it was compiled now and ptxas is heard."""
    arguments: Mapping[str, Any]
    """What it was called with, by the names in its source."""


class Driver:
    """As much of Triton's driver as a compile asks for."""

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
    """A CUDA platform without a device behind it; vLLM's modules keep the one that they found at import."""

    told = VOLTA
    joined = False
    """Whether NVLink joins all cards."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        """The capability that is pretended."""
        return DeviceCapability(*Platform.told)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """A name that no tuned configuration has, and that reads well in a sentence."""
        return NAME

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes."""
        return 16 << 30

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        """Whether NVLink joins the cards."""
        return cls.joined


class DoesNotCompile(Exception):  # noqa: N818 - it says what happened
    """A kernel that Triton refuses; ``function`` is its name."""

    def __init__(self, function: str, why: str) -> None:
        super().__init__(f"{function}: {why}")
        self.function = function
        self.why = why
        """The compiler's own line."""


def capability(of: tuple[int, int] = VOLTA, target: tuple[int, int] | None = None) -> None:
    """From now on, everybody who asks is told this capability; Triton compiles for ``target``, if another is named."""
    Platform.told = of
    if not isinstance(vllm.platforms._current_platform, Platform):
        vllm.platforms._current_platform = Platform()
    torch.cuda.get_device_capability = lambda device=None: of
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda device=None: NAME
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=80)
    triton.runtime.driver.set_active(Driver(target or of))


@contextlib.contextmanager
def launches(taken: Callable[[Launch], object] = lambda launch: None) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel compiles it and then only adds to the list; ``taken`` is told at once.

    What vLLM launches in between of its own CUDA kernels is left out, for there is nothing to launch it on.

    Raises:
        DoesNotCompile: Triton refuses a kernel.
    """
    import vllm._custom_ops as ops

    seen: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise DoesNotCompile(self.fn.__name__, _line(error)) from error
        given = {one.name: one.default for one in self.params} | dict(zip(self.arg_names, args, strict=False))
        given |= {name: value for name, value in options.items() if name in given}
        seen.append(Launch(self.fn.__name__, kernel, grid, said.getvalue(), given))
        taken(seen[-1])
        return kernel

    def nothing(*_: Any, **__: Any) -> None:
        return None

    of_cuda = [(ops, name) for name in ("moe_align_block_size", "moe_wna16_gemm", "moe_sum")]
    of_cuda += [(torch.ops._C, "silu_and_mul")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for owner, name in of_cuda:
            stack.enter_context(mock.patch.object(owner, name, nothing))
        yield seen


def _line(error: BaseException) -> str:
    """Where in the kernel, and what, of what a compiler says in many lines."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = re.match(r"at (\d+:\d+)", said[0]) if said else None
    told = next((line for line in said if re.search(r"\berror\b", line)), said[-1] if said else type(error).__name__)
    return f"at {place[1]} of the kernel: {told}" if place else told
