"""Real archives, good, broken and hostile; a real patch(1); and trees that a build goes on in."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.corruption import (
    NAMES,
    ORDINARY,
    TAR_MEMBERS,
    Room,
    TarMember,
    bounded,
    cases,
    damaged,
    tar_bytes,
    tar_damaged,
    tar_header,
    with_checksum,
    zip_fields,
)
from tests.support.rights import ordinary_user
from voltforge.sources import tree
from voltforge.sources.tree import ArchiveError, Limits, PatchError, grow, series, sync, unpack
from voltforge.system.files import remove

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


def ordinary(name: str, kind: bytes, to: str = "") -> TarMember:
    return TarMember(name, kind, to, 0, EPOCH, {}, "none")


def content(folder: Path) -> dict[str, bytes | str]:
    """The files of a folder: bytes, or where a link leads."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def problems(archive: Path, folder: Path, limits: Limits = tree.LIMITS) -> tuple[str, ...]:
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, folder, limits)
    return caught.value.problems


# --- unpacking ---


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_an_sdist_is_unpacked_without_its_top_folder(tmp_path, compression):
    members = [member("a-1.0", None), member("a-1.0/b/c.py", b"c"), link("a-1.0/d", "b/c.py")]
    archive = tar(tmp_path / f"a.tar.{compression}", *members, compression=compression)
    assert unpack(archive, tmp_path / "out") == EPOCH
    assert content(tmp_path / "out") == {"b/c.py": b"c", "d": "-> b/c.py"}


def test_a_link_that_only_the_top_folder_keeps_inside_is_refused(tmp_path):
    archive = tar(tmp_path / "a.tar", member("a-1.0/b", b"b"), link("a-1.0/c", "../secret"), compression="")
    [problem] = problems(archive, tmp_path / "out")
    assert problem == "c: links outside, to ../secret"
    assert not (tmp_path / "out").exists()


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
        ([member("a/../../evil")], "a/../../evil: leaves the folder with '..'"),
        ([member("a\\evil")], "'a\\\\evil': is not a portable name"),
        ([link("a", "/etc/passwd")], "a: links outside, to /etc/passwd"),
        ([link("a/b", "../../evil")], "a/b: links outside, to ../../evil"),
        ([link("a", "../evil", tarfile.LNKTYPE)], "a: links outside, to ../evil"),
        ([link("a", "/etc/passwd", tarfile.LNKTYPE)], "a: links outside, to /etc/passwd"),
        ([link("a", "b"), member("a/evil")], "a/evil: is below a link, a"),
        ([member("b", None), link("a", "b"), link("c", "a/x", tarfile.LNKTYPE)], "c: links to a/x, through a link"),
        ([member("a", kind=tarfile.CHRTYPE)], "a: is a device or a pipe"),
        ([member("a", kind=tarfile.BLKTYPE)], "a: is a device or a pipe"),
        ([member("a", kind=tarfile.FIFOTYPE)], "a: is a device or a pipe"),
        ([member("a"), member("./a")], "a: appears twice"),
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
    assert problem == "evil: links outside, to a/b/c/up/../../secret"
    unpack(tar(tmp_path / "b.tar.gz", member("x/y", b"y", mode=0o4711)), tmp_path / "fine")
    assert content(tmp_path / "fine") == {"y": b"y"}
    assert (tmp_path / "fine" / "y").stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["/etc/evil"], "/etc/evil: is absolute"),
        (["a/../../evil"], "a/../../evil: leaves the folder with '..'"),
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
    assert problems(tmp_path / "a.zip", tmp_path / "out") == ("a: is a link or a device",)


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "deb"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, kind):
    archive = tmp_path / f"bomb.{kind}"
    zeros = {"a": bytes(1_000_000), "b": bytes(1_000_000)}
    makers = {"tar.gz": tar, "deb": deb}
    if kind == "zip":
        bundle(archive, zeros)
    else:
        makers[kind](archive, *(member(name, data) for name, data in zeros.items()))
    assert archive.stat().st_size < 20_000
    assert problems(archive, tmp_path / "out", Limits(size=1_500_000)) == ("unpacks to more than 1.5 MB",)
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
    assert "download it again" in caught.value.hint


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


# --- what is made to do harm ---

COUNTED = "corrupt inputs refused or survived: archives"
SMALL = Limits(size=20_000, members=40)
PACKED = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return Room(tmp_path_factory.mktemp("room") / "watched")


