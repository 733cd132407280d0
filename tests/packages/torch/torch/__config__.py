"""How it was configured."""

from torch import _C


def show():
    return f"Build settings: {_C._show_config()}"
