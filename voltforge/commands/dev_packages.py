"""Install the packages that tests and benchmarks need, before the first test or benchmark runs."""

from __future__ import annotations

import filecmp
import shutil
import sys
from pathlib import Path

from voltforge.sources import environment, index
from voltforge.sources.environment import Environment
from voltforge.system import console


def install(root: Path) -> None:
    """Install requirements-dev.txt into ``.venv``; a copy of the lock there marks that it is done.

    If another Python than that of ``.venv`` runs this, nothing is installed: the person who chose it provides its
    packages.

    Raises:
        InstallError: a file of the lock cannot be downloaded, or its hash does not match.
    """
    own, lock = root / ".venv", root / "requirements-dev.txt"
    installed = own / lock.name
    if Path(sys.prefix).resolve() != own.resolve():
        return
    if installed.is_file() and filecmp.cmp(lock, installed, shallow=False):
        return
    console.step(f"install the packages of tests and benchmarks ({lock.name})")
    environment.install(lock, Environment(own), index.configured(), sdists=True)
    shutil.copyfile(lock, installed)
