"""Describe the machine's GPU, driver and PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from pathlib import Path
from typing import Any


def absent() -> str:
    """Why there is no GPU to use, in a sentence; empty where there is one."""
    try:
        import torch
    except ImportError as problem:
        return f"This Python has no torch to run operations with ({problem}): install the wheel, or use its Python."
    if not torch.version.cuda:
        return f"This PyTorch, {torch.__version__}, was built without CUDA: install one that was."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        told = " ".join(str(heard[0].message).split())[:200] if heard else f"CUDA {torch.version.cuda} finds none"
        return (
            f"PyTorch {torch.__version__} finds no GPU that it can use ({told}): look whether nvidia-smi lists one, "
            f"whether its driver can do CUDA {torch.version.cuda}, and whether CUDA_VISIBLE_DEVICES hides it."
        )
    return ""


def machine(device: str) -> dict[str, Any]:
    """What it runs on."""
    import torch

    said: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "CPU"}
    said["place"] = str(Path(torch.__file__).parent)
    with contextlib.suppress(AttributeError):  # a torch without CUDA has no such function
        said["archs"] = torch._C._cuda_getArchFlags()
    if device != "cpu":
        said["device"] = torch.cuda.get_device_name()
        said["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        said["driver"] = driver()
        said["cudnn"] = torch.backends.cudnn.version()
    return said


def driver() -> str:
    """The version of NVIDIA's driver, by NVML; empty where that cannot be asked."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        fine = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    except (OSError, AttributeError):
        return ""
    return text.value.decode() if fine else ""
