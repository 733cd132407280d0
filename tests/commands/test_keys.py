"""`./doit key`: the key is made once, and signs the wheels of the wheelhouse."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import samples
from voltforge.commands.keys import show_key
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files
from voltforge.wheel import provenance, signing


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the settings folder of a person who has none yet."""
    for name in ("VOLTFORGE_KEY", "VOLTFORGE_TRUSTED", "VOLTFORGE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings" / "voltforge"


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def wheel_in_wheelhouse(pipeline: Pipeline, folder: Path) -> Path:
    """Put a wheel with receipt and provenance into the wheelhouse, as a build does."""
    content = {"saxpy/__init__.py": "", "saxpy-1.0.dist-info/sboms/saxpy.cdx.json": "{}"}
    path, house = samples.wheel(folder, content, name="saxpy"), pipeline.wheelhouse
    results = {**house.entry(path), "build_key": "1" * 64, "materials": [{"name": "a.c", "kind": "source"}]}
    statement = provenance.statement({"stage": "wheels:saxpy", "key": "2" * 64, "inputs": {}, "results": results})
    house.add(path, statement)
    results["statement"] = files.sha256_bytes(statement)
    files.write_json(house.receipt("saxpy", "cp311"), {"results": results})
    return house.path / path.name


def test_first_call_makes_a_key_and_signs_the_wheelhouse(
    saxpy: Pipeline, tmp_path: Path, settings: Path, capsys
) -> None:
    wheel = wheel_in_wheelhouse(saxpy, tmp_path / "made")
    show_key(saxpy)
    signer = signing.Signer.load(settings / "key.pem")
    assert saxpy.signer == signer
    assert saxpy.wheelhouse.wheel_problems(saxpy.wheelhouse.wheels()[0], saxpy.trust) == ([], "a trusted key")
    output = printed(capsys)
    assert f"signed {wheel.name}" in output
    assert signer.public in output
    (tmp_path / "theirs.pem").write_text(output)  # the output is a valid file of trusted keys
    assert signing.Trust.load(tmp_path / "theirs.pem") == signing.Trust.of(signer)
    show_key(saxpy)
    assert signing.Signer.load(settings / "key.pem") == signer
