"""Virtual environments that uv makes from a lock: exactly its packages, each file checked by hash."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging import tags
from uv import find_uv_bin

from voltforge.errors import VoltforgeError, remedy
from voltforge.sources import locks
from voltforge.sources.index import Indexes
from voltforge.system import console, files
from voltforge.system.process import Completed, ProgramFailed, run
from voltforge.system.records import CheckoutPath


class InstallError(VoltforgeError):
    """A lock that cannot be installed; ``output`` holds the output of uv."""

    def __init__(self, lock: Path, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        first = next((number for number, line in enumerate(lines) if line.startswith(("error:", "×"))), -6)
        super().__init__(
            f"{lock.name} could not be installed: {' '.join(lines[first:])[:800]}",
            hint=remedy(output, "./doit doctor checks the package index; ./doit lock writes the locks anew"),
        )
        self.lock = lock
        self.output = output


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the packages of a lock."""

    path: CheckoutPath

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Its folder of installed packages."""
        return self.path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def interpreter() -> str:
    """Return implementation and version of the running Python, which environments use: ``cpython-3.11.7``."""
    return f"{platform.python_implementation().lower()}-{platform.python_version()}"


def python_tag() -> str:
    """Return the running Python as a wheel tag (PEP 425): ``cp311``."""
    return f"{tags.interpreter_name()}{tags.interpreter_version()}"


def create(lock: Path, path: Path, indexes: Indexes, *, offline: bool = False) -> Environment:
    """Make an environment at ``path`` with the packages of ``lock``, complete or not at all.

    The environment works at any path, in a sandbox as well: its scripts find the interpreter beside them.

    Raises:
        InstallError: a file of the lock cannot be fetched, or its hash does not match.
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
        install(lock, Environment(beside), indexes, offline=offline)
    return Environment(path)


def install(
    lock: Path, environment: Environment, indexes: Indexes, *, offline: bool = False, sdists: bool = False
) -> None:
    """Install the packages of ``lock`` into an environment.

    With ``sdists`` a package without a wheel is built from its sdist, by a setuptools that the environment has.

    Raises:
        InstallError: as :func:`create`.
    """
    _install(lock, ["--python", environment.python], indexes, offline, sdists=sdists)


def install_into(lock: Path, folder: Path, indexes: Indexes, *, offline: bool = False, python: str = "") -> None:
    """Install the packages of ``lock`` into ``folder``, without an interpreter.

    ``python="3.12"`` installs for another Python version than the running one.

    Raises:
        InstallError: as :func:`create`.
    """
    other = ["--python-version", python] if python else []
    _install(lock, ["--target", folder, "--python", sys.executable, *other], indexes, offline)


def install_wheel(environment: Environment, wheel: Path) -> None:
    """Install a wheel into an environment, without its requirements.

    Raises:
        InstallError: uv refuses the wheel.
    """
    run_uv(wheel, ["pip", "install", "--no-deps", "--no-index", "--offline", "--python", environment.python, wheel])


def unmet_requirements(environment: Environment) -> list[str]:
    """Return a line of uv's output for each requirement of an installed package that is not met."""
    output = run([find_uv_bin(), "pip", "check", "--python", environment.python], ok=(0, 1)).output
    return [line.strip() for line in output.splitlines() if line.startswith("The package")]


def lock(root: Path, wanted: Path, locked: Path, indexes: Indexes) -> None:
    """Resolve the requirements in ``wanted`` for Python 3.10 and later and pin them, with hashes, in ``locked``.

    Both paths are passed to uv relative to ``root``. Only the default index is used: other machines have other folders
    and extra indexes, and the lock must install there too.

    Raises:
        InstallError: the requirements have no solution.
    """
    alone = replace(indexes, extra=(), find_links=())
    words = ["pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--generate-hashes", "--upgrade",
             "--custom-compile-command", "./doit lock", "--no-emit-index-url", "--no-emit-find-links"]  # fmt: skip
    names = wanted.relative_to(root), "--output-file", locked.relative_to(root)
    run_uv(wanted, [*words, *alone.uv_arguments(), *names], alone, root)


def run_uv(
    lock: Path, words: Sequence[str | Path], indexes: Indexes | None = None, folder: Path | None = None
) -> Completed:
    """Run uv with the machine's index settings and show its latest line of output.

    Raises:
        InstallError: uv failed; the error names ``lock``.
    """
    environment = indexes.uv_environment() if indexes else None
    with console.progress(lock.name) as tell:
        try:
            return run(
                [find_uv_bin(), *words], cwd=folder, env=environment, watch=lambda line, _: tell(line) if line else None
            )
        except ProgramFailed as error:
            raise InstallError(lock, error.output or error.what) from error


def _install(lock: Path, where: Sequence[str | Path], indexes: Indexes, offline: bool, *, sdists: bool = False) -> None:
    kinds = ["--no-build-isolation"] if sdists else ["--only-binary", ":all:"]
    words: list[str | Path] = ["pip", "install", "--no-deps", "--require-hashes", *kinds, *where]
    words += [*indexes.uv_arguments(), *(["--offline"] if offline else [])]
    try:
        run_uv(lock, [*words, "--requirements", lock], indexes)
    except InstallError as error:
        missing = list(_missing(lock, words, indexes)) if offline else []
        if not missing:
            raise
        reason = f"VOLTFORGE_OFFLINE forbids downloads, and uv's cache lacks {', '.join(missing)}"
        raise InstallError(lock, reason) from error


def _missing(lock: Path, words: Sequence[str | Path], indexes: Indexes) -> Iterator[str]:
    """Yield the pins of a lock that cannot be installed; uv's own error names only the first."""
    try:
        pins = locks.read(lock)
    except locks.LockError:
        return  # uv's error names the malformed line
    with tempfile.TemporaryDirectory() as scratch:
        single = Path(scratch, lock.name)
        for pin in pins:
            files.write(single, pin.text)
            try:
                run_uv(lock, [*words, "--dry-run", "--requirements", single], indexes)
            except InstallError:
                yield f"{pin.name}=={pin.version}"
