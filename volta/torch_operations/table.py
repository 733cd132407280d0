"""Write rows as lines of a table."""

from __future__ import annotations

from volta.torch_operations.operation import Row


def line(row: Row) -> str:
    """A row as a line of a table for people."""
    off, bound = ("" if one is None else f"{one:.1e}" for one in (row.error, row.bound))
    took = "" if row.microseconds is None else f"{row.microseconds:.1f}"
    said = "" if row.verdict == "right" else row.said
    return f"{row.operation:<42} {off:>8} {bound:>8} {took:>10}  {row.verdict} {said}".rstrip()
