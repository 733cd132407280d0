"""Locks are read into pins; a line that is not a pin with hashes is refused with its number."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.markers import Marker

from tests.support.checkouts import ROOT
from voltforge.sources import locks
from voltforge.sources.locks import LockError, Pin

ELSEWHERE = "sys_platform == 'win32'"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True).filter(lambda name: "--" not in name)
VERSIONS = st.from_regex(
    r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}((a|b|rc)[0-9])?(\.post[0-9])?(\+[a-z0-9]{1,4})?", fullmatch=True
)
MALFORMED = {
    "no version": f"one --hash=sha256:{A}",
    "a range": f"one>=1 --hash=sha256:{A}",
    "two versions": f"one==1,==2 --hash=sha256:{A}",
    "a wildcard": f"one==1.* --hash=sha256:{A}",
    "an address": f"one @ https://example.invalid/one.whl --hash=sha256:{A}",
    "no hash": "one==1",
    "another hash": "one==1 --hash=md5:d41d8cd98f00b204e9800998ecf8427e",
    "a weak hash besides": f"one==1 --hash=sha256:{A} --hash=md5:d41d8cd98f00b204e9800998ecf8427e",
    "half a hash": f"one==1 --hash=sha256:{A[:40]}",
    "no such hash": f"one==1 --hash={A}",
    "an option": "--index-url https://example.invalid/simple",
    "another file": "-r other.txt",
    "a bad marker": f"one==1 ; sys_platfrom == 'linux' --hash=sha256:{A}",
    "a binary": "\x7fELF\x02\x01",
    "a cut line": "one==1 \\",
}


def lock(folder: Path, text: str) -> Path:
    path = folder / "lock.txt"
    path.write_text(text)
    return path


def test_pins_hold_names_versions_hashes_markers_and_text(tmp_path):
    first = f"One.Name==1.0 \\\n    --hash=sha256:{B} \\\n    --hash=sha256:{A}\n"
    second = f"two==2.0.post1 ; {ELSEWHERE} \\\n    --hash=sha256:{C}\n"
    path = lock(tmp_path, f"# written by uv\n{first}    # via -r lock.in\n{second}    # via\n    #   one\n")
    assert locks.read(path) == (
        Pin("one-name", "1.0", (A, B), None, first),
        Pin("two", "2.0.post1", (C,), Marker(ELSEWHERE), second),
    )


def test_pin_applies_only_where_its_marker_holds(tmp_path):
    text = "".join(
        f"{name}==1 ; {marker} --hash=sha256:{A}\n"
        for name, marker in {"here": f"sys_platform == '{sys.platform}'", "there": ELSEWHERE}.items()
    )
    pins = locks.read(lock(tmp_path, f"{text}everywhere==1 --hash=sha256:{A}\n"))
    assert [pin.name for pin in pins if pin.applies] == ["here", "everywhere"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_locks_of_the_recipes_are_read_completely(path):
    text, pins = path.read_text(), locks.read(path)
    assert sum(line[:1].isalnum() for line in text.splitlines()) == len(pins) > 0
    assert text.count("--hash=sha256:") == sum(len(pin.sha256) for pin in pins)
    assert all(pin.text in text for pin in pins)


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.tuples(VERSIONS, st.sets(HASHES, min_size=1, max_size=4)), max_size=5))
def test_every_lock_that_uv_could_write_is_read(written):
    text = "".join(
        f"{name}=={version} \\\n" + " \\\n".join(f"    --hash=sha256:{value}" for value in values) + "\n    # via x\n"
        for name, (version, values) in written.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        pins = locks.read(lock(Path(folder), text))
    assert {pin.name: (pin.version, set(pin.sha256)) for pin in pins} == written


@pytest.mark.parametrize("wrong", MALFORMED)
def test_line_that_is_not_a_pin_with_hashes_is_refused_with_its_number(tmp_path, wrong):
    path = lock(tmp_path, f"# a comment\nfine==1 \\\n    --hash=sha256:{A}\n{MALFORMED[wrong]}\n")
    with pytest.raises(LockError, match=r"^lock\.txt, line 4: ") as caught:
        locks.read(path)
    assert (caught.value.path, caught.value.line) == (path, 4)


def test_malformed_pin_for_another_platform_is_refused(tmp_path):
    with pytest.raises(LockError, match="line 1"):
        locks.read(lock(tmp_path, f"there==1 ; {ELSEWHERE}\n"))


def test_unreadable_lock_is_an_error_with_its_name(tmp_path):
    with pytest.raises(LockError, match="nowhere: cannot be read: No such file"):
        locks.read(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(LockError, match="latin: cannot be read"):
        locks.read(tmp_path / "latin")
