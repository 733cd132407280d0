"""Archives are unpacked safely or refused, and nothing is written outside."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
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
from tests.support.source_files import (
    EPOCH,
    NOISE,
    bundle,
    content,
    deb,
    link,
    member,
    tar,
)
from voltforge.errors import VoltforgeError
from voltforge.sources import archive
from voltforge.sources.archive import ArchiveError, Limits, unpack
from voltforge.system.files import remove


def ordinary(name: str, kind: bytes, to: str = "") -> TarMember:
    return TarMember(name, kind, to, 0, EPOCH, {}, "none")


def problems(archive: Path, folder: Path, limits: Limits = archive.LIMITS) -> tuple[str, ...]:
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, folder, limits)
    return caught.value.problems


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_an_sdist_is_unpacked_without_its_top_folder(tmp_path, compression):
    members = [member("a-1.0", None), member("a-1.0/b/c.py", b"c"), link("a-1.0/d", "b/c.py")]
    archive = tar(tmp_path / f"a.tar.{compression}", *members, compression=compression)
    assert unpack(archive, tmp_path / "out") == EPOCH
    assert content(tmp_path / "out") == {"b/c.py": b"c", "d": "-> b/c.py"}


def test_a_link_that_leaves_the_tree_without_its_top_folder_is_refused(tmp_path):
    archive = tar(tmp_path / "a.tar", member("a-1.0/b", b"b"), link("a-1.0/c", "../secret"), compression="")
    [problem] = problems(archive, tmp_path / "out")
    assert problem == "c: links outside, to ../secret"
    assert not (tmp_path / "out").exists()


def test_several_top_level_entries_keep_their_paths(tmp_path):
    archive = bundle(tmp_path / "a-1.0-py3-none-any.whl", {"a/b.py": b"b", "a-1.0.dist-info/METADATA": b"m"})
    unpack(archive, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == ["a-1.0.dist-info/METADATA", "a/b.py"]


def test_a_top_folder_can_contain_a_folder_with_its_name(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", member("a/a/a/file", b"x"), member("a/.a.lifted/file", b"y"))
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"a/a/file": b"x", ".a.lifted/file": b"y"}


def test_the_newest_member_gives_the_time_of_a_zip(tmp_path):
    assert unpack(bundle(tmp_path / "a.zip", {"a": b"", "b": b""}), tmp_path / "out") == EPOCH


def test_a_zip_without_times_gets_a_default_time(tmp_path):
    archive = bundle(tmp_path / "a.zip", {"a": b""})
    raw = archive.read_bytes()
    time = b"\xaa\xb1\x6e\x57"  # MS-DOS time and date of EPOCH, in the local header and in the central directory
    assert raw.count(time) == 2
    archive.write_bytes(raw.replace(time, bytes(4)))
    assert unpack(archive, tmp_path / "out") == 315532800


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_a_debian_package_is_unpacked_without_its_absolute_links(tmp_path, compression):
    members = [
        member("./usr/bin/tool", b"t", mode=0o755),
        link("./usr/bin/cc", "/etc/alternatives/cc"),
        member("./etc/c", b"c"),
    ]
    archive = deb(tmp_path / "tool_1_amd64.deb", *members, compression=compression)
    assert unpack(archive, tmp_path / "out") == EPOCH
    assert content(tmp_path / "out") == {"usr/bin/tool": b"t", "etc/c": b"c"}


def test_modes_are_normalized_and_files_belong_to_the_user(tmp_path):
    modes = {"plain": 0o600, "program": 0o700, "setuid": 0o4755, "writable": 0o666, "secret": 0o000}
    unpack(
        tar(tmp_path / "a.tar.gz", *(member(name, b"", mode=mode) for name, mode in modes.items())), tmp_path / "out"
    )
    found = {path.name: oct(path.stat().st_mode)[-4:] for path in (tmp_path / "out").iterdir()}
    plain, program = "0644", "0755"
    assert found == {"plain": plain, "program": program, "setuid": program, "writable": plain, "secret": plain}
    assert {path.stat().st_uid for path in (tmp_path / "out").iterdir()} == {os.getuid()}


def test_a_read_only_folder_can_be_filled_and_removed():
    members = [member("a", None, mode=0o000), member("a/b", None, mode=0o000), member("a/b/c", b"c")]
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        unpack(tar(Path(room, "a.tar.gz"), *members), Path(room, "out"))
        assert content(Path(room, "out")) == {"b/c": b"c"}


def test_hard_links_inside_are_kept(tmp_path):
    unpack(tar(tmp_path / "a.tar.gz", member("a/one", b"1"), link("a/two", "a/one", tarfile.LNKTYPE)), tmp_path / "out")
    assert content(tmp_path / "out") == {"one": b"1", "two": b"1"}


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
def test_a_harmful_tar_member_is_refused_before_anything_is_written(tmp_path, members, problem):
    out = tmp_path / "room" / "out"
    assert problem in problems(tar(tmp_path / "a.tar.gz", member("good"), *members), out)
    assert not out.exists()


@pytest.mark.parametrize("order", [1, -1])
def test_links_that_leave_the_tree_only_together_are_refused(tmp_path, order):
    """Each of them stays inside by its words; what they lead to does not."""
    links = [link("a/b/c/up", "../../.."), link("evil", "a/b/c/up/../../secret")][::order]
    (tmp_path / "secret").touch()
    [problem] = problems(tar(tmp_path / "a.tar.gz", member("a/b/c/file"), *links), tmp_path / "room" / "out")
    assert "evil" in problem or "outside" in problem


@pytest.mark.filterwarnings("ignore:Python 3.14 will")
def test_no_tar_name_writes_outside_even_if_tarfile_allows_it(tmp_path, monkeypatch):
    """Python 3.10.11 and Debian 12 have a tarfile without filters."""
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
def test_a_harmful_zip_member_is_refused_before_anything_is_written(tmp_path, names, problem):
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
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, kind):
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


def test_many_problems_are_reported_at_once_up_to_a_limit(tmp_path):
    named = problems(
        tar(tmp_path / "a.tar.gz", member("/one"), link("two", "/etc"), member("../three")), tmp_path / "out"
    )
    assert len(named) == 3
    many = problems(tar(tmp_path / "b.tar.gz", *(member(f"/{number}") for number in range(500))), tmp_path / "out")
    assert len(many) == 20


def test_the_error_names_the_archive_and_a_remedy(tmp_path):
    with pytest.raises(ArchiveError) as caught:
        unpack(tar(tmp_path / "a-1.0.tar.gz", member("/evil")), tmp_path / "out")
    assert caught.value.what == "a-1.0.tar.gz was not unpacked:\n  - /evil: is absolute"
    assert "download it again" in caught.value.hint


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
def test_a_truncated_archive_is_reported_as_broken(tmp_path, kind, keep):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(ARCHIVES[kind][:keep])
    assert len(problems(archive, tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ARCHIVES)
def test_another_file_with_the_name_of_an_archive_is_reported_as_broken(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(b"<html>502 Bad Gateway</html>" * 100)
    [problem] = problems(archive, tmp_path / "out")
    assert problem.startswith("is ")


def test_a_hard_link_without_target_is_reported_as_broken(tmp_path):
    [problem] = problems(tar(tmp_path / "a.tar.gz", link("a", "nothing", tarfile.LNKTYPE)), tmp_path / "out")
    assert problem == "is broken: \"linkname 'nothing' not found\""


def test_an_encrypted_zip_is_reported_as_broken(tmp_path):
    raw = bytearray(bundle(tmp_path / "a.zip", {"a": b"secret"}).read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(header) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(raw)
    [problem] = problems(tmp_path / "a.zip", tmp_path / "out")
    assert "encrypted" in problem


def test_a_missing_archive_is_reported(tmp_path):
    [problem] = problems(tmp_path / "no.tar.gz", tmp_path / "out")
    assert problem == f"{tmp_path / 'no.tar.gz'}: No such file or directory"


def test_an_unwritable_target_folder_is_reported(tmp_path):
    (tmp_path / "out").write_text("in the way")
    [problem] = problems(tar(tmp_path / "a.tar.gz", member("a", b"a")), tmp_path / "out")
    assert str(tmp_path / "out") in problem


def test_without_ar_the_error_names_the_package_to_install(tmp_path, monkeypatch):
    archive = deb(tmp_path / "a.deb", member("./a"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VoltforgeError, match="binutils"):
        unpack(archive, tmp_path / "out")


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


def test_undamaged_archives_are_unpacked(tmp_path):
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
def test_a_damaged_stream_is_refused_or_unpacked_safely(room, counted, kind, data):
    tried(room, kind, data.draw(damaged(PACKED[kind](whole_tar()))))
    counted(COUNTED)


@cases(350)
@given(st.sampled_from(sorted(PACKED)), tar_damaged(whole_tar()))
def test_a_tar_archive_with_strange_headers_is_refused_or_unpacked_safely(room, counted, kind, data):
    tried(room, kind, PACKED[kind](data))
    counted(COUNTED)


@cases(350)
@given(st.sampled_from(sorted(PACKED)), st.lists(TAR_MEMBERS, max_size=4), st.booleans())
@example("tar.gz", [TarMember("a", b"5", "", -512, 0, {}, "none")], True)
@example("tar.gz", [TarMember("a", b"0", "", 0, 0, {"size": "-1536"}, "none")], True)
@example("tar", [TarMember("a", b"0", "", 0, 0, {}, "endless")], True)
@example("tar", [TarMember("a", b"0", "", 0, 0, {}, "digits")], True)
@example("tar", [TarMember("a", b"x", "", -512, 0, {}, "none")], True)
def test_an_impossible_tar_archive_is_refused_or_unpacked_safely(room, counted, kind, members, ended):
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
def test_no_combination_of_tar_members_changes_files_outside(room, counted, monkeypatch, filtered, members):
    """With the filters of newer Pythons and without, as on Debian 12."""
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    tried(room, "tar", tar_bytes(members))
    counted(COUNTED)


@cases(250)
@given(damaged(whole_zip(), zip_fields(whole_zip())))
def test_a_damaged_zip_archive_is_refused_or_unpacked_safely(room, counted, data):
    tried(room, "zip", data)
    counted(COUNTED)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@cases(100)
@given(st.lists(st.tuples(NAMES, st.sampled_from([0, 0o100644, 0o120777, 0o40755, 0o10644])), max_size=5))
def test_no_names_of_zip_members_change_files_outside(room, counted, members):
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
def test_a_damaged_debian_package_is_refused_or_unpacked_safely(room, counted, damage):
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


def claiming(size: int) -> bytes:
    """A tar archive whose one file is said to have so many bytes, and has as many as 100 kB at most."""
    return tar_header(b"a", b"0", b"", size, EPOCH) + bytes(min(100_352, -(-size // 512) * 512)) + bytes(1024)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("size", [20_001, 1 << 33, 1 << 62])
def test_the_stated_size_of_a_tar_archive_is_limited(tmp_path, kind, size):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(PACKED[kind](claiming(size)))
    with bounded():
        assert problems(archive, tmp_path / "out", SMALL) == ("unpacks to more than 20.0 kB",)
    assert not (tmp_path / "out").exists()


def test_a_size_equal_to_the_limit_is_allowed(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(claiming(SMALL.size))
    unpack(archive, tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "a").stat().st_size == SMALL.size


@pytest.mark.parametrize(
    ("kind", "pack"), [("tar.gz", gzip.compress), ("tar.bz2", bz2.compress), ("tar.xz", lzma.compress)]
)
def test_a_gigabyte_after_the_end_of_an_archive_is_not_read(tmp_path, kind, pack):
    archive = tmp_path / f"a.{kind}"
    # Each of the three reads on where another compressed piece follows.
    archive.write_bytes(pack(tar_bytes([ordinary("a", b"0")])) + pack(bytes(10_000_000)) * 100)
    begin = time.process_time()
    with bounded():
        assert problems(archive, tmp_path / "out") == ("is broken: it continues after its end",)
    assert time.process_time() - begin < 3


def test_a_small_sparse_member_that_writes_many_bytes_is_refused(tmp_path):
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


def test_repeated_global_headers_are_limited(tmp_path):
    records = b"".join(f"13 k{number:04}=abc\n".encode() for number in range(5000))
    members = [ordinary(f"d/{number}", b"0") for number in range(3000)]
    archive = tmp_path / "a.tar"
    head = tar_header(b"pax", b"g", b"", len(records), 0) + records + bytes(-len(records) % 512)
    archive.write_bytes(head + tar_bytes(members))
    with bounded():
        assert problems(archive, tmp_path / "out") == ("has more than 100 global headers",)


@pytest.mark.parametrize("kind", ["tar", "zip", "deb"])
def test_more_members_than_the_limit_are_refused(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    names = [f"a/{number}" for number in range(41)]
    if kind == "zip":
        bundle(archive, dict.fromkeys(names, b""))
    else:
        data = tar_bytes([ordinary(name, b"0") for name in names])
        archive.write_bytes(data if kind == "tar" else ar(("debian-binary", b"2.0\n"), ("data.tar", data)))
    assert problems(archive, tmp_path / "out", SMALL) == ("has more than 40 members",)
    assert not (tmp_path / "out").exists()


def test_a_zip_archive_never_unpacks_to_more_than_its_directory_states(tmp_path):
    """A reader that trusts the local header would write 5 MB."""
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
def test_compression_methods_without_a_limit_are_refused(tmp_path, method):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", method) as made:
        made.writestr("a", bytes(30_000_000))
    with bounded():
        assert problems(archive, tmp_path / "out") == ("a: is not compressed by deflate",)


def test_overlapping_zip_members_are_refused(tmp_path):
    archive = bundle(tmp_path / "a.zip", {"a": b"a" * 99, "b": b"a" * 99})
    data = bytearray(archive.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[second + 42 : second + 46] = bytes(4)  # its file is where the first one's is
    archive.write_bytes(data)
    found = problems(archive, tmp_path / "out")
    assert "b: overlaps another member" in found
    assert "b: its own header and the archive's directory differ" in found


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
def test_names_that_some_file_systems_confuse_or_refuse_are_refused(tmp_path, kind, names, problem):
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


def test_a_debian_package_may_have_names_that_differ_only_in_case(tmp_path):
    archive = deb(tmp_path / "a.deb", member("./xt_MARK.h", b"1"), member("./xt_mark.h", b"2"))
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"xt_MARK.h": b"1", "xt_mark.h": b"2"}


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
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
def test_escapes_that_older_pythons_allow_are_refused(room, monkeypatch, members, problem):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = tar(room.path.parent / "a.tar", *members, compression="")
    remove(room.out)
    with room.watched(ArchiveError) as caught:
        unpack(archive, room.out)
    assert problem in caught[0].problems[0]


@pytest.mark.parametrize("when", ["nan", "inf", "-inf", "1e18"])
def test_an_invalid_time_is_refused_before_anything_is_written(tmp_path, when):
    part = member("a", b"a")
    part[0].pax_headers = {"mtime": when}
    archive = tar(tmp_path / "a.tar", part, compression="")
    assert problems(archive, tmp_path / "out") == ("a: has a time that no calendar supports",)


def test_a_tar_archive_damaged_in_the_middle_is_not_read_as_a_shorter_one(tmp_path):
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


def test_an_empty_archive_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    assert problems(tmp_path / "a.tar", tmp_path / "out") == ("is broken: it is empty",)
