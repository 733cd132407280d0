"""Real archives, good, broken and hostile; a real patch(1); and trees that a build goes on in."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rights import ordinary_user
from voltforge import tree
from voltforge.tree import ArchiveError, PatchError, grow, series, sync, unpack

EPOCH = 1_700_000_000
NOISE = random.Random(3).randbytes(50_000)


def member(name: str, data: bytes | None = b"", *, kind: bytes = tarfile.REGTYPE, to: str = "", mode: int = 0o644):
    """A tar member and its content; a folder for ``None``."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = (tarfile.DIRTYPE if data is None else kind), to, mode, EPOCH
    info.size = len(data or b"")
    info.uid = info.gid = 54321
    return info, data or b""


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE):
    return member(name, kind=kind, to=to)


def tar(path: Path, *members, compression: str = "gz") -> Path:
    with tarfile.open(path, f"w:{compression}") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def bundle(path: Path, content: dict[str, bytes], date=(2023, 11, 14, 22, 13, 20)) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name, date), data, zipfile.ZIP_DEFLATED)
    return path


def deb(path: Path, *members, compression: str = "xz") -> Path:
    """A Debian package, deb(5), put together by the real ar."""
    parts = path.parent / f"{path.name}.parts"
    parts.mkdir()
    (parts / "debian-binary").write_text("2.0\n")
    tar(parts / "control.tar.gz", member("./control", b"Package: x\n"))
    tar(parts / f"data.tar.{compression}", *members, compression=compression)
    names = ["debian-binary", "control.tar.gz", f"data.tar.{compression}"]
    subprocess.run(["ar", "rcD", path.absolute(), *names], cwd=parts, check=True)
    return path


