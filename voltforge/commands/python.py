"""Run a Python program of the checkout on the person's terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.system import console


def run_python(root: Path, *words: str) -> None:
    """Run this Python with ``words`` as its arguments, in the folder ``root`` and with ``root`` on the import path.

    Raises:
        VoltforgeError: it exits with a status other than 0.
    """
    command = " ".join(["python", *words])
    console.step(command)
    status = subprocess.call([sys.executable, *words], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    if status:
        raise VoltforgeError(f"{command} failed with exit status {status}")
