"""Build PyTorch and vLLM wheels for NVIDIA Volta from source, with the same bytes every time."""

PIPELINE_VERSION = 2
"""Raised whenever the pipeline would make other bytes from the same inputs; part of every key."""
