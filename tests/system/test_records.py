"""Records are typed values as JSON, whose paths are relative to the checkout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltforge.system import records
from voltforge.system.records import CheckoutPath


@dataclass(frozen=True)
class Part:
    path: CheckoutPath
    size: int


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    hashes: Mapping[str, str] | None = None
    home: CheckoutPath | None = None


ROOT = Path("/checkout")
PATHS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join)
WHOLES = st.builds(
    Whole,
    name=st.text(max_size=5),
    parts=st.lists(st.builds(Part, PATHS.map(ROOT.joinpath), st.integers(0, 10**12)), max_size=3).map(tuple),
    hashes=st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    home=st.none() | PATHS.map(ROOT.joinpath) | PATHS.map(Path("/usr").joinpath),
)


@given(WHOLES)
def test_a_value_survives_json(value):
    text = json.dumps(records.encode(value, ROOT))
    assert "/checkout" not in text
    assert records.decode(Whole, json.loads(text), ROOT) == value


def test_a_record_of_a_moved_checkout_names_the_new_paths():
    before = Whole("w", (Part(Path("/checkout/build/a"), 1),), home=Path("/usr/local/cuda"))
    after = records.decode(Whole, records.encode(before, Path("/checkout")), Path("/elsewhere"))
    assert after.parts[0].path == Path("/elsewhere/build/a")
    assert after.home == Path("/usr/local/cuda"), "a path outside the checkout stays"


@pytest.mark.parametrize("value", [None, 3, [], "x", {}, {"name": 3}, {"name": "w", "parts": [{"path": 1, "size": 1}]}])
def test_a_value_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match="Whole"):
        records.decode(Whole, value, ROOT)