def tried(room: Room, kind: str, data: bytes) -> None:
    """Unpack an archive in a watched room, under small bounds."""
    archive = room.path.parent / f"a.{kind}"
    archive.write_bytes(data)
    remove(room.out)
    with room.watched(ArchiveError, SMALL.size):
        unpack(archive, room.out, SMALL)


@functools.cache
def whole_tar() -> bytes:
    """A plain tar archive with one of everything that an sdist may have."""
    with tempfile.TemporaryDirectory() as folder:
        long = member(f"a/{'long' * 40}", b"long")
        long[0].pax_headers = {"mtime": "1700000000.5"}
        parts = [member("a", None), member("a/b", b"b" * 700), member("a/c", b"", mode=0o755), long]
        parts += [link("a/d", "b"), link("a/e", "a/b", tarfile.LNKTYPE), member("a/caf\u00e9", b"f")]
        return tar(Path(folder, "a.tar"), *parts, compression="").read_bytes()


@functools.cache
def whole_zip() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = bundle(Path(folder, "a.zip"), {"a/": b"", "a/b": b"b" * 700, "a/caf\u00e9": b"f", "a/c": b""})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a/stored", b"s" * 90, zipfile.ZIP_STORED)
        return path.read_bytes()


@functools.cache
def whole_deb() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        parts = [member("./usr/bin/tool", b"t", mode=0o755), link("./usr/bin/cc", "/etc/cc"), member("./b", b"b" * 700)]
        return deb(Path(folder, "a.deb"), *parts, compression="gz").read_bytes()


def test_the_archives_that_are_damaged_below_are_whole(tmp_path):
    for kind, pack in PACKED.items():
        (tmp_path / f"a.{kind}").write_bytes(pack(whole_tar()))
        assert unpack(tmp_path / f"a.{kind}", tmp_path / kind, SMALL) == EPOCH
        assert len(content(tmp_path / kind)) == 6
    for kind, data, count in (("zip", whole_zip(), 4), ("deb", whole_deb(), 2)):
        (tmp_path / f"a.{kind}").write_bytes(data)
        unpack(tmp_path / f"a.{kind}", tmp_path / kind, SMALL)
        assert len(content(tmp_path / kind)) == count


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
@cases(120)
@given(data=st.data())
def test_a_damaged_stream_is_refused_or_survived(room, counted, kind, data):
    tried(room, kind, data.draw(damaged(PACKED[kind](whole_tar()))))
    counted(COUNTED)


@cases(350)
@given(st.sampled_from(sorted(PACKED)), tar_damaged(whole_tar()))
def test_a_tar_archive_with_odd_headers_is_refused_or_survived(room, counted, kind, data):
    tried(room, kind, PACKED[kind](data))
    counted(COUNTED)


@cases(350)
@given(st.sampled_from(sorted(PACKED)), st.lists(TAR_MEMBERS, max_size=4), st.booleans())
@example("tar.gz", [TarMember("a", b"5", "", -512, 0, {}, "none")], True)
@example("tar.gz", [TarMember("a", b"0", "", 0, 0, {"size": "-1536"}, "none")], True)
@example("tar", [TarMember("a", b"0", "", 0, 0, {}, "endless")], True)
@example("tar", [TarMember("a", b"0", "", 0, 0, {}, "digits")], True)
@example("tar", [TarMember("a", b"x", "", -512, 0, {}, "none")], True)
def test_a_tar_archive_that_no_program_would_write_is_refused_or_survived(room, counted, kind, members, ended):
    tried(room, kind, PACKED[kind](tar_bytes(members, ended=ended)))
    counted(COUNTED)


@pytest.mark.filterwarnings("ignore:Python 3.14 will")
@pytest.mark.parametrize("filtered", [True, False])
@cases(150)
@given(st.lists(ORDINARY, min_size=1, max_size=6))
@example([ordinary("a/up", b"2", ".."), ordinary("evil", b"1", "a/up/../secret")])
@example([ordinary("a/b/up", b"2", "../.."), ordinary("e", b"2", "a/b/up/../folder"), ordinary("e", b"5")])
@example([ordinary("a", b"2", "b"), ordinary("b", b"2", "a")])
@example([ordinary("d/a", b"2", "../secret")])
def test_whatever_members_do_to_each_other_nothing_outside_changes(room, counted, monkeypatch, filtered, members):
    """With the filters of newer Pythons and without, as on Debian 12."""
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    tried(room, "tar", tar_bytes(members))
    counted(COUNTED)


