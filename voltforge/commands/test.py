"""`./doit test`: run linter, type checker and tests."""

from __future__ import annotations

from pathlib import Path

from voltforge.commands import dev_packages
from voltforge.commands.python import run_python

PYTEST = ["pytest", "-n", "2"]
"""pytest with two workers: one waits for vLLM's wheel and tests it, the other runs the rest."""


def run_tests(root: Path) -> None:
    """Run ruff, mypy and pytest as CI does, and stop at the first that fails.

    Raises:
        VoltforgeError: one of them failed, or their packages cannot be installed.
    """
    dev_packages.install(root)
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], PYTEST):
        run_python(root, "-m", *words)
