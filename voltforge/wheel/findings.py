"""The findings of checks: what was checked, and whether it is as it must be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from voltforge.system import console

_SHOWN = 3
"""The number of examples in a finding."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """The check's name, in a word or two."""
    severity: Literal["pass", "fail", "note"]
    """``fail`` keeps the wheel out of the wheelhouse; ``note`` is information."""
    detail: str


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings of severity ``fail``."""
    return [finding for finding in findings if finding.severity == "fail"]


def report(findings: Iterable[Finding]) -> None:
    """Print the findings as a table."""
    marks = {"pass": "ok", "fail": "FAIL", "note": "note"}
    console.table("", ("", "check", "found"), ((marks[f.severity], f.check, f.detail) for f in findings))


def of_problems(check: str, problems: Iterable[str], fine: str) -> Iterator[Finding]:
    """Yield a failure for each problem; without one, a pass with the detail ``fine``, or nothing if that is empty."""
    failures = [Finding(check, "fail", problem) for problem in problems]
    yield from failures or ([Finding(check, "pass", fine)] if fine else [])


def examples(names: Iterable[str]) -> str:
    """Return the first three names in one line, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