@cases(250)
@given(damaged(whole_zip(), zip_fields(whole_zip())))
def test_a_damaged_zip_archive_is_refused_or_survived(room, counted, data):
    tried(room, "zip", data)
    counted(COUNTED)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@cases(100)
@given(st.lists(st.tuples(NAMES, st.sampled_from([0, 0o100644, 0o120777, 0o40755, 0o10644])), max_size=5))
def test_whatever_the_members_of_a_zip_archive_are_called_nothing_outside_changes(room, counted, members):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, mode in members:
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode()[:1000])
            info.external_attr = mode << 16
            archive.writestr(info, b"evil")
    tried(room, "zip", made.getvalue())
    counted(COUNTED)


@cases(120)
@given(st.one_of(damaged(whole_deb()), st.lists(TAR_MEMBERS, max_size=3)))
def test_a_damaged_debian_package_is_refused_or_survived(room, counted, damage):
    if isinstance(damage, list):
        damage = ar(("debian-binary", b"2.0\n"), ("control.tar", b""), ("data.tar", tar_bytes(damage)))
    tried(room, "deb", damage)
    counted(COUNTED)


def ar(*parts: tuple[str, bytes]) -> bytes:
    """An archive as ar(5) has it, whatever its parts are called."""
    heads = [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() for name, data in parts]
    return b"!<arch>\n" + b"".join(
        head + data + b"\n" * (len(data) % 2) for head, (_, data) in zip(heads, parts, strict=True)
    )


@pytest.mark.parametrize("names", [["data.tar", "data.tar.gz"], ["data.txt"], ["../data.tar"], ["control.tar"]])
def test_a_debian_package_needs_its_files_in_one_part_of_the_right_name(room, names):
    parts = [(name, tar_bytes([ordinary("a", b"0")])) for name in names]
    archive = room.path.parent / "a.deb"
    archive.write_bytes(ar(("debian-binary", b"2.0\n"), *parts))
    assert problems(archive, room.out) == ("is not a Debian package that ar can read",)


# --- bombs ---


