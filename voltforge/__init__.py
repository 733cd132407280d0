"""voltforge builds PyTorch and vLLM wheels for NVIDIA Volta from source, the same bytes every time."""

import gc

PIPELINE_VERSION = 2
"""Raised whenever the pipeline itself would make other bytes from the same inputs; part of every key."""

gc.set_threshold(100_000)  # what is imported stays: to look through it again and again is a tenth of a short run