def content(folder: Path) -> dict[str, bytes | str]:
    """The files of a folder: bytes, or where a link leads."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def problems(archive: Path, folder: Path) -> tuple[str, ...]:
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, folder)
    return caught.value.problems


# --- unpacking ---


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_an_sdist_is_unpacked_without_its_top_folder(tmp_path, compression):
    members = [member("a-1.0", None), member("a-1.0/b/c.py", b"c"), link("a-1.0/d", "b/c.py")]
    archive = tar(tmp_path / f"a.tar.{compression}", *members, compression=compression)
    assert unpack(archive, tmp_path / "out") == EPOCH
    assert content(tmp_path / "out") == {"b/c.py": b"c", "d": "-> b/c.py"}


def test_several_entries_at_the_top_stay_where_they_are(tmp_path):
    archive = bundle(tmp_path / "a-1.0-py3-none-any.whl", {"a/b.py": b"b", "a-1.0.dist-info/METADATA": b"m"})
    unpack(archive, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == ["a-1.0.dist-info/METADATA", "a/b.py"]


def test_a_top_folder_may_hold_another_of_its_own_name(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", member("a/a/a/file", b"x"), member("a/.a.lifted/file", b"y"))
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"a/a/file": b"x", ".a.lifted/file": b"y"}


def test_the_time_of_a_zip_is_that_of_its_newest_member(tmp_path):
    assert unpack(bundle(tmp_path / "a.zip", {"a": b"", "b": b""}), tmp_path / "out") == EPOCH


def test_a_zip_without_times_has_one_all_the_same(tmp_path):
    archive = bundle(tmp_path / "a.zip", {"a": b""})
    raw = archive.read_bytes()
    time = b"\xaa\xb1\x6e\x57"  # MS-DOS time and date of EPOCH, in the local header and in the central directory
    assert raw.count(time) == 2
    archive.write_bytes(raw.replace(time, bytes(4)))
    assert unpack(archive, tmp_path / "out") == 315532800


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_a_debian_package_gives_its_files_but_not_its_absolute_links(tmp_path, compression):
    members = [
        member("./usr/bin/tool", b"t", mode=0o755),
        link("./usr/bin/cc", "/etc/alternatives/cc"),
        member("./etc/c", b"c"),
    ]
    archive = deb(tmp_path / "tool_1_amd64.deb", *members, compression=compression)
    assert unpack(archive, tmp_path / "out") == EPOCH
    assert content(tmp_path / "out") == {"usr/bin/tool": b"t", "etc/c": b"c"}


def test_modes_become_plain_and_owners_ours(tmp_path):
    modes = {"plain": 0o600, "program": 0o700, "setuid": 0o4755, "writable": 0o666, "secret": 0o000}
    unpack(
        tar(tmp_path / "a.tar.gz", *(member(name, b"", mode=mode) for name, mode in modes.items())), tmp_path / "out"
    )
    found = {path.name: oct(path.stat().st_mode)[-4:] for path in (tmp_path / "out").iterdir()}
    plain, program = "0644", "0755"
    assert found == {"plain": plain, "program": program, "setuid": program, "writable": plain, "secret": plain}
    assert {path.stat().st_uid for path in (tmp_path / "out").iterdir()} == {os.getuid()}


def test_a_folder_that_its_archive_locks_can_still_be_filled_and_removed():
    members = [member("a", None, mode=0o000), member("a/b", None, mode=0o000), member("a/b/c", b"c")]
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        unpack(tar(Path(room, "a.tar.gz"), *members), Path(room, "out"))
        assert content(Path(room, "out")) == {"b/c": b"c"}


def test_hard_links_inside_are_kept(tmp_path):
    unpack(tar(tmp_path / "a.tar.gz", member("a/one", b"1"), link("a/two", "a/one", tarfile.LNKTYPE)), tmp_path / "out")
    assert content(tmp_path / "out") == {"one": b"1", "two": b"1"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([member("/etc/evil")], "/etc/evil: is absolute"),
        ([member("a/../../evil")], "a/../../evil: climbs out with '..'"),
        ([member("a\\evil")], "'a\\\\evil': is no portable name"),
        ([link("a", "/etc/passwd")], "a: links outside, to /etc/passwd"),
        ([link("a/b", "../../evil")], "a/b: links outside, to ../../evil"),
        ([link("a", "../evil", tarfile.LNKTYPE)], "a: links outside, to ../evil"),
        ([link("a", "/etc/passwd", tarfile.LNKTYPE)], "a: links outside, to /etc/passwd"),
        ([link("a", "b"), member("a/evil")], "a/evil: lies below a link, a"),
        ([member("b", None), link("a", "b"), link("c", "a/x", tarfile.LNKTYPE)], "c: links to a/x, by way of a link"),
        ([member("a", kind=tarfile.CHRTYPE)], "a: is a device or a pipe"),
        ([member("a", kind=tarfile.BLKTYPE)], "a: is a device or a pipe"),
        ([member("a", kind=tarfile.FIFOTYPE)], "a: is a device or a pipe"),
        ([member("a"), member("./a")], "./a: appears twice"),
        ([link("a", "b"), member("a")], "a: appears twice"),
    ],
)  # fmt: skip
def test_a_tar_member_that_could_do_harm_is_refused_before_anything_is_written(tmp_path, members, problem):
    out = tmp_path / "room" / "out"
    assert problem in problems(tar(tmp_path / "a.tar.gz", member("good"), *members), out)
    assert not out.exists()


@pytest.mark.parametrize("order", [1, -1])
def test_links_that_lead_outside_only_together_are_refused(tmp_path, order):
    """Each of them stays inside by its words; what they lead to does not."""
    links = [link("a/b/c/up", "../../.."), link("evil", "a/b/c/up/../../secret")][::order]
    (tmp_path / "secret").touch()
    [problem] = problems(tar(tmp_path / "a.tar.gz", member("a/b/c/file"), *links), tmp_path / "room" / "out")
    assert "evil" in problem or "outside" in problem


@pytest.mark.filterwarnings("ignore:Python 3.14 will")
def test_no_name_writes_outside_whatever_tarfile_itself_would_allow(tmp_path, monkeypatch):
    """As on Python 3.10.11 and on Debian 12, whose tarfile knows no filters."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    links = [link("a/b/c/up", "../../.."), link("evil", "a/b/c/up/../../secret")]
    [problem] = problems(tar(tmp_path / "a.tar.gz", *links), tmp_path / "room" / "out")
    assert problem == "evil: links outside, by way of other links"
    unpack(tar(tmp_path / "b.tar.gz", member("x/y", b"y", mode=0o4711)), tmp_path / "fine")
    assert content(tmp_path / "fine") == {"y": b"y"}
    assert (tmp_path / "fine" / "y").stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["/etc/evil"], "/etc/evil: is absolute"),
        (["a/../../evil"], "a/../../evil: climbs out with '..'"),
        (["a", "a"], "a: appears twice"),
        (["a/b", "a//b"], "a/b: appears twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_member_that_could_do_harm_is_refused_before_anything_is_written(tmp_path, names, problem):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ["good", *names]:
            archive.writestr(name, b"x")
    out = tmp_path / "room" / "out"
    assert problem in problems(tmp_path / "a.zip", out)
    assert not out.exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("a")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert problems(tmp_path / "a.zip", tmp_path / "out") == ("a: is a link",)


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "deb"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tree, "MAX_UNPACKED", 1_500_000)
    archive = tmp_path / f"bomb.{kind}"
    zeros = {"a": bytes(1_000_000), "b": bytes(1_000_000)}
    makers = {"tar.gz": tar, "deb": deb}
    if kind == "zip":
        bundle(archive, zeros)
    else:
        makers[kind](archive, *(member(name, data) for name, data in zeros.items()))
    assert archive.stat().st_size < 20_000
    assert problems(archive, tmp_path / "out") == ("unpacks to more than 1.5 MB",)
    assert not (tmp_path / "out").exists()