def claiming(size: int) -> bytes:
    """A tar archive whose one file is said to have so many bytes, and has as many as 100 kB at most."""
    return tar_header(b"a", b"0", b"", size, EPOCH) + bytes(min(100_352, -(-size // 512) * 512)) + bytes(1024)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("size", [20_001, 1 << 33, 1 << 62])
def test_what_a_tar_archive_says_it_unpacks_to_is_bounded(tmp_path, kind, size):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(PACKED[kind](claiming(size)))
    with bounded():
        assert problems(archive, tmp_path / "out", SMALL) == ("unpacks to more than 20.0 kB",)
    assert not (tmp_path / "out").exists()


def test_the_bound_is_the_last_that_is_allowed(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(claiming(SMALL.size))
    unpack(archive, tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "a").stat().st_size == SMALL.size


@pytest.mark.parametrize(
    ("kind", "pack"), [("tar.gz", gzip.compress), ("tar.bz2", bz2.compress), ("tar.xz", lzma.compress)]
)
def test_a_gigabyte_behind_the_end_of_an_archive_is_not_read(tmp_path, kind, pack):
    archive = tmp_path / f"a.{kind}"
    # Each of the three reads on where another compressed piece follows.
    archive.write_bytes(pack(tar_bytes([ordinary("a", b"0")])) + pack(bytes(10_000_000)) * 100)
    begin = time.process_time()
    with bounded():
        assert problems(archive, tmp_path / "out") == ("is broken: it continues after its end",)
    assert time.process_time() - begin < 3


def test_a_sparse_file_of_a_few_bytes_that_writes_many_is_refused(tmp_path):
    header = bytearray(tar_header(b"a", b"S", b"", 1 << 30, EPOCH))
    header[386:410] = b"00000000000\0" + b"10000000000\0"  # a gigabyte of data at its beginning
    header[483:495] = b"00000000001\0"  # and one byte in all
    archive = tmp_path / "a.tar"
    archive.write_bytes(with_checksum(header) + bytes(100_000))
    assert problems(archive, tmp_path / "out", SMALL) == ("a: is a sparse file",)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_of_a_gigabyte_is_not_read(tmp_path, kind):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(
        gzip.compress(tar_header(b"pax", kind, b"", 1 << 30, 0)) + gzip.compress(bytes(10_000_000)) * 100
    )
    with bounded():
        [problem] = problems(archive, tmp_path / "out")
    assert problem == "is broken: a member's headers are too long, or have a negative length"


def test_many_members_that_each_repeat_thousands_of_global_headers_are_refused(tmp_path):
    records = b"".join(f"13 k{number:04}=abc\n".encode() for number in range(5000))
    members = [ordinary(f"d/{number}", b"0") for number in range(3000)]
    archive = tmp_path / "a.tar"
    head = tar_header(b"pax", b"g", b"", len(records), 0) + records + bytes(-len(records) % 512)
    archive.write_bytes(head + tar_bytes(members))
    with bounded():
        assert problems(archive, tmp_path / "out") == ("has more than 100 global headers",)


@pytest.mark.parametrize("kind", ["tar", "zip", "deb"])
def test_more_members_than_the_bound_are_refused(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    names = [f"a/{number}" for number in range(41)]
    if kind == "zip":
        bundle(archive, dict.fromkeys(names, b""))
    else:
        data = tar_bytes([ordinary(name, b"0") for name in names])
        archive.write_bytes(data if kind == "tar" else ar(("debian-binary", b"2.0\n"), ("data.tar", data)))
    assert problems(archive, tmp_path / "out", SMALL) == ("has more than 40 members",)
    assert not (tmp_path / "out").exists()


def test_a_zip_archive_never_gives_more_than_its_directory_states(tmp_path):
    """However much there is to inflate: whoever trusts the other header would write 5 MB."""
    archive = bundle(tmp_path / "a.zip", {"a": bytes(5_000_000)})
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = (100).to_bytes(4, "little")
    archive.write_bytes(data)
    [problem] = problems(archive, tmp_path / "out")
    assert problem == "a: its own header and the archive's directory differ"
    at = data.index(b"PK\3\4") + 22
    data[at : at + 4] = (100).to_bytes(4, "little")
    archive.write_bytes(data)
    with bounded():
        [problem] = problems(archive, tmp_path / "out")
    assert problem.startswith("is broken: Bad CRC-32")
    assert (tmp_path / "out" / "a").stat().st_size <= 100


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ways_of_compression_that_inflate_without_bounds_are_refused(tmp_path, method):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", method) as made:
        made.writestr("a", bytes(30_000_000))
    with bounded():
        assert problems(archive, tmp_path / "out") == ("a: is not compressed by deflate",)


def test_members_of_a_zip_archive_that_share_their_bytes_are_refused(tmp_path):
    archive = bundle(tmp_path / "a.zip", {"a": b"a" * 99, "b": b"a" * 99})
    data = bytearray(archive.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[second + 42 : second + 46] = bytes(4)  # its file is where the first one's is
    archive.write_bytes(data)
    found = problems(archive, tmp_path / "out")
    assert "b: overlaps another member" in found
    assert "b: its own header and the archive's directory differ" in found


# --- names and links ---


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a/A.txt", "a/a.txt"], "a/a.txt: is the same as a/A.txt on file systems that ignore case"),
        (["Doc/x", "doc/y"], "doc: is the same as Doc on file systems that ignore case"),
        (["stra\u00dfe", "STRASSE"], "stra\u00dfe: is the same as STRASSE on file systems that ignore case"),
        (["caf\u00e9", "cafe\u0301"], "caf\u00e9: is the same as cafe\u0301 on file systems that ignore case"),
        (["a", "a/b"], "a: is both a file and a folder"),
        (["a\nb"], "'a\\nb': is not a portable name"),
        (["a\x1b[2J"], "'a\\x1b[2J': is not a portable name"),
        (["x" * 256], f"{'x' * 200}\u2026: the name is too long"),
        (["/".join(["x" * 99] * 11)], f"{'/'.join(['x' * 99] * 11)[:200]}\u2026: the name is too long"),
        (["d/" * 60 + "x"], f"{'d/' * 60}x: is nested too deeply"),
        (["./"], None),
    ],
)
def test_names_that_not_every_file_system_keeps_apart_or_takes_are_refused(tmp_path, kind, names, problem):
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        bundle(archive, {"good": b"", **dict.fromkeys(names, b"")})
    else:
        tar(
            archive,
            member("good"),
            *(member(name, None if name.endswith("/") else b"") for name in names),
            compression="",
        )
    if problem:
        assert problems(archive, tmp_path / "out") == (problem,)
        assert not (tmp_path / "out").exists()
    else:
        unpack(archive, tmp_path / "out")


def test_a_debian_package_may_have_names_that_differ_in_case_as_the_kernels_headers_do(tmp_path):
    archive = deb(tmp_path / "a.deb", member("./xt_MARK.h", b"1"), member("./xt_mark.h", b"2"))
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"xt_MARK.h": b"1", "xt_mark.h": b"2"}


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_header(b"caf\xe9", b"0", b"", 0, EPOCH) + bytes(1024))
    assert problems(archive, tmp_path / "out") == ("'caf\\udce9': is not a portable name",)


@pytest.mark.filterwarnings("ignore:Python 3.14 will")
@pytest.mark.parametrize(
    ("members", "problem"),
    [
        # os.link resolves the name with its links, os.path.normpath without.
        ([link("a/up", ".."), link("evil", "a/up/../secret", tarfile.LNKTYPE)], "links to a/up/../secret, which is no"),
        # tarfile would give the folder outside the mode and the time of the archive's.
        ([link("a/b/up", "../.."), link("evil", "a/b/up/../folder"), member("evil", None)], "evil: is both a file and"),
        ([link("a", "b"), link("b", "a")], "a: links to itself, through other links"),
        ([member("a", kind=b"Z")], "a: has the unknown type b'Z'"),
        ([link("a", "x\ny")], "a: links to 'x\\ny', which is not a portable name"),
        ([member("./", b"")], "./: is not the name of a file"),
    ],
)  # fmt: skip
def test_ways_out_that_older_pythons_leave_open_are_closed(room, monkeypatch, members, problem):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = tar(room.path.parent / "a.tar", *members, compression="")
    remove(room.out)
    with room.watched(ArchiveError) as caught:
        unpack(archive, room.out)
    assert problem in caught[0].problems[0]


@pytest.mark.parametrize("when", ["nan", "inf", "-inf", "1e18"])
def test_a_time_that_is_none_is_refused_before_anything_is_written(tmp_path, when):
    part = member("a", b"a")
    part[0].pax_headers = {"mtime": when}
    archive = tar(tmp_path / "a.tar", part, compression="")
    assert problems(archive, tmp_path / "out") == ("a: has a time that no calendar supports",)


def test_a_tar_archive_that_is_damaged_in_its_middle_is_not_taken_for_a_shorter_one(tmp_path):
    """tarfile takes a header that is none for the end."""
    archive = tar(tmp_path / "a.tar", member("a", b"a"), member("b", b"b"), compression="")
    data = bytearray(archive.read_bytes())
    data[1024 + 148] ^= 1  # the second header's checksum
    archive.write_bytes(data)
    assert problems(archive, tmp_path / "out") == (
        "is broken: the data at byte 1024 is neither a member nor the end of the archive",
    )
    archive.write_bytes(archive.read_bytes()[:1024])
    assert len(problems(archive, tmp_path / "out")) == 1


def test_a_wrong_checksum_at_the_end_of_a_stream_is_found(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", member("a", b"a"))
    data = bytearray(archive.read_bytes())
    data[-8] ^= 1
    archive.write_bytes(data)
    [problem] = problems(archive, tmp_path / "out")
    assert problem.startswith("is broken: CRC check failed")


def test_an_archive_of_nothing_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    assert problems(tmp_path / "a.tar", tmp_path / "out") == ("is broken: it is empty",)


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


def test_a_patch_that_fails_says_what_of_its_upstream_to_look_at_again(tmp_path, source, repository):
    """With the words of its header, on a newer tree; here with one of vLLM's own patches."""
    [ours] = (repository / "patches" / "vllm").glob("*-window-maximum.patch")
    upstream = source / "vllm/attention/ops/triton_unified_attention.py"
    upstream.parent.mkdir(parents=True)
    upstream.write_text("".join(LINES))
    with pytest.raises(PatchError) as caught:
        tree.apply(tree.Patch(ours, "", ""), source)
    assert "vllm/attention/ops/triton_unified_attention.py: Hunk #1 FAILED" in caught.value.what
    assert "whether M is still set to m_j; run `python -m volta.numerics`" in caught.value.hint
    with pytest.raises(PatchError) as caught:
        tree.apply(patch(tmp_path / "patches", "Subject: s\n---\n" + diff(LINES, LINES[3:])), source / "vllm")
    assert "check these places in the source: the places that it names" in caught.value.hint


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
