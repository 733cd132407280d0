"""URLs: printed without their credentials, and as paths of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MOST_SHOWN = 500
"""The largest number of characters of an address that is printed."""


def redacted(url: str) -> str:
    """Return ``url`` for printing: without user, password and query (where signed addresses keep their secret).

    Control characters, which would move the terminal's cursor, are removed, and long addresses are cut.
    """
    url = _CONTROL.sub(lambda found: quote(found[0], errors="replace"), url)
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url[:_MOST_SHOWN]
    # Up to the last @: passwords often contain a raw slash, question mark or @.
    _, at, place = rest.rpartition("@")
    path, question, _ = place.partition("?")
    shown = scheme + mark + ("***@" if at else "") + path.partition("#")[0] + ("?***" if question else "")
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def local_path(place: str) -> Path | None:
    """Return the path of a plain path or a file: URL; ``None`` for an address on the network."""
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return None if "://" in place else Path(place)
