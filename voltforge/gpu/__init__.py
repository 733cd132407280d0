"""Kernels for compute capability 7.0: compiled ahead of time, and run on this machine's card."""
