"""The variables of a build: those that a source tree declares, and what it made of those that it was given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from voltforge.errors import VoltforgeError, listed
from voltforge.sources.recipe import SourceRecipe
from voltforge.system import programs
from voltforge.system.process import run

_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_CMAKE = re.compile(
    rf"\b(?:option|cmake_dependent_option)\s*\(\s*({_NAME})"  # cmake-commands(7)
    rf"|\bset\s*\(\s*({_NAME})\s[^()]*\bCACHE\b"
    rf"|\bENV\{{({_NAME})\}}",
    re.IGNORECASE,
)
_CMAKE_COMMENT = re.compile(r"#\[(=*)\[.*?\]\1\]|#[^\n]*", re.DOTALL)
_PYTHON = re.compile(r"[\"']([A-Z][A-Z0-9_]{2,})[\"']|^#\s+([A-Z][A-Z0-9_]{2,})(?:=\S*)?$", re.MULTILINE)
"""A name in quotes, as os.getenv() and lists of options have it; or one alone on a line of the comment at the top."""
_SUMMARY = re.compile(r"--\s+([A-Z][A-Z0-9_]+)\s+: (\S+)\s*$")
"""A line of the summary that PyTorch's cmake/Summary.cmake prints, and others after its model."""
_ON, _OFF = ("1", "ON", "TRUE", "YES", "Y"), ("0", "OFF", "FALSE", "NO", "N")


class OptionError(VoltforgeError):
    """Variables of a recipe that the source does not know; ``unknown`` holds each with the nearest that it knows."""

    def __init__(self, recipe: SourceRecipe, unknown: dict[str, list[str]]) -> None:
        lines = [f"{name}{f', perhaps meant for {near[0]}' if near else ''}" for name, near in unknown.items()]
        super().__init__(
            f"{recipe.path.name} sets variables that {recipe.name} {recipe.version} does not know:{listed(lines)}",
            hint=f"mend [build.env]; what it knows stands in its {', '.join(recipe.build.options)}",
        )
        self.unknown = unknown


def declared_variables(tree: Path, patterns: Iterable[str]) -> frozenset[str]:
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


def check_variables(recipe: SourceRecipe, tree: Path) -> None:
    """Hold the recipe's variables to those that the tree declares, if the recipe says where it does.

    Raises:
        OptionError: there are others; it names all of them.
    """
    if not recipe.build.options:
        return
    known = declared_variables(tree, recipe.build.options) | _cmakes_own()
    unknown = {name: get_close_matches(name, known, 1) for name in recipe.build.env if name not in known}
    if unknown:
        raise OptionError(recipe, unknown)


def same_value(one: str, other: str) -> bool:
    """Whether two values say the same, as CMake takes them (cmake-language(7)): ``1`` and ``ON`` do."""
    values = [value.upper() for value in (one, other)]
    if all(value in _ON + _OFF for value in values):
        return (values[0] in _ON) == (values[1] in _ON)
    return values[0] == values[1]


def contradiction(line: str, wanted: Mapping[str, str]) -> str:
    """What is wrong if a line of a build's log says that it was configured otherwise than ``wanted``, else nothing.

    A library that is not found is switched off with a warning at most, hours before that shows in the wheel.
    CMake's own variables are not looked at: projects add to paths and flags.
    """
    match = _SUMMARY.match(line)
    if not match or match[1] not in wanted or match[1].startswith("CMAKE_") or same_value(wanted[match[1]], match[2]):
        return ""
    return f"configured with {match[1]}={match[2]}, where the recipe has {wanted[match[1]]}"


def _cmakes_own() -> frozenset[str]:
    """The variables that CMake itself knows (cmake-variables(7)), for the languages and configurations in use."""
    names = run([programs.find("cmake"), "--help-variable-list"]).output.split()
    filled = [name.replace("<LANG>", language) for name in names for language in ("C", "CXX", "CUDA")]
    return frozenset(name.replace("<CONFIG>", kind) for name in filled for kind in ("DEBUG", "RELEASE"))
