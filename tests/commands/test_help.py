"""`./doit help`: tasks and variables, in the words of dodo.py and of Settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT
from voltforge.commands import __main__, help
from voltforge.pipeline.checkout import Settings


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"]])
def test_help_lists_every_task_variable_and_example(words, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert __main__.main(words) == 0
    output = capsys.readouterr().out
    assert all(f" {task} " in output for task in help.tasks(ROOT))
    assert all(f" {field.name}= " in output for field in fields(Settings))
    assert all(example in output for example, _ in help.EXAMPLES)


@pytest.mark.parametrize("words", [["wheels", "--help"], ["help", "wheels:vllm"], ["jobs=1", "wheels", "-h"]])
def test_help_of_a_task_lists_that_task_and_the_variables(words, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert __main__.main(words) == 0
    output = capsys.readouterr().out
    assert help.tasks(ROOT)["wheels"] in output
    assert help.tasks(ROOT)["gc"] not in output
    assert " jobs= " in output


def test_help_of_an_unknown_task_names_the_nearest_and_lists_all(capsys) -> None:
    assert help.print_help(ROOT, ["weels"]) == 0
    output = capsys.readouterr().out
    assert "weels is not a task; did you mean wheels?" in output
    assert help.tasks(ROOT)["gc"] in output


def test_every_task_and_variable_has_a_docstring() -> None:
    assert all(help.tasks(ROOT).values())
    assert [name for name, _, text in help.variables() if text] == [f"{field.name}=" for field in fields(Settings)]


def test_help_does_not_load_the_recipes(tmp_path: Path, capsys) -> None:
    (tmp_path / "dodo.py").write_text('raise SystemExit\n\n\ndef task_one_two():\n    """do one thing"""\n')
    assert help.tasks(tmp_path) == {"one-two": "do one thing"}
