"""The rooms of voltforge and the imports between its modules, read from the source files."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]
"""The modules that each module imports, by dotted names."""


def read(root: Path) -> Graph:
    """Return the imports between the modules of ``voltforge/`` in the checkout at ``root``.

    Imports inside functions count; imports for type checkers alone do not.
    """
    modules = {_name(path, root): path for path in sorted((root / "voltforge").rglob("*.py"))}
    return {name: frozenset(_imports(path) & set(modules)) for name, path in modules.items()}


def room(module: str) -> str:
    """Return the room of a module: ``sources`` for ``voltforge.sources.fetch``; empty outside of rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) == 3 else ""


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each name: one above the highest floor that it imports from.

    Raises:
        graphlib.CycleError: the imports form a circle; the error names it.
    """
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph[name]), default=0)
    return found


def between_rooms(graph: Graph) -> dict[str, set[str]]:
    """Return the rooms that each room imports from."""
    rooms: dict[str, set[str]] = {room(module): set() for module in graph if room(module)}
    for module, imported in graph.items():
        if room(module):
            rooms[room(module)] |= {room(other) for other in imported} - {"", room(module)}
    return rooms


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
