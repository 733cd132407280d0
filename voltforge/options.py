"""The variables that a source tree declares, so that a recipe's misspelt one is refused and not silently ignored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from voltforge.errors import VoltforgeError, listed
from voltforge.recipe import SourceRecipe

_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_CMAKE = re.compile(
    rf"\b(?:option|cmake_dependent_option)\s*\(\s*({_NAME})"  # cmake-commands(7)
    rf"|\bset\s*\(\s*({_NAME})\s[^()]*\bCACHE\b"
    rf"|\bENV\{{({_NAME})\}}",
    re.IGNORECASE,
)
_CMAKE_COMMENT = re.compile(r"#\[(=*)\[.*?\]\1\]|#[^\n]*", re.DOTALL)
_PYTHON = re.compile(rf"[\"']({_NAME})[\"']|^#\s+({_NAME})(?:=\S*)?$", re.MULTILINE)
"""A name in quotes, as os.getenv() and lists of options have it; or one alone on a line of the comment at the top."""


class OptionError(VoltforgeError):
    """Variables of a recipe that the source does not know; ``unknown`` holds each with the nearest that it knows."""

    def __init__(self, recipe: SourceRecipe, unknown: dict[str, list[str]]) -> None:
        lines = [f"{name}{f', perhaps meant for {near[0]}' if near else ''}" for name, near in unknown.items()]
        super().__init__(
            f"{recipe.path.name} sets variables that {recipe.name} {recipe.version} does not know:{listed(lines)}",
            hint=f"mend [build.env]; what it knows stands in its {', '.join(recipe.build.options)}",
        )
        self.unknown = unknown


def declared(tree: Path, patterns: Iterable[str]) -> frozenset[str]:
    """The names that the files of a tree declare or read.

    Of CMake files: options, cached variables and environment variables. Of Python files: names in quotes, and those
    alone on a comment's line, as setup.py lists them at its top.
    """
    found: set[str] = set()
    for path in sorted({path for pattern in patterns for path in tree.glob(pattern)}):
        text = path.read_text(encoding="utf-8", errors="replace")
        pattern = _PYTHON
        if path.suffix != ".py":
            pattern, text = _CMAKE, _CMAKE_COMMENT.sub("", text)
        found.update(name for match in pattern.finditer(text) for name in match.groups() if name)
    return frozenset(found)


def check(recipe: SourceRecipe, tree: Path) -> None:
    """Hold the recipe's variables to those that the tree declares, if the recipe says where it does.

    Raises:
        OptionError: there are others; it names all of them.
    """
    if not recipe.build.options:
        return
    known = declared(tree, recipe.build.options)
    unknown = {name: get_close_matches(name, known, 1) for name in recipe.build.env if name not in known}
    if unknown:
        raise OptionError(recipe, unknown)
