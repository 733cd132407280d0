"""URLs are printed without credentials, and file URLs become paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltforge.system.urls import local_path, redacted


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("https://user:secret@host/simple/", "https://***@host/simple/"),
        ("https://host/file?signature=secret", "https://host/file?***"),
        ("https://user:se/cr@t@host/a#part", "https://***@host/a"),
        ("/srv/wheels", "/srv/wheels"),
    ],
)
def test_a_printed_url_has_no_credentials(url: str, printed: str) -> None:
    assert redacted(url) == printed


def test_a_long_url_is_shortened_and_control_characters_are_quoted() -> None:
    assert redacted("https://host/" + "a" * 1000).endswith("a…")
    assert "\x1b" not in redacted("https://host/\x1b[2J")


def test_a_file_url_and_a_plain_path_are_local_and_an_address_is_not() -> None:
    assert local_path("file:///srv/a%20b") == Path("/srv/a b")
    assert local_path("/srv/wheels") == Path("/srv/wheels")
    assert local_path("https://host/wheels") is None
