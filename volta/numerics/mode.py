"""Select how the cases run: computed by Triton's interpreter, or compiled for sm_70 and not computed.

Import this before triton and vllm: Triton reads its environment when it is imported.
"""

# ruff: noqa: E402 (the environment must be set before triton is imported, and the GPU pretended before vllm is)

from __future__ import annotations

import os
import sys

COMPILE = "compile" in sys.argv[1:] or os.environ.get("TRITON_INTERPRET") == "0"
"""True if the cases are compiled for sm_70."""
if not COMPILE:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from volta import pretended_gpu

pretended_gpu.capability()
