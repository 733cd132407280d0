"""Make .venv and install requirements.txt into it. Runs before any package is installed, so it imports none.

pip installs uv, by hash, and uv installs the other packages, which takes a fraction of pip's time. If pip
cannot install uv, or uv does not run on this machine, pip installs all packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
from importlib import metadata
from pathlib import Path

from voltforge.errors import remedy
from voltforge.sources import index_settings

FIRST_PIP = (22, 3)
"""The first pip that can install into another environment (``pip --python``)."""


def main(root: Path) -> int:
    """Make ``.venv`` in ``root`` and return the exit status.

    A copy of the lock in ``.venv`` marks it as complete; ``python.txt`` holds VOLTFORGE_PYTHON, so that another
    value makes ``.venv`` again.
    """
    start, lock, folder = time.monotonic(), root / "requirements.txt", root / ".venv"
    _tell(f"* making .venv with Python {sys.version.split()[0]}: a minute or less, once")
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    pip = [*_pip(python), "--disable-pip-version-check", "install", "--quiet", "--require-hashes", "--requirement"]
    own = folder / "uv.txt"
    own.write_text(requirement("uv", lock.read_text()))
    uv = folder / "bin" / "uv"
    if not own.stat().st_size or _run([*pip, own, "--only-binary", ":all:"], quiet=True)[0]:
        reason = "pip could not install uv"
    elif _run([uv, "--version"], quiet=True)[0]:
        reason = "uv does not run on this machine"
    else:
        reason = ""
    if reason:
        _tell(f"* {reason}: pip installs the packages, which takes longer")
        status, output = _run([*pip, lock])
    else:
        settings = index_settings.configured(python=sys.executable)
        words: list[str | Path] = [uv, "pip", "install", "--require-hashes", "--python", python]
        status, output = _run([*words, *settings.uv_arguments(), "--requirement", lock], settings.uv_environment())
    if status:
        _tell(f"x the packages of {lock.name} could not be installed: the lines above are the reason")
        advice = remedy(output, "check the package index that `python3 -m pip config list` prints")
        _tell(f"  try: {advice}; the next ./doit starts over")
        return 1
    (folder / "python.txt").write_text(os.environ.get("VOLTFORGE_PYTHON", ""))
    shutil.copyfile(lock, folder / lock.name)
    _tell(f"* .venv is ready after {time.monotonic() - start:.0f} s")
    return 0


def requirement(name: str, lock: str) -> str:
    """Return the lines of one package in a lock: its pin and its hashes; empty if the lock does not have it."""
    match = re.search(rf"^{re.escape(name)}==.*\n(?:[ \t].*\n?)*", lock, re.MULTILINE)
    return match[0] if match else ""


def _pip(python: Path) -> list[str | Path]:
    """Return the command of a pip that installs into the environment of ``python``.

    This Python's pip is used if it is new enough, because installing a pip into the environment takes seconds.
    """
    try:
        version = tuple(int(number) for number in re.findall(r"\d+", metadata.version("pip"))[:2])
    except metadata.PackageNotFoundError:
        version = ()
    if version >= FIRST_PIP:
        return [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([python, "-m", "ensurepip", "--default-pip"], stdout=subprocess.DEVNULL, check=True)
    return [python, "-m", "pip"]


def _run(words: list[str | Path], environ: dict[str, str] | None = None, *, quiet: bool = False) -> tuple[int, str]:
    """Run a program and print its lines, without uv's list of the installed packages; return its status and output."""
    lines = []
    with subprocess.Popen(
        words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout
        for line in child.stdout:
            lines.append(line)
            if not quiet and not re.match(r" [+-] ", line):
                _tell(f"  {line.strip()}")
    return child.returncode, "".join(lines)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(Path.cwd()))
    except KeyboardInterrupt:
        _tell("! interrupted: the next ./doit starts over")
        sys.exit(130)
    except (OSError, subprocess.CalledProcessError) as error:
        _tell(f"x .venv cannot be made: {error}")
        sys.exit(1)
