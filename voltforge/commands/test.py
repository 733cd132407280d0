"""`./doit test`: run linter, type checker and tests."""

from __future__ import annotations

import os
from pathlib import Path

from voltforge.commands import dev_packages
from voltforge.commands.python import run_python

PYTEST = ["pytest", "-n", "2"]
"""pytest with two workers: one waits for vLLM's wheel and tests it, the other runs the rest."""


def run_tests(root: Path, *, everything: bool = False) -> None:
    """Run ruff, mypy and pytest as CI does, and stop at the first that fails.

    A run leaves out some kill points, which rotate from day to day, and long tests that have passed with the same
    inputs. With ``everything`` it leaves out none.

    Raises:
        VoltforgeError: one of them failed, or their packages cannot be installed.
    """
    dev_packages.install(root)
    if everything:
        os.environ["VOLTFORGE_TEST_ALL"] = "1"
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], PYTEST):
        run_python(root, "-m", *words)


def run_all_tests(root: Path) -> None:
    """Run all tests, and leave none out; raises as :func:`run_tests` does."""
    run_tests(root, everything=True)
