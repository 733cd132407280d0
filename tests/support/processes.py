"""The processes below another, by name."""

from __future__ import annotations

import contextlib

import psutil


def family(parent: psutil.Process) -> dict[psutil.Process, str]:
    """Return the descendants of a process with their names, without those that end while they are listed."""
    named = {}
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            named[process] = process.name()
    return named
