"""cuDNN."""

from torch import _C


def version():
    return _C._cudnn_version() or None
