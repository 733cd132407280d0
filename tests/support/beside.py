"""A Python that has our vLLM and no GPU: programs run beside it, and snippets in a process that keeps its imports."""

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
class Beside:
    """The interpreter of an environment into which the wheel was installed, and the variables that it needs here."""

    python: Path
    environ: Mapping[str, str]

    def run(self, *words: str | Path, before: Path | None = None, status: int = 0) -> str:
        """What a program prints; a folder that is given goes before its packages."""
        environ = dict(self.environ)
        if before:
            environ["PYTHONPATH"] = os.pathsep.join([str(before), environ["PYTHONPATH"]])
        done = subprocess.run([self.python, *words], env=environ, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout


class Workbench:
    """A process of that interpreter, which runs snippets and keeps what it has imported."""

    def __init__(self, beside: Beside, *words: str, prelude: str = "") -> None:
        self.prelude = prelude
        self.process = subprocess.Popen(
            [beside.python, ROOT / "tests" / "scripts" / "workbench.py", *words],
            env=dict(beside.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def does(self, snippet: str) -> str:
        """What a snippet printed, which must end well."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(self.prelude + snippet) + "\n")
        self.process.stdin.flush()
        fine, printed = json.loads(self.process.stdout.readline())
        assert fine, printed
        assert isinstance(printed, str)
        return printed

    def end(self) -> None:
        """No more snippets."""
        self.process.communicate()
