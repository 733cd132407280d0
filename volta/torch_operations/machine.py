"""Describe the machine's GPU, driver and PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from pathlib import Path
from typing import Any


def absent() -> str:
    """Return a message if there is no usable GPU; empty if there is one."""
    try:
        import torch
    except ImportError as problem:
        return f"This Python has no torch ({problem}): install the wheel, or use the Python of its environment."
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} was built without CUDA: install a build with CUDA."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        warning = str(caught[0].message) if caught else f"CUDA {torch.version.cuda} finds none"
        reason = " ".join(warning.split())[:200]
        return (
            f"PyTorch {torch.__version__} finds no GPU that it can use ({reason}): check that nvidia-smi lists one, "
            f"that its driver supports CUDA {torch.version.cuda}, and that CUDA_VISIBLE_DEVICES does not hide it."
        )
    return ""


def machine(device: str) -> dict[str, Any]:
    """Return a description of the PyTorch build and the device."""
    import torch

    description: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "CPU"}
    description["place"] = str(Path(torch.__file__).parent)
    with contextlib.suppress(AttributeError):  # a torch without CUDA has no such function
        description["archs"] = torch._C._cuda_getArchFlags()
    if device != "cpu":
        description["device"] = torch.cuda.get_device_name()
        description["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        description["driver"] = driver()
        description["cudnn"] = torch.backends.cudnn.version()
    return description


def driver() -> str:
    """Return the version of NVIDIA's driver, by NVML; empty if NVML cannot be used."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        succeeded = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    except (OSError, AttributeError):
        return ""
    return text.value.decode() if succeeded else ""
