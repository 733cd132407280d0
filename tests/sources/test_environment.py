"""An environment holds exactly what its lock names, by hash, and appears whole or not at all."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.support.checkouts import ROOT
from tests.support.samples import wheel
from voltforge.sources import environment, locks
from voltforge.sources.environment import Environment, InstallError
from voltforge.sources.index import Indexes, configured
from voltforge.system import files

LOCKS = sorted((ROOT / "recipes" / "locks").glob("*.txt"))


@pytest.fixture
def greeting(tmp_path: Path) -> Path:
    content: dict[str, str | bytes | Path] = {"greeting.py": "word = 'hello'\n"}
    return wheel(tmp_path / "index", content, name="greeting", metadata="Requires-Dist: companion==2\n")


@pytest.fixture
def indexes(greeting: Path) -> Indexes:
    """A machine whose only index is a folder with one wheel."""
    return Indexes(default=None, find_links=(str(greeting.parent),))


@pytest.fixture
def lock(tmp_path: Path, greeting: Path) -> Path:
    path = tmp_path / "greeting.txt"
    path.write_text(f"greeting==1.0 --hash=sha256:{files.sha256(greeting)}\n")
    return path


def test_environment_holds_exactly_the_packages_of_its_lock(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    made = environment.create(lock, tmp_path / "environment", indexes, offline=True)
    said = subprocess.run([made.python, "-c", "import greeting; print(greeting.word)"], capture_output=True, text=True)
    assert said.stdout == "hello\n"
    assert [path.name for path in made.site_packages.glob("*.dist-info")] == ["greeting-1.0.dist-info"]


def test_moved_environment_works(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    made = environment.create(lock, tmp_path / "environment", indexes, offline=True)
    moved = Environment(made.path.rename(tmp_path / "elsewhere"))
    assert subprocess.run([moved.python, "-c", "import greeting"]).returncode == 0


def test_files_are_hard_links_into_the_cache_of_uv(
    lock: Path, indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is beside it here: across file systems nothing can be linked."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("UV_LINK_MODE", raising=False)
    made = environment.create(lock, tmp_path / "environment", indexes, offline=True)
    installed = (made.site_packages / "greeting.py").stat()
    cached = [path.stat().st_ino for path in (tmp_path / "cache").rglob("greeting.py")]
    assert cached == [installed.st_ino]
    assert installed.st_nlink == 2


def test_wrong_hash_is_refused_and_leaves_no_environment(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    lock.write_text(re.sub("sha256:.*", f"sha256:{'0' * 64}", lock.read_text()))
    with pytest.raises(InstallError, match=r"greeting\.txt could not be installed: .*[Hh]ash"):
        environment.create(lock, tmp_path / "environment", indexes)
    assert not (tmp_path / "environment").exists()
    assert not list(tmp_path.glob(".environment*"))


def test_requirement_without_a_hash_is_refused(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    lock.write_text("greeting==1.0\n")
    with pytest.raises(InstallError):
        environment.create(lock, tmp_path / "environment", indexes, offline=True)


def test_error_names_a_project_that_no_index_has(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    lock.write_text(f"nobody-has-this==1 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(InstallError, match="nobody-has-this"):
        environment.create(lock, tmp_path / "environment", indexes, offline=True)


def test_offline_error_names_all_missing_packages(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    absent = [f"nobody-has-{name}==1 \\\n    --hash=sha256:{'0' * 64}\n    # via x\n" for name in ("this", "that")]
    lock.write_text(lock.read_text() + "".join(absent))
    with pytest.raises(InstallError, match="cache lacks nobody-has-this==1, nobody-has-that==1"):
        environment.create(lock, tmp_path / "environment", indexes, offline=True)


def test_packages_are_installed_without_an_interpreter(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    environment.install_into(lock, tmp_path / "folder", indexes, offline=True)
    assert (tmp_path / "folder" / "greeting.py").is_file()
    assert not (tmp_path / "folder" / "pyvenv.cfg").exists()


def test_unmet_requirements_are_lines_of_uv(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    made = environment.create(lock, tmp_path / "environment", indexes, offline=True)
    (unmet,) = environment.unmet_requirements(made)
    assert "greeting" in unmet
    assert "companion==2" in unmet
    environment.install_wheel(made, wheel(tmp_path / "other", {"companion.py": ""}, name="companion", version="2"))
    assert environment.unmet_requirements(made) == []


def test_broken_wheel_is_refused_with_its_name(lock: Path, indexes: Indexes, tmp_path: Path) -> None:
    made = environment.create(lock, tmp_path / "environment", indexes, offline=True)
    (broken := tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(InstallError, match=r"broken-1\.0-py3-none-any\.whl could not be installed"):
        environment.install_wheel(made, broken)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locks_of_the_recipes_pin_every_requirement_with_hashes(path: Path) -> None:
    names = {pin.name for pin in locks.read(path)}  # refuses a pin without hashes
    requirements = re.findall(r"^([A-Za-z][\w.-]*)", path.with_suffix(".in").read_text(), re.MULTILINE)
    assert requirements
    assert {canonicalize_name(name) for name in requirements} <= names


@pytest.mark.slow
def test_lock_covers_all_pythons_with_hashes_and_names_no_index(tmp_path: Path) -> None:
    wanted, locked = tmp_path / "small.in", tmp_path / "small.txt"
    wanted.write_text("tomli; python_version < '3.11'\niniconfig\n")
    environment.lock(tmp_path, wanted, locked, configured())
    text = locked.read_text()
    assert re.search(r"^tomli==\S+ ; python_full_version < '3.11'", text, re.MULTILINE)
    assert re.search(r"^iniconfig==", text, re.MULTILINE)
    assert text.count("--hash=sha256:") > 2
    assert "://" not in text
