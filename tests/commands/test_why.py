"""`./doit why`: the changed inputs of a stage."""

from __future__ import annotations

import pytest

from voltforge.commands.why import explain
from voltforge.errors import VoltforgeError
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def why(pipeline: Pipeline, *names: str) -> None:
    again = Pipeline.load(pipeline.root, pipeline.settings)
    explain(again, RuntimeImage(again), *names)


def patched(pipeline: Pipeline, line: str) -> None:
    files.write(
        pipeline.root / "patches" / "saxpy" / "0001-say-more.patch",
        f"Subject: say more\n---\n--- a/saxpy/__init__.py\n+++ b/saxpy/__init__.py\n@@ -1 +1,2 @@\n"
        f' """A small CUDA extension."""\n+# {line}\n',
    )


def run(pipeline: Pipeline, *kinds: str) -> None:
    for kind in kinds:
        pipeline.package(pipeline.recipes["saxpy"]).stages[kind].run()


def test_changed_patch_is_shown_with_old_and_new_hash(saxpy: Pipeline, capsys) -> None:
    patched(saxpy, "one")
    run(saxpy, "fetch", "tree")
    why(saxpy, "tree:saxpy")
    assert printed(capsys).endswith("* tree:saxpy\n  nothing changed\n")
    before, series = (saxpy.scratch / "stages" / "tree-saxpy.json").read_bytes(), saxpy.root / "patches" / "saxpy"
    old = files.sha256(series / "0001-say-more.patch")
    patched(saxpy, "two")
    why(saxpy, "tree:saxpy")
    table = printed(capsys)
    new = files.sha256(series / "0001-say-more.patch")
    assert [word in table for word in ("patches.0001-say-more.patch", old[:20], new[:20])] == [True] * 3
    assert (saxpy.scratch / "stages" / "tree-saxpy.json").read_bytes() == before  # asking changes no record


def test_missing_or_damaged_result_is_a_reason(saxpy: Pipeline, capsys) -> None:
    why(saxpy, "fetch:saxpy", "build:saxpy")
    assert printed(capsys).count("it has not run here, or did not finish") == 2
    run(saxpy, "fetch", "tree")
    file = next((saxpy.scratch / "trees" / "saxpy").rglob("*.cu"))
    file.write_bytes(file.read_bytes()[:-1])
    why(saxpy, "tree:saxpy")
    assert "a file that it made is missing or was changed" in printed(capsys)


def test_why_without_names_explains_all_wheels(saxpy: Pipeline, capsys) -> None:
    why(saxpy)
    assert printed(capsys).splitlines() == ["* wheels:saxpy", "  it has not run here, or did not finish"]


def test_unknown_stage_is_an_error_that_lists_the_stages(saxpy: Pipeline) -> None:
    with pytest.raises(VoltforgeError, match="wheels:saxy: no such stage") as caught:
        why(saxpy, "wheels:saxy")
    assert "wheels:saxpy" in caught.value.hint
