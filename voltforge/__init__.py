"""voltforge builds PyTorch and vLLM wheels for NVIDIA Volta from source, the same bytes every time."""

PIPELINE_VERSION = 2
"""Raised whenever the pipeline itself would make other bytes from the same inputs; part of every key."""
