"""Patches apply exactly or change nothing, and a failure names every hunk."""

from __future__ import annotations

import pytest

from tests.support.source_files import (
    HEADER,
    LINES,
    changed,
    content,
    diff,
    patch,
)
from voltforge.errors import VoltforgeError
from voltforge.sources import patches
from voltforge.sources.patches import PatchError, series


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file.txt").write_text("".join(LINES))
    (folder / "other.txt").write_text("".join(LINES))
    return folder


def test_a_patch_is_applied(tmp_path, source):
    patches.apply(patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20))), source)
    assert (source / "file.txt").read_text() == "".join(changed(LINES, 20))
    assert sorted(path.name for path in source.iterdir()) == ["file.txt", "other.txt"]


def test_a_patch_is_applied_to_moved_lines(tmp_path, source):
    (source / "file.txt").write_text("".join(["new\n"] * 7 + LINES))
    patches.apply(patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20))), source)
    assert (source / "file.txt").read_text() == "".join(["new\n"] * 7 + changed(LINES, 20))


def test_a_patch_can_add_and_remove_files(tmp_path, source):
    added = diff([], ["new\n"], "added.txt").replace("a/added.txt", "/dev/null")
    removed = diff(LINES, [], "other.txt").replace("b/other.txt", "/dev/null")
    patches.apply(patch(tmp_path / "patches", HEADER + added + removed), source)
    assert sorted(path.name for path in source.iterdir()) == ["added.txt", "file.txt"]


@pytest.mark.parametrize("number", [17, 18, 19, 21, 22, 23])
def test_a_patch_with_one_different_context_line_is_refused(tmp_path, source, number):
    """patch(1) by itself would guess, which it calls fuzz, at the outer ones."""
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    (source / "file.txt").write_text("".join(changed(LINES, number, "different\n")))
    before = content(source)
    with pytest.raises(PatchError) as caught:
        patches.apply(one, source)
    assert caught.value.rejects == (("file.txt", "Hunk #1 FAILED at 17."),)
    assert content(source) == before


def test_a_failing_patch_changes_nothing_and_names_every_file_and_hunk(tmp_path, source):
    new = changed(changed(LINES, 5), 35)
    text = HEADER + diff(LINES, new) + diff(LINES, new, "other.txt") + diff(LINES, new, "gone.txt")
    (source / "file.txt").write_text("".join(changed(LINES, 35, "different\n")))
    (source / "other.txt").write_text("".join(changed(changed(LINES, 5, "x\n"), 35, "x\n")))
    before = content(source)
    with pytest.raises(PatchError) as caught:
        patches.apply(patch(tmp_path / "patches", text), source)
    named = caught.value.rejects
    assert ("file.txt", "Hunk #2 FAILED at 32.") in named
    assert {("other.txt", "Hunk #1 FAILED at 2."), ("other.txt", "Hunk #2 FAILED at 32.")} <= set(named)
    assert any("gone.txt" in file + why or "can't find file" in why for file, why in named)
    assert caught.value.what.startswith("patches/0001-say-more.patch does not apply:\n  - file.txt: Hunk #2")
    assert content(source) == before


def test_a_failing_patch_names_its_upstream_change(tmp_path, source, repository):
    """With the words of its header, on a newer tree; here with one of vLLM's own patches."""
    [ours] = (repository / "patches" / "vllm").glob("*-window-maximum.patch")
    upstream = source / "vllm/attention/ops/triton_unified_attention.py"
    upstream.parent.mkdir(parents=True)
    upstream.write_text("".join(LINES))
    with pytest.raises(PatchError) as caught:
        patches.apply(patches.Patch(ours, "", ""), source)
    assert "vllm/attention/ops/triton_unified_attention.py: Hunk #1 FAILED" in caught.value.what
    assert "whether M is still set to m_j; run `python -m volta.numerics`" in caught.value.hint
    with pytest.raises(PatchError) as caught:
        patches.apply(patch(tmp_path / "patches", "Subject: s\n---\n" + diff(LINES, LINES[3:])), source / "vllm")
    assert "check these places in the source: the places that it names" in caught.value.hint


def test_an_already_applied_patch_is_refused(tmp_path, source):
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    patches.apply(one, source)
    before = content(source)
    with pytest.raises(PatchError):
        patches.apply(one, source)
    assert content(source) == before


def test_a_patch_cannot_write_outside_the_tree(tmp_path, source):
    (tmp_path / "file.txt").write_text("".join(LINES))
    text = diff(LINES, changed(LINES, 20)).replace("a/file.txt", "a/../file.txt").replace("b/file.txt", "b/../file.txt")
    with pytest.raises(PatchError):
        patches.apply(patch(tmp_path / "patches", HEADER + text), source)
    assert (tmp_path / "file.txt").read_text() == "".join(LINES)


def test_a_truncated_patch_is_refused(tmp_path, source):
    text = diff(LINES, changed(LINES, 20))
    with pytest.raises(PatchError):
        patches.apply(patch(tmp_path / "patches", HEADER + text[: len(text) * 2 // 3]), source)
    assert content(source)["file.txt"] == "".join(LINES).encode()


def test_the_users_settings_for_patch_do_not_matter(tmp_path, source, monkeypatch):
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    removed = diff(LINES, [], "other.txt").replace("b/other.txt", "/dev/null").replace("\t", "")
    patches.apply(patch(tmp_path / "patches", HEADER + removed), source)
    assert not (source / "other.txt").exists()


def test_without_patch_the_error_names_the_package_to_install(tmp_path, source, monkeypatch):
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VoltforgeError) as caught:
        patches.apply(one, source)
    assert (caught.value.what, caught.value.hint) == ("GNU patch is not installed", "apt-get install patch")


def test_a_series_is_sorted_by_number(tmp_path):
    body = diff(LINES, changed(LINES, 20))
    for name in ("0010-c", "0002-b", "0001-a"):
        patch(tmp_path / "patches", f"Subject: {name}\n---\n{body}", f"{name}.patch")
    (tmp_path / "patches" / "README.md").write_text("not a patch")
    assert [serie.subject for serie in series(tmp_path / "patches")] == ["0001-a", "0002-b", "0010-c"]
    assert len({serie.sha256 for serie in series(tmp_path / "patches")}) == 3


def test_a_missing_folder_is_an_empty_series(tmp_path):
    assert series(tmp_path / "none") == ()


@pytest.mark.parametrize(
    "text",
    [
        diff(LINES, changed(LINES, 20)),
        "Subject:\n---\n" + diff(LINES, changed(LINES, 20)),
        "Subject: words only\n---\n",
        "",
    ],
)
def test_a_patch_without_a_subject_or_without_a_diff_is_refused(tmp_path, text):
    (tmp_path / "0001-a.patch").write_text(text)
    with pytest.raises(PatchError) as caught:
        series(tmp_path)
    assert caught.value.patch.name == "0001-a.patch"
    assert "Subject: …" in caught.value.what


def test_a_patch_to_a_file_that_is_not_utf_8_is_read(tmp_path, source):
    (source / "file.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "0001-a.patch").write_bytes(
        HEADER.encode() + b"--- a/file.txt\n+++ b/file.txt\n@@ -1 +1 @@\n-caf\xe9\n+caf\xe8\n"
    )
    [one] = series(tmp_path)
    patches.apply(one, source)
    assert (source / "file.txt").read_bytes() == b"caf\xe8\n"


def test_the_series_of_this_repository_can_be_read(repository):
    for folder in (repository / "patches").iterdir():
        assert all(serie.subject for serie in series(folder))
