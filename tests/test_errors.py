"""Errors carry what happened and what to try, and say all problems of one kind at once."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import voltforge
from voltforge.errors import VoltforgeError, listed, remedy


def test_error_prints_problem_and_hint():
    error = VoltforgeError("the disk is full", hint="make room")
    assert (error.what, error.hint) == ("the disk is full", "make room")
    assert str(error) == "the disk is full\n  try: make room"


def test_error_without_hint_prints_problem_alone():
    assert str(VoltforgeError("the disk is full")) == "the disk is full"


def test_problems_are_listed_one_a_line():
    assert listed(["one", "two"]) == "\n  - one\n  - two"
    assert listed([]) == ""


@pytest.mark.parametrize("module", [module.name for module in pkgutil.walk_packages(voltforge.__path__, "voltforge.")])
def test_public_errors_are_voltforge_errors(module):
    defined = vars(importlib.import_module(module)).values()
    errors = [error for error in defined if inspect.isclass(error) and issubclass(error, Exception)]
    ours = [
        error for error in errors if error.__module__.startswith("voltforge") and not error.__name__.startswith("_")
    ]
    assert all(issubclass(error, VoltforgeError) for error in ours)


def test_system_errors_have_hints_and_others_the_default():
    assert "make room" in remedy("a.o: No space left on device", "look at the source")
    assert "make room" in remedy("processing tar file: write /opt/a: no space left on device")
    assert "read-only" in remedy("[Errno 30] Read-only file system: '/usr'")
    assert remedy("expected ';'", "look at the source") == "look at the source"
    assert remedy(None) == ""
