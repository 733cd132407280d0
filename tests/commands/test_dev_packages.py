"""The packages of tests and benchmarks are installed into .venv once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import samples
from voltforge.commands import dev_packages
from voltforge.sources import environment, index
from voltforge.sources.index import Indexes
from voltforge.system import files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose requirements-dev.txt pins one wheel of a folder, and whose .venv has no package."""
    wheel = samples.wheel(tmp_path / "shelf", {"extra.py": "VALUE = 1"}, name="extra", version="1.0")
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "requirements-dev.txt").write_text(f"extra==1.0 --hash=sha256:{files.sha256(wheel)}\n")
    (tmp_path / "nothing.txt").touch()
    indexes = Indexes(None, find_links=(str(wheel.parent),))
    environment.create(tmp_path / "nothing.txt", root / ".venv", indexes)
    monkeypatch.setattr(index, "configured", lambda: indexes)
    return root


def packages(root: Path) -> list[str]:
    return [path.name for path in (root / ".venv").glob("lib/python*/site-packages/extra.py")]


def test_the_packages_are_installed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    dev_packages.install(root)
    assert packages(root) == ["extra.py"]
    monkeypatch.setattr(index, "configured", lambda: pytest.fail("nothing is to be installed"))
    dev_packages.install(root)


def test_a_python_outside_the_environment_is_left_alone(root: Path) -> None:
    dev_packages.install(root)
    assert packages(root) == []


def test_a_changed_lock_is_installed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    dev_packages.install(root)
    newer = samples.wheel(tmp_path / "newer", {"extra.py": "VALUE = 2"}, name="extra", version="2.0")
    newer.rename(tmp_path / "shelf" / newer.name)
    hashed = files.sha256(tmp_path / "shelf" / newer.name)
    (root / "requirements-dev.txt").write_text(f"extra==2.0 --hash=sha256:{hashed}\n")
    dev_packages.install(root)
    [path] = (root / ".venv").glob("lib/python*/site-packages/extra.py")
    assert path.read_text() == "VALUE = 2"
