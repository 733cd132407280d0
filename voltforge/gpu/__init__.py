"""Kernels of compute capability 7.0: compiled ahead, and run on the card of a machine."""