def test_all_problems_are_named_at_once_but_not_thousands(tmp_path):
    named = problems(
        tar(tmp_path / "a.tar.gz", member("/one"), link("two", "/etc"), member("../three")), tmp_path / "out"
    )
    assert len(named) == 3
    many = problems(tar(tmp_path / "b.tar.gz", *(member(f"/{number}") for number in range(500))), tmp_path / "out")
    assert len(many) == 20


def test_the_error_names_the_archive_and_what_to_do(tmp_path):
    with pytest.raises(ArchiveError) as caught:
        unpack(tar(tmp_path / "a-1.0.tar.gz", member("/evil")), tmp_path / "out")
    assert caught.value.what == "a-1.0.tar.gz was not unpacked:\n  - /evil: is absolute"
    assert "fetch it anew" in caught.value.hint


# --- what is broken ---


def broken_archives() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        whole = {
            "tar": tar(folder / "a.tar", member("a/b", NOISE), compression=""),
            "tar.gz": tar(folder / "a.tar.gz", member("a/b", NOISE)),
            "tar.xz": tar(folder / "a.tar.xz", member("a/b", NOISE), compression="xz"),
            "tar.bz2": tar(folder / "a.tar.bz2", member("a/b", NOISE), compression="bz2"),
            "zip": bundle(folder / "a.zip", {"a/b": NOISE}),
            "deb": deb(folder / "a.deb", member("./a/b", NOISE)),
        }
        return {kind: path.read_bytes() for kind, path in whole.items()}


