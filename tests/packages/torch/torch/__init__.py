"""A small package in PyTorch's shape."""

from torch import _C, __config__, backends, version

__version__ = version.__version__
