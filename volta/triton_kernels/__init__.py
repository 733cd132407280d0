"""Compile vLLM's Triton kernels for compute capability 7.0, without a GPU."""
