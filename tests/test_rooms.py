"""The rooms of voltforge: each imports only from rooms below it, and no imports form a circle."""

from __future__ import annotations

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT

ORDER = (("commands",), ("image",), ("gpu",), ("pipeline",), ("wheel", "compile"), ("sources", "binary"), ("system",))
"""The rooms from top to bottom. Rooms of one level do not import each other."""
LEVELS = {room: level for level, rooms in enumerate(reversed(ORDER)) for room in rooms}
FLOORS = 6
"""The most floors that the imports inside one room may have."""


def module(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in sorted((ROOT / "voltforge").rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of voltforge that a module imports, inside functions too, but not for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "voltforge":
            found |= {submodule if (submodule := f"{node.module}.{alias.name}") in MODULES else node.module
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "voltforge"}
    return found & set(MODULES)


GRAPH = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    """The room of a module; empty for the modules that belong to none, ``voltforge`` and ``voltforge.errors``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else ""


def test_every_folder_of_voltforge_is_a_room_of_the_order() -> None:
    assert {path.parent.name for path in (ROOT / "voltforge").glob("*/__init__.py")} == set(LEVELS)


@pytest.mark.parametrize("name", LEVELS)
def test_a_room_says_in_one_sentence_what_it_is_for(name: str) -> None:
    sentence = importlib.import_module(f"voltforge.{name}").__doc__
    assert sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_no_room_imports_from_a_room_above_or_beside_it() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if room(other) and room(name) != room(other) and LEVELS.get(room(name), -1) <= LEVELS[room(other)]
    ]
    assert upwards == []


def test_the_modules_outside_of_rooms_import_no_room() -> None:
    outside = {"voltforge", "voltforge.errors"}
    assert {other for name in outside for other in GRAPH[name]} <= outside


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each name: one above the highest that it imports. Raises CycleError, which names a circle."""
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph[name]), default=0)
    return found


def test_imports_form_no_circle() -> None:
    assert floors(GRAPH)


@pytest.mark.parametrize("name", LEVELS)
def test_the_modules_of_a_room_have_few_floors(name: str) -> None:
    modules = {one for one in GRAPH if room(one) == name}
    assert max(floors({one: GRAPH[one] & modules for one in modules}).values()) <= FLOORS


def test_the_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders >= set(LEVELS)
    tested = {(path.parent.name, path.stem.removeprefix("test_")) for path in (ROOT / "tests").glob("*/test_*.py")}
    strangers = {f"{folder}/test_{name}.py" for folder, name in tested if folder in LEVELS}
    known = {f"{room(name)}/test_{name.split('.')[-1]}.py" for name in MODULES if room(name)}
    assert strangers <= known, "a test file without its module"


def test_importing_voltforge_has_no_side_effects() -> None:
    statements = ast.parse(MODULES["voltforge"].read_text()).body
    allowed = (ast.Assign, ast.AnnAssign, ast.Expr)
    assert all(isinstance(statement, allowed) for statement in statements)
    expressions = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
    assert all(isinstance(expression, ast.Constant) for expression in expressions)
