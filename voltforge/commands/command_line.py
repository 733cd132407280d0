"""Read the `name=value` words of the command line, and suggest names for words that are mistyped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from doit.exceptions import InvalidDodoFile

from voltforge.commands import interrupts
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline


def load_pipeline(root: Path, variable: Callable[[str, str], str]) -> Pipeline:
    """Return the pipeline of a checkout, with the settings of the command line.

    Args:
        root: the checkout.
        variable: doit's ``get_var``; returns the value of a ``name=value`` word, or the default that it is given.

    Raises:
        InvalidDodoFile: a recipe cannot be used, or a variable is unknown or has an unusable value.
    """
    interrupts.print_no_traceback()
    check_variables(sys.argv[1:])
    try:
        values = {field.name: variable(field.name, getattr(Settings, field.name)) for field in fields(Settings)}
        # doit's get_var returns None for every name where doit did not parse the command line.
        chosen = {name: value for name, value in values.items() if value is not None}
        pipeline = Pipeline.load(root, Settings(**chosen))
        pipeline.check()
        return pipeline
    except VoltforgeError as error:
        raise InvalidDodoFile(str(error)) from error


def check_variables(words: Iterable[str]) -> None:
    """Check that every ``name=value`` word names a variable of :class:`Settings`.

    Raises:
        InvalidDodoFile: there are other names; it lists all of them, with the nearest known names.
    """
    known = [field.name for field in fields(Settings)]
    given = [word.split("=", 1)[0] for word in words if "=" in word and not word.startswith("-")]
    unknown = [name for name in given if name not in known]
    if unknown:
        sentences = [f"{name}= is not a variable{did_you_mean(name, known, '=')}" for name in unknown]
        variables = ", ".join(f"{name}=" for name in known)
        raise InvalidDodoFile(f"{'; '.join(sentences)}\n  try: one of {variables} (./doit help explains them)")


def did_you_mean(word: str, names: Iterable[str], ending: str = "") -> str:
    """Return ``; did you mean …?`` with up to three names like ``word``, or an empty string if none is like it."""
    matches = [f"{name}{ending}" for name in get_close_matches(word, list(names), 3)]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
