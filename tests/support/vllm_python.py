"""Run programs with the Python of an environment that has our vLLM, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.checkouts import ROOT

PATIENCE = 1800
"""Seconds for one program."""


@dataclass(frozen=True)
class VllmPython:
    """The interpreter of an environment into which the wheel was installed, and the variables that it needs here."""

    python: Path
    environ: Mapping[str, str]

    def run(self, *words: str | Path, before: Path | None = None, status: int = 0) -> str:
        """Run a program and return its standard output; the folder ``before`` precedes the environment's packages."""
        environ = dict(self.environ)
        if before:
            environ["PYTHONPATH"] = os.pathsep.join([str(before), environ["PYTHONPATH"]])
        process = subprocess.run([self.python, *words], env=environ, capture_output=True, text=True, timeout=PATIENCE)
        assert process.returncode == status, process.stdout[-4000:] + process.stderr[-4000:]
        return process.stdout


class Workbench:
    """A process of that Python, which runs snippets and keeps its imports."""

    def __init__(self, vllm_python: VllmPython, *words: str, prelude: str = "") -> None:
        self.prelude = prelude
        self.process = subprocess.Popen(
            [vllm_python.python, ROOT / "tests" / "scripts" / "workbench.py", *words],
            env=dict(vllm_python.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def does(self, snippet: str) -> str:
        """Run a snippet, which must not fail, and return its output."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(self.prelude + snippet) + "\n")
        self.process.stdin.flush()
        succeeded, printed = json.loads(self.process.stdout.readline())
        assert succeeded, printed
        assert isinstance(printed, str)
        return printed

    def end(self) -> None:
        """End the process."""
        self.process.communicate()
