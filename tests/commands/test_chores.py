"""What a person asks for beside the wheels: why something runs, the key, the shared cache, the garbage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import samples
from voltforge.commands import chores
from voltforge.errors import VoltforgeError
from voltforge.image.stages import Runtime
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files
from voltforge.wheel import provenance, signing


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person without settings: their folder."""
    for name in ("VOLTFORGE_KEY", "VOLTFORGE_TRUSTED", "VOLTFORGE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings" / "voltforge"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def why(pipeline: Pipeline, *names: str) -> None:
    again = Pipeline.load(pipeline.root, pipeline.settings)
    chores.why(again, Runtime(again), *names)


def patched(pipeline: Pipeline, line: str) -> None:
    files.write(
        pipeline.root / "patches" / "saxpy" / "0001-say-more.patch",
        f"Subject: say more\n---\n--- a/saxpy/__init__.py\n+++ b/saxpy/__init__.py\n@@ -1 +1,2 @@\n"
        f' """A small CUDA extension."""\n+# {line}\n',
    )


def run(pipeline: Pipeline, *kinds: str) -> None:
    for kind in kinds:
        pipeline.package(pipeline.recipes["saxpy"]).stages[kind].run()


def test_why_says_what_was_there_then_and_what_is_now(saxpy: Pipeline, capsys) -> None:
    patched(saxpy, "one")
    run(saxpy, "fetch", "tree")
    why(saxpy, "tree:saxpy")
    assert told(capsys).endswith("* tree:saxpy\n  nothing changed\n")
    before, series = (saxpy.scratch / "stages" / "tree-saxpy.json").read_bytes(), saxpy.root / "patches" / "saxpy"
    old = files.sha256(series / "0001-say-more.patch")
    patched(saxpy, "two")
    why(saxpy, "tree:saxpy")
    table = told(capsys)
    new = files.sha256(series / "0001-say-more.patch")
    assert [word in table for word in ("patches.0001-say-more.patch", old[:20], new[:20])] == [True] * 3
    assert (saxpy.scratch / "stages" / "tree-saxpy.json").read_bytes() == before  # to ask changes nothing


def test_why_knows_other_reasons_than_inputs(saxpy: Pipeline, capsys) -> None:
    why(saxpy, "fetch:saxpy", "build:saxpy")
    assert told(capsys).count("it has not run here, or was not finished") == 2
    run(saxpy, "fetch", "tree")
    file = next((saxpy.scratch / "trees" / "saxpy").rglob("*.cu"))
    file.write_bytes(file.read_bytes()[:-1])
    why(saxpy, "tree:saxpy")
    assert "what it made is gone, or not as it was" in told(capsys)


def test_why_of_nothing_is_of_all_wheels(saxpy: Pipeline, capsys) -> None:
    why(saxpy)
    assert told(capsys).splitlines() == ["* wheels:saxpy", "  it has not run here, or was not finished"]


def test_why_of_a_stage_that_there_is_not_names_those_that_there_are(saxpy: Pipeline) -> None:
    with pytest.raises(VoltforgeError, match="wheels:saxy: no such stage") as caught:
        why(saxpy, "wheels:saxy")
    assert "wheels:saxpy" in caught.value.hint


def kept(pipeline: Pipeline, folder: Path) -> Path:
    """A wheel in the wheelhouse with receipt and provenance, as if it had been built."""
    content = {"saxpy/__init__.py": "", "saxpy-1.0.dist-info/sboms/saxpy.cdx.json": "{}"}
    path, house = samples.wheel(folder, content, name="saxpy"), pipeline.wheelhouse
    results = {**house.entry(path), "build_key": "1" * 64, "materials": [{"name": "a.c", "kind": "source"}]}
    statement = provenance.statement({"stage": "wheels:saxpy", "key": "2" * 64, "inputs": {}, "results": results})
    house.add(path, statement)
    results["statement"] = files.sha256_bytes(statement)
    files.write_json(house.receipt("saxpy", "cp311"), {"results": results})
    return house.path / path.name


def test_the_first_call_makes_a_key_and_signs_what_is_here(
    saxpy: Pipeline, tmp_path: Path, settings: Path, capsys
) -> None:
    wheel = kept(saxpy, tmp_path / "made")
    chores.key(saxpy)
    signer = signing.Signer.load(settings / "key.pem")
    assert saxpy.signer == signer
    assert saxpy.wheelhouse.disagreements(saxpy.wheelhouse.wheels()[0], saxpy.trust) == ([], "a trusted key")
    said = told(capsys)
    assert f"signed {wheel.name}" in said
    assert signer.public in said
    (tmp_path / "theirs.pem").write_text(said)  # what is printed is a file of trusted keys
    assert signing.Trust.load(tmp_path / "theirs.pem") == signing.Trust.of(signer)
    chores.key(saxpy)
    assert signing.Signer.load(settings / "key.pem") == signer


def test_a_signed_wheel_is_given_to_the_cache_once(saxpy: Pipeline, tmp_path: Path, monkeypatch, capsys) -> None:
    wheel = kept(saxpy, tmp_path / "made")
    with pytest.raises(VoltforgeError, match="VOLTFORGE_CACHE names no shared cache"):
        chores.push(saxpy)
    monkeypatch.setenv("VOLTFORGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VoltforgeError, match="nobody has signed the statement") as caught:
        chores.push(saxpy)
    assert caught.value.hint.startswith("./doit key")
    chores.key(saxpy)
    chores.push(saxpy)
    chores.push(saxpy)
    said = told(capsys)
    assert f"{wheel.name}: given to {tmp_path}" in said
    assert f"{wheel.name}: is in {tmp_path}" in said
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("*.whl")] == [wheel.read_bytes()]


def test_there_is_nothing_to_give_in_an_empty_wheelhouse(saxpy: Pipeline, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VOLTFORGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VoltforgeError, match="the wheelhouse has nothing to give"):
        chores.push(saxpy)


def test_garbage_is_listed_and_only_removed_when_that_is_said(saxpy: Pipeline, capsys) -> None:
    stale = saxpy.scratch / "trees" / "gone" / "old.c"
    files.write(stale, b"0" * 5000)
    chores.collect_garbage(saxpy, Runtime(saxpy))
    assert "trees/gone" in told(capsys)
    assert stale.exists()
    for choice, gone in (("yes", False), ("delete", True)):
        again = Pipeline.load(saxpy.root, type(saxpy.settings)(gc=choice))
        try:
            chores.collect_garbage(again, Runtime(again))
        except VoltforgeError as error:
            assert error.what == "gc=yes is no choice"  # noqa: PT017 - one of the two
        assert stale.exists() != gone
    assert os.listdir(saxpy.scratch / "toolchains")
