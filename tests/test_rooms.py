"""The rooms of voltforge: each imports only from rooms below it, and no imports form a circle."""

from __future__ import annotations

import ast
import importlib
from itertools import chain

import pytest

from tests.support import rooms
from tests.support.checkouts import ROOT
from tests.support.rooms import room

ORDER = (("commands",), ("image",), ("gpu",), ("pipeline",), ("wheel", "compile"), ("sources", "binary"), ("system",))
"""The rooms from top to bottom. Rooms of one level do not import each other."""
LEVELS = {name: level for level, names in enumerate(reversed(ORDER)) for name in names}
FLOORS = 6
"""The most floors that the imports inside one room may have."""
GRAPH = rooms.read(ROOT)


def test_every_folder_of_voltforge_is_a_room_of_the_order() -> None:
    assert {path.parent.name for path in (ROOT / "voltforge").glob("*/__init__.py")} == set(LEVELS)


@pytest.mark.parametrize("name", LEVELS)
def test_a_room_says_in_one_sentence_what_it_is_for(name: str) -> None:
    sentence = importlib.import_module(f"voltforge.{name}").__doc__
    assert sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_no_room_imports_from_a_room_above_or_beside_it() -> None:
    wrong = {
        name: others
        for name, others in rooms.between_rooms(GRAPH).items()
        if any(LEVELS[other] >= LEVELS[name] for other in others)
    }
    assert wrong == {}


def test_the_modules_outside_of_rooms_import_no_room() -> None:
    outside = {"voltforge", "voltforge.errors"}
    assert set(chain.from_iterable(GRAPH[name] for name in outside)) <= outside


def test_imports_form_no_circle() -> None:
    assert rooms.floors(GRAPH)


@pytest.mark.parametrize("name", LEVELS)
def test_the_modules_of_a_room_have_few_floors(name: str) -> None:
    modules = {module for module in GRAPH if room(module) == name}
    assert max(rooms.floors({module: GRAPH[module] & modules for module in modules}).values()) <= FLOORS


def test_every_test_file_of_a_room_has_its_module() -> None:
    tests = {(path.parent.name, path.stem.removeprefix("test_")) for path in (ROOT / "tests").glob("*/test_*.py")}
    modules = {(room(module), module.split(".")[-1]) for module in GRAPH if room(module)}
    assert {test for test in tests if test[0] in LEVELS} - modules == set()
    assert {folder for folder, _ in tests} >= set(LEVELS)


def test_importing_voltforge_has_no_side_effects() -> None:
    statements = ast.parse((ROOT / "voltforge/__init__.py").read_text()).body
    assert all(isinstance(statement, (ast.Assign, ast.Expr)) for statement in statements)
    expressions = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
    assert all(isinstance(expression, ast.Constant) for expression in expressions)
