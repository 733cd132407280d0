"""`./doit push`: signed wheels are uploaded to the shared cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.test_keys import settings, wheel_in_wheelhouse  # noqa: F401 - a fixture
from voltforge.commands.keys import show_key
from voltforge.commands.push import push_wheels
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline


def test_signed_wheel_is_uploaded_once(saxpy: Pipeline, tmp_path: Path, monkeypatch, capsys) -> None:
    wheel = wheel_in_wheelhouse(saxpy, tmp_path / "made")
    with pytest.raises(VoltforgeError, match="VOLTFORGE_CACHE names no shared cache"):
        push_wheels(saxpy)
    monkeypatch.setenv("VOLTFORGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VoltforgeError, match="the statement is not signed") as caught:
        push_wheels(saxpy)
    assert caught.value.hint.startswith("./doit key")
    show_key(saxpy)
    push_wheels(saxpy)
    push_wheels(saxpy)
    output = capsys.readouterr().out
    assert f"{wheel.name}: uploaded to {tmp_path}" in output
    assert f"{wheel.name}: already in {tmp_path}" in output
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("*.whl")] == [wheel.read_bytes()]


def test_push_of_an_empty_wheelhouse_is_an_error(saxpy: Pipeline, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VOLTFORGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VoltforgeError, match="the wheelhouse holds no wheel to push"):
        push_wheels(saxpy)
