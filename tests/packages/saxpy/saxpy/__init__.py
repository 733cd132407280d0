"""A small CUDA extension."""