ARCHIVES = broken_archives()


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("keep", [0, 1, 100, 700, 20_000, -15_000])
def test_a_truncated_archive_is_said_to_be_broken(tmp_path, kind, keep):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(ARCHIVES[kind][:keep])
    assert len(problems(archive, tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ARCHIVES)
def test_something_else_under_the_name_of_an_archive_is_said_to_be_broken(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(b"<html>502 Bad Gateway</html>" * 100)
    [problem] = problems(archive, tmp_path / "out")
    assert problem.startswith("is ")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.bz2", "zip", "deb"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_archive_with_wrong_bytes_is_an_archive_error_or_the_same_files(kind, data):
    raw = bytearray(ARCHIVES[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as room:
        archive = Path(room, f"a.{kind}")
        archive.write_bytes(raw)
        with contextlib.suppress(ArchiveError):
            unpack(archive, Path(room, "out"))


def test_a_hard_link_to_nothing_is_said_to_be_broken(tmp_path):
    [problem] = problems(tar(tmp_path / "a.tar.gz", link("a", "nothing", tarfile.LNKTYPE)), tmp_path / "out")
    assert problem == "is broken: \"linkname 'nothing' not found\""


def test_an_encrypted_zip_is_said_to_be_broken(tmp_path):
    raw = bytearray(bundle(tmp_path / "a.zip", {"a": b"secret"}).read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(header) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(raw)
    [problem] = problems(tmp_path / "a.zip", tmp_path / "out")
    assert "encrypted" in problem


def test_an_archive_that_is_not_there_is_named(tmp_path):
    [problem] = problems(tmp_path / "no.tar.gz", tmp_path / "out")
    assert problem == f"{tmp_path / 'no.tar.gz'}: No such file or directory"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("in the way")
    [problem] = problems(tar(tmp_path / "a.tar.gz", member("a", b"a")), tmp_path / "out")
    assert str(tmp_path / "out") in problem


def test_without_ar_a_debian_package_says_what_to_install(tmp_path, monkeypatch):
    archive = deb(tmp_path / "a.deb", member("./a"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tree.VoltforgeError, match="binutils"):
        unpack(archive, tmp_path / "out")


# --- patches ---

LINES = [f"line {number}\n" for number in range(1, 41)]
HEADER = "Subject: say more\nWhy: it said too little.\nUpstream: none\n---\n"


def diff(old: list[str], new: list[str], name: str = "file.txt") -> str:
    """What the real diff makes of two versions of a file."""
    with tempfile.TemporaryDirectory() as room:
        for folder, lines in (("a", old), ("b", new)):
            Path(room, folder).mkdir()
            Path(room, folder, name).write_text("".join(lines))
        words = ["diff", "-u", "--label", f"a/{name}", "--label", f"b/{name}", f"a/{name}", f"b/{name}"]
        return subprocess.run(words, cwd=room, capture_output=True, text=True, check=False).stdout


def changed(lines: list[str], number: int, text: str = "changed\n") -> list[str]:
    return [*lines[: number - 1], text, *lines[number:]]


def patch(folder: Path, text: str, name: str = "0001-say-more.patch") -> tree.Patch:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return next(one for one in series(folder) if one.path.name == name)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file.txt").write_text("".join(LINES))
    (folder / "other.txt").write_text("".join(LINES))
    return folder


def test_a_patch_is_applied(tmp_path, source):
    tree.apply(patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20))), source)
    assert (source / "file.txt").read_text() == "".join(changed(LINES, 20))
    assert sorted(path.name for path in source.iterdir()) == ["file.txt", "other.txt"]


def test_a_patch_is_applied_where_its_lines_have_moved_to(tmp_path, source):
    (source / "file.txt").write_text("".join(["new\n"] * 7 + LINES))
    tree.apply(patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20))), source)
    assert (source / "file.txt").read_text() == "".join(["new\n"] * 7 + changed(LINES, 20))


def test_a_patch_may_add_and_remove_files(tmp_path, source):
    added = diff([], ["new\n"], "added.txt").replace("a/added.txt", "/dev/null")
    removed = diff(LINES, [], "other.txt").replace("b/other.txt", "/dev/null")
    tree.apply(patch(tmp_path / "patches", HEADER + added + removed), source)
    assert sorted(path.name for path in source.iterdir()) == ["added.txt", "file.txt"]


@pytest.mark.parametrize("number", [17, 18, 19, 21, 22, 23])
def test_a_patch_whose_surroundings_differ_by_one_line_is_refused(tmp_path, source, number):
    """patch(1) by itself would guess, which it calls fuzz, at the outer ones."""
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    (source / "file.txt").write_text("".join(changed(LINES, number, "different\n")))
    before = content(source)
    with pytest.raises(PatchError) as caught:
        tree.apply(one, source)
    assert caught.value.rejects == (("file.txt", "Hunk #1 FAILED at 17."),)
    assert content(source) == before


def test_a_patch_that_fails_names_every_file_and_hunk_and_changes_nothing(tmp_path, source):
    new = changed(changed(LINES, 5), 35)
    text = HEADER + diff(LINES, new) + diff(LINES, new, "other.txt") + diff(LINES, new, "gone.txt")
    (source / "file.txt").write_text("".join(changed(LINES, 35, "different\n")))
    (source / "other.txt").write_text("".join(changed(changed(LINES, 5, "x\n"), 35, "x\n")))
    before = content(source)
    with pytest.raises(PatchError) as caught:
        tree.apply(patch(tmp_path / "patches", text), source)
    named = caught.value.rejects
    assert ("file.txt", "Hunk #2 FAILED at 32.") in named
    assert {("other.txt", "Hunk #1 FAILED at 2."), ("other.txt", "Hunk #2 FAILED at 32.")} <= set(named)
    assert any("gone.txt" in file + why or "can't find file" in why for file, why in named)
    assert caught.value.what.startswith("patches/0001-say-more.patch does not apply:\n  - file.txt: Hunk #2")
    assert content(source) == before


