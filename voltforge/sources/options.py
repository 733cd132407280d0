"""Check a build's variables against those that the source declares, and against the build's log."""

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
"""A name in quotes, as in os.getenv() and lists of options, or alone on a comment line."""
_SUMMARY = re.compile(r"--\s+([A-Z][A-Z0-9_]+)\s+: (\S+)\s*$")
"""A line of the summary that PyTorch's cmake/Summary.cmake prints."""
_ON, _OFF = ("1", "ON", "TRUE", "YES", "Y"), ("0", "OFF", "FALSE", "NO", "N")


class OptionError(VoltforgeError):
    """Variables of a recipe that the source does not declare; ``unknown`` maps each to similar declared names."""

    def __init__(self, recipe: SourceRecipe, unknown: dict[str, list[str]]) -> None:
        lines = [f"{name}{f', perhaps meant for {near[0]}' if near else ''}" for name, near in unknown.items()]
        super().__init__(
            f"{recipe.path.name} sets variables that {recipe.name} {recipe.version} does not know:{listed(lines)}",
            hint=f"correct [build.env]; the variables are declared in {', '.join(recipe.build.options)}",
        )
        self.unknown = unknown


def declared_variables(tree: Path, patterns: Iterable[str]) -> frozenset[str]:
    """Return the names of variables that the files of a tree declare or read.

    CMake files: options, cached variables and environment variables. Python files: names in quotes, and names alone
    on a comment line, as at the top of PyTorch's setup.py.
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
    """Check the recipe's variables against those that the tree declares, if the recipe has ``build.options``.

    Raises:
        OptionError: the tree does not declare all of them; it names each.
    """
    if not recipe.build.options:
        return
    known = declared_variables(tree, recipe.build.options) | _cmake_variables()
    unknown = {name: get_close_matches(name, known, 1) for name in recipe.build.env if name not in known}
    if unknown:
        raise OptionError(recipe, unknown)


def same_value(first: str, second: str) -> bool:
    """Return True if CMake takes two values as equal (cmake-language(7)): ``1`` and ``ON`` are."""
    values = [value.upper() for value in (first, second)]
    if all(value in _ON + _OFF for value in values):
        return (values[0] in _ON) == (values[1] in _ON)
    return values[0] == values[1]


def contradiction(line: str, wanted: Mapping[str, str]) -> str:
    """Return the problem if a line of a build's log shows another value than ``wanted``, else an empty string.

    CMake disables a library that it does not find with a warning at most, which the wheel shows only hours later.
    CMake's own variables are ignored: projects extend paths and flags.
    """
    match = _SUMMARY.match(line)
    if not match or match[1] not in wanted or match[1].startswith("CMAKE_") or same_value(wanted[match[1]], match[2]):
        return ""
    return f"configured with {match[1]}={match[2]}, but the recipe has {wanted[match[1]]}"


def _cmake_variables() -> frozenset[str]:
    """Return CMake's own variables (cmake-variables(7)) for the languages and configurations in use."""
    names = run([programs.find("cmake"), "--help-variable-list"]).output.split()
    filled = [name.replace("<LANG>", language) for name in names for language in ("C", "CXX", "CUDA")]
    return frozenset(name.replace("<CONFIG>", kind) for name in filled for kind in ("DEBUG", "RELEASE"))
