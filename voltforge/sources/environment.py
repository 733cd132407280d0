"""A locked Python environment: exactly the files that a lock names, by hash, made by uv."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging import tags
from uv import find_uv_bin

from voltforge.errors import VoltforgeError, remedy
from voltforge.sources.index import Indexes
from voltforge.system import console, files
from voltforge.system.process import Completed, ProgramFailed, run
from voltforge.system.records import CheckoutPath


class InstallError(VoltforgeError):
    """A lock that cannot be installed; ``output`` holds what uv said."""

    def __init__(self, lock: Path, output: str) -> None:
        said = [line.strip() for line in output.splitlines() if line.strip()]
        first = next((number for number, line in enumerate(said) if line.startswith(("error:", "×"))), -6)
        super().__init__(
            f"{lock.name} could not be installed: {' '.join(said[first:])[:800]}",
            hint=remedy(
                output, "./doit doctor asks whether the package index can be reached; ./doit lock makes the locks anew"
            ),
        )
        self.lock = lock
        self.output = output


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds what one lock names."""

    path: CheckoutPath

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """The folder that its packages are installed in."""
        return self.path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def interpreter() -> str:
    """Which Python environments are made with: the one that runs, as ``cpython-3.11.7``."""
    return f"{platform.python_implementation().lower()}-{platform.python_version()}"


def python_tag() -> str:
    """The same as wheels' tags have it (PEP 425): ``cp311``."""
    return f"{tags.interpreter_name()}{tags.interpreter_version()}"


def create(lock: Path, path: Path, indexes: Indexes, *, offline: bool = False) -> Environment:
    """A new environment at ``path`` with what ``lock`` names, complete or not at all.

    It can be moved (and seen at another path by a sandbox): its scripts find their interpreter beside them.

    Raises:
        InstallError: a file of the lock cannot be had, or has another hash.
    """
    with files.replacing_folder(path) as beside:
        run_uv(
            lock,
            [
                "venv",
                "--quiet",
                "--allow-existing",
                "--relocatable",
                "--no-project",
                "--python",
                sys.executable,
                beside,
            ],
        )
        _install(lock, ["--python", Environment(beside).python], indexes, offline)
    return Environment(path)


def install_into(lock: Path, folder: Path, indexes: Indexes, *, offline: bool = False, python: str = "") -> None:
    """Put the packages that ``lock`` names into ``folder``, without an interpreter around them.

    They are for the Python that runs, or for another version of it: ``python="3.12"``.

    Raises:
        InstallError: as :func:`create`.
    """
    other = ["--python-version", python] if python else []
    _install(lock, ["--target", folder, "--python", sys.executable, *other], indexes, offline)


def install_wheel(environment: Environment, wheel: Path) -> None:
    """Install one wheel into an environment, without what it requires.

    Raises:
        InstallError: uv refuses the wheel.
    """
    run_uv(wheel, ["pip", "install", "--no-deps", "--no-index", "--offline", "--python", environment.python, wheel])


def unmet_requirements(environment: Environment) -> list[str]:
    """The requirements of installed packages that the environment does not meet, in uv's words."""
    output = run([find_uv_bin(), "pip", "check", "--python", environment.python], ok=(0, 1)).output
    return [line.strip() for line in output.splitlines() if line.startswith("The package")]


def lock(root: Path, wanted: Path, locked: Path, indexes: Indexes) -> None:
    """Resolve the requirements in ``wanted`` for Python 3.10 and later and pin them, with hashes, in ``locked``.

    Both are named relative to ``root``. Only the default index is asked: a lock must hold on other machines, which
    have other folders and extra indexes.

    Raises:
        InstallError: there is no solution.
    """
    alone = replace(indexes, extra=(), find_links=())
    words = ["pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--generate-hashes", "--upgrade",
             "--custom-compile-command", "./doit lock", "--no-emit-index-url", "--no-emit-find-links"]  # fmt: skip
    names = wanted.relative_to(root), "--output-file", locked.relative_to(root)
    run_uv(wanted, [*words, *alone.uv_arguments(), *names], alone, root)


def run_uv(
    lock: Path, words: Sequence[str | Path], indexes: Indexes | None = None, folder: Path | None = None
) -> Completed:
    """Run uv with the configuration of the machine's indexes.

    Raises:
        InstallError: it failed; ``lock`` is what the error names.
    """
    environment = indexes.uv_environment() if indexes else None
    with console.progress(lock.name) as tell:
        try:
            return run(
                [find_uv_bin(), *words], cwd=folder, env=environment, watch=lambda line, _: tell(line) if line else None
            )
        except ProgramFailed as error:
            raise InstallError(lock, error.output or error.what) from error


def _install(lock: Path, where: Sequence[str | Path], indexes: Indexes, offline: bool) -> None:
    words: list[str | Path] = ["pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:", *where]
    words += [*indexes.uv_arguments(), *(["--offline"] if offline else [])]
    try:
        run_uv(lock, [*words, "--requirements", lock], indexes)
    except InstallError as error:
        absent = list(_absent(lock, words, indexes)) if offline else []
        if not absent:
            raise
        said = f"VOLTFORGE_OFFLINE forbids to fetch, and uv's cache lacks {', '.join(absent)}"
        raise InstallError(lock, said) from error


def _absent(lock: Path, words: Sequence[str | Path], indexes: Indexes) -> Iterator[str]:
    """The pins of a lock that cannot be installed; uv itself names only the first."""
    with tempfile.TemporaryDirectory() as scratch:
        single = Path(scratch, lock.name)
        for pin in re.findall(r"^[\w.-]+==.*(?:\n +--hash=.*)*", lock.read_text(encoding="utf-8"), re.MULTILINE):
            files.write(single, f"{pin}\n")
            try:
                run_uv(lock, [*words, "--dry-run", "--requirements", single], indexes)
            except InstallError:
                yield pin.split()[0]