def test_a_patch_that_is_applied_already_is_refused(tmp_path, source):
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    tree.apply(one, source)
    before = content(source)
    with pytest.raises(PatchError):
        tree.apply(one, source)
    assert content(source) == before


def test_a_patch_cannot_reach_outside(tmp_path, source):
    (tmp_path / "file.txt").write_text("".join(LINES))
    text = diff(LINES, changed(LINES, 20)).replace("a/file.txt", "a/../file.txt").replace("b/file.txt", "b/../file.txt")
    with pytest.raises(PatchError):
        tree.apply(patch(tmp_path / "patches", HEADER + text), source)
    assert (tmp_path / "file.txt").read_text() == "".join(LINES)


def test_a_truncated_patch_is_refused(tmp_path, source):
    text = diff(LINES, changed(LINES, 20))
    with pytest.raises(PatchError):
        tree.apply(patch(tmp_path / "patches", HEADER + text[: len(text) * 2 // 3]), source)
    assert content(source)["file.txt"] == "".join(LINES).encode()


def test_the_users_settings_for_patch_do_not_matter(tmp_path, source, monkeypatch):
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    removed = diff(LINES, [], "other.txt").replace("b/other.txt", "/dev/null").replace("\t", "")
    tree.apply(patch(tmp_path / "patches", HEADER + removed), source)
    assert not (source / "other.txt").exists()


def test_without_patch_it_says_what_to_install(tmp_path, source, monkeypatch):
    one = patch(tmp_path / "patches", HEADER + diff(LINES, changed(LINES, 20)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tree.VoltforgeError) as caught:
        tree.apply(one, source)
    assert (caught.value.what, caught.value.hint) == ("GNU patch is not installed", "apt-get install patch")


def test_a_series_is_in_the_order_of_its_numbers(tmp_path):
    body = diff(LINES, changed(LINES, 20))
    for name in ("0010-c", "0002-b", "0001-a"):
        patch(tmp_path / "patches", f"Subject: {name}\n---\n{body}", f"{name}.patch")
    (tmp_path / "patches" / "README.md").write_text("not a patch")
    assert [one.subject for one in series(tmp_path / "patches")] == ["0001-a", "0002-b", "0010-c"]
    assert len({one.sha256 for one in series(tmp_path / "patches")}) == 3


def test_no_folder_is_an_empty_series(tmp_path):
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


def test_a_patch_to_a_file_that_is_not_utf_8_is_read_all_the_same(tmp_path, source):
    (source / "file.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "0001-a.patch").write_bytes(
        HEADER.encode() + b"--- a/file.txt\n+++ b/file.txt\n@@ -1 +1 @@\n-caf\xe9\n+caf\xe8\n"
    )
    [one] = series(tmp_path)
    tree.apply(one, source)
    assert (source / "file.txt").read_bytes() == b"caf\xe8\n"


def test_the_series_of_this_repository_can_be_read(repository):
    for folder in (repository / "patches").iterdir():
        assert all(one.subject for one in series(folder))


# --- growing ---


def test_a_grown_tree_is_unpacked_and_patched_in_order(tmp_path):
    archive = tar(
        tmp_path / "a-1.0.tar.gz", member("a-1.0/file.txt", "".join(LINES).encode()), member("a-1.0/setup.py", b"")
    )
    first, second = changed(LINES, 20), changed(changed(LINES, 20), 21)
    patch(tmp_path / "patches", HEADER + diff(first, second), "0002-b.patch")
    patch(tmp_path / "patches", HEADER + diff(LINES, first), "0001-a.patch")
    grown = grow(archive, series(tmp_path / "patches"), tmp_path / "tree")
    assert (grown.path, grown.epoch) == (tmp_path / "tree", EPOCH)
    assert (grown.path / "file.txt").read_text() == "".join(second)


def test_a_tree_that_does_not_grow_leaves_the_old_one(tmp_path):
    archive = tar(tmp_path / "a-1.0.tar.gz", member("a-1.0/file.txt", "".join(LINES).encode()))
    grow(archive, (), tmp_path / "tree")
    bad = patch(tmp_path / "patches", HEADER + diff(changed(LINES, 1), changed(LINES, 2)))
    with pytest.raises(PatchError):
        grow(archive, (bad,), tmp_path / "tree")
    assert (tmp_path / "tree" / "file.txt").read_text() == "".join(LINES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.0.tar.gz", "patches", "tree"]


# --- syncing ---


def write(folder: Path, files: dict[str, str]) -> Path:
    """Make ``folder`` hold these files only; a value that begins with ``->`` is a link."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            (folder / name).symlink_to(text[2:])
        else:
            (folder / name).write_text(text)
    return folder


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def aged(folder: Path) -> dict[str, int]:
    """Make all its files a day old."""
    for path in folder.rglob("*"):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    return times(folder)


def test_unchanged_sources_keep_their_times_and_changed_ones_do_not(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a.cu": "1", "b/c.cu": "2"}), work)
    before = aged(work)
    sync(write(tmp_path / "tree", {"a.cu": "1", "b/c.cu": "3"}), work)
    after = times(work)
    assert after["a.cu"] == before["a.cu"]
    assert after["b/c.cu"] > before["b/c.cu"]
    assert content(work) == {"a.cu": b"1", "b/c.cu": b"3"}


def test_what_is_gone_from_the_tree_goes_and_what_a_build_made_stays(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a.cu": "1", "old/b.cu": "2", "mixed/c.cu": "3"}), work)
    write(work / "build", {"a.o": "object"})
    (work / "mixed" / "c.o").write_text("object")
    sync(write(tmp_path / "tree", {"a.cu": "1"}), work)
    assert content(work) == {"a.cu": b"1", "build/a.o": b"object", "mixed/c.o": b"object"}
    assert not (work / "old").exists()


def test_a_source_that_a_build_changed_is_put_right(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"version.py": "0"}), work)
    (work / "version.py").write_text("1")
    sync(tmp_path / "tree", work)
    assert content(work) == {"version.py": b"0"}


def test_a_file_that_becomes_a_program_is_one(tmp_path):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"tool": "#!/bin/sh\n"}), work)
    (tmp_path / "tree" / "tool").chmod(0o755)
    sync(tmp_path / "tree", work)
    assert os.access(work / "tool", os.X_OK)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a": "file"}, {"a/b": "file in a folder"}),
        ({"a/b": "file in a folder"}, {"a": "file"}),
        ({"a": "->b", "b/c": "1"}, {"a/c": "2"}),
        ({"a/c": "2"}, {"a": "->b", "b/c": "1"}),
        ({"a": "file", "b": "x"}, {"a": "->b", "b": "x"}),
        ({"a": "->b", "b": "x"}, {"a": "x", "b": "x"}),
    ],
)
def test_files_folders_and_links_may_change_places(tmp_path, old, new):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", old), work)
    sync(write(tmp_path / "tree", new), work)
    assert content(work) == content(tmp_path / "tree")


def test_a_sync_that_was_killed_is_made_good_by_the_next(tmp_path, monkeypatch):
    work = tmp_path / "work"
    sync(write(tmp_path / "tree", {"a": "1", "b/c": "2", "z": "3"}), work)
    copy, left = shutil.copy, [1]

    def cut(source, target, **more):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        copy(source, target, **more)

    monkeypatch.setattr(shutil, "copy", cut)
    with contextlib.suppress(KeyboardInterrupt):
        sync(write(tmp_path / "tree", {"a/d": "1", "b": "2", "y": "3"}), work)
    monkeypatch.undo()
    sync(write(tmp_path / "tree", {"a": "4", "b/c": "5"}), work)
    assert content(work) == {"a": b"4", "b/c": b"5"}


NAMES = st.sampled_from(["a", "b", "c", "d/a", "d/b", "d/e/a", "a/x", "b/y/z"])
TREES = st.dictionaries(NAMES, st.sampled_from(["", "1", "22", "->c", "->d/b"]), max_size=6).filter(
    lambda files: not any(other.startswith(f"{name}/") for name in files for other in files)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=4))
def test_after_any_history_the_sources_are_those_of_the_tree_and_syncing_again_changes_nothing(history):
    with tempfile.TemporaryDirectory() as room:
        source, work = Path(room, "tree"), Path(room, "work")
        work.mkdir()
        (work / "made.o").write_text("object")
        for files in history:
            sync(write(source, files), work)
            assert content(work) == {**content(source), "made.o": b"object"}
        before = aged(work)
        sync(source, work)
        assert times(work) == before
