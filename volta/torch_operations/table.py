"""Write rows as lines of a table."""

from __future__ import annotations

from volta.torch_operations.operation import OperationResult


def line(row: OperationResult) -> str:
    """Return a row as a line of a printed table."""
    error, bound = ("" if value is None else f"{value:.1e}" for value in (row.error, row.bound))
    took = "" if row.microseconds is None else f"{row.microseconds:.1f}"
    reason = "" if row.verdict == "right" else row.reason
    return f"{row.operation:<42} {error:>8} {bound:>8} {took:>10}  {row.verdict} {reason}".rstrip()
