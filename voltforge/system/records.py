"""Typed values as JSON. Paths inside the checkout are written relative to it, so that it can be moved or copied."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer, SerializationInfo, TypeAdapter, ValidationInfo

T = TypeVar("T")


def _joined(value: Any, info: ValidationInfo) -> Any:
    return info.context["root"] / value if isinstance(value, str) and info.context else value


def _relative(value: Path, info: SerializationInfo) -> str:
    root = info.context["root"] if info.context else Path("/")
    return str(value.relative_to(root) if value.is_relative_to(root) else value)


CheckoutPath = Annotated[Path, BeforeValidator(_joined), PlainSerializer(_relative)]
"""A path that a record holds relative to the checkout, if it lies inside it."""


def encode(value: Any, root: Path) -> Any:
    """Return a dataclass as JSON values, without fields that are ``None``; ``root`` is the checkout."""
    return _adapter(type(value)).dump_python(value, mode="json", exclude_none=True, context={"root": root})


def decode(kind: type[T], value: Any, root: Path) -> T:
    """Return the dataclass ``kind`` that :func:`encode` wrote, with its paths in the checkout at ``root``.

    Raises:
        ValueError: ``value`` does not describe one.
    """
    decoded: T = _adapter(kind).validate_python(value, context={"root": root})
    return decoded


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
