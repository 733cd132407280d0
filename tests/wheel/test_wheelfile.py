"""Wheels are read safely, tagged for their binaries' needs, and equal content gives equal bytes."""

import functools
import io
import os
import stat
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.tags import Tag
from packaging.version import Version

from tests.support.corruption import Room, bounded, cases, damaged, zip_fields
from tests.support.samples import EPOCH, METADATA, WHEEL, compiled, tree, unpacked, wheel
from voltforge.binary.elf import Elf
from voltforge.sources.archive import Limits
from voltforge.system import programs
from voltforge.system.files import remove
from voltforge.wheel.wheelfile import (
    Wheel,
    WheelError,
    finish,
    metadata_bytes,
    normalise,
    platform_tag,
    record_problems,
    unpack,
)

PACKAGE = {"sample/__init__.py": "answer = 42\n", "sample/data.txt": "data\n"}


def archive(path: Path, entries: dict[str, str | bytes], **attributes: int) -> Path:
    """Write a zip file with these entries, whatever their names; ``attributes`` are set on each entry."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            for attribute, value in attributes.items():
                setattr(entry, attribute, value)
            file.writestr(entry, data)
    return path


def parts(name: str = "sample", version: str = "1.0", more: str = "") -> dict[str, str | bytes]:
    return {
        "sample-1.0.dist-info/METADATA": METADATA.format(name=name, version=version, more=more),
        "sample-1.0.dist-info/WHEEL": WHEEL.format(tag="py3-none-any"),
    }


def test_read_returns_name_version_tags_and_requirements(tmp_path):
    path = wheel(tmp_path, PACKAGE, metadata="Requires-Dist: torch==2.9.0\nRequires-Dist: ray; extra == 'ray'\n")
    found = Wheel.read(path)
    assert (found.name, found.version) == ("sample", Version("1.0"))
    assert found.tags == found.declared == {Tag("py3", "none", "any")}
    assert [str(requirement) for requirement in found.requires] == ["torch==2.9.0", 'ray; extra == "ray"']


@pytest.mark.parametrize(
    ("name", "entries", "why"),
    [
        ("sample.whl", parts(), "does not have a wheel's file name"),
        ("sample-1.0-py3-none-any.whl", {"a.py": ""}, "has 0 dist-info folders instead of one"),
        ("sample-1.0-py3-none-any.whl", {**parts(), "b-1.dist-info/WHEEL": ""}, "has 2 dist-info folders"),
        ("sample-1.1-py3-none-any.whl", parts(version="1.1"), "has sample-1.0.dist-info, which does not match"),
        ("sample-1.0-py3-none-any.whl", parts(name="other"), "has the metadata of other 1.0, not of sample 1.0"),
        ("sample-1.0-py3-none-any.whl", parts(more="Requires-Dist: ~~\n"), "is not a well-formed wheel"),
        ("sample-1.0-py3-none-any.whl", {"sample-1.0.dist-info/WHEEL": ""}, "has no sample-1.0.dist-info/METADATA"),
        ("sample-1.0-py3-none-any.whl", {**parts(), "sample-1.0.dist-info/WHEEL": "Wheel-Version: 2.0\n"}, "2.0"),
        ("sample-1.0-py3-none-any.whl", {**parts(), "sample-1.0.dist-info/METADATA": b"\xff\xfe"}, "well-formed"),
    ],
)
def test_contradictory_wheel_is_refused_in_a_sentence(tmp_path, name, entries, why):
    with pytest.raises(WheelError, match=why):
        Wheel.read(archive(tmp_path / name, entries))


def test_file_that_is_not_a_zip_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    path.write_bytes(b"<html>404</html>")
    for open_it in (Wheel.read, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(WheelError, match="not a zip file"):
            open_it(path)


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "a//b", "./a", "a\\..\\evil", "..", "a/./b", "C:\\evil", "a/.."]
)
def test_entry_outside_the_folder_is_refused(tmp_path, name):
    path = archive(tmp_path / "bad.whl", {"good.py": "", name: "evil"})
    with pytest.raises(WheelError, match="is not safe to unpack"):
        unpack(path, tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "a: is a link or a device"),
        ({"external_attr": (stat.S_IFIFO | 0o666) << 16}, "a: is a link or a device"),
    ],
)
def test_links_and_devices_are_refused(tmp_path, attributes, why):
    path = archive(tmp_path / "bad.whl", {"a": "/etc/passwd"}, **attributes)
    with pytest.raises(WheelError, match=why):
        unpack(path, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_all_bad_entries_are_named_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as file:
        for name in ("../evil", "twice", "twice", "/evil"):
            file.writestr(name, "")
    with pytest.raises(WheelError) as caught:
        unpack(tmp_path / "bad.whl", tmp_path / "out")
    assert caught.value.what.count("\n  - ") == 3


def test_path_that_is_both_file_and_folder_is_refused(tmp_path):
    with pytest.raises(WheelError, match="a: is both a file and a folder"):
        unpack(archive(tmp_path / "bad.whl", {"a": "", "a/b": ""}), tmp_path / "out")


def test_only_files_marked_executable_are_unpacked_executable(tmp_path):
    old = os.umask(0o077)
    try:
        unpack(archive(tmp_path / "a.whl", {"tool": ""}, external_attr=(stat.S_IFREG | 0o777) << 16), tmp_path / "out")
        unpack(archive(tmp_path / "b.whl", {"text": ""}, external_attr=0), tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out" / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "text").stat().st_mode) == 0o644


COUNTED = "corrupt inputs refused or survived: wheels"
SMALL = Limits(size=20_000, members=40)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return Room(tmp_path_factory.mktemp("room") / "watched")


def tried(room: Room, data: bytes, name: str = "sample-1.0-py3-none-any.whl") -> None:
    """Read and unpack a wheel in a watched folder, and validate its RECORD; each step on its own."""
    path = room.path.parent / name
    path.write_bytes(data)
    remove(room.out)
    with room.watched(WheelError):
        Wheel.read(path, SMALL)
        metadata_bytes(path)
    with room.watched(WheelError, SMALL.size):
        unpack(path, room.out, SMALL)
        assert all("\n" not in problem and len(problem) < 1000 for problem in record_problems(room.out))


@functools.cache
def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        metadata = "Requires-Dist: torch==2.9.0; python_version > '3'\n\nA long\ntext.\n"
        return wheel(Path(folder), {**PACKAGE, "sample/big": "z" * 3000}, metadata=metadata).read_bytes()


def test_undamaged_base_of_the_damage_tests_is_valid(tmp_path):
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    path.write_bytes(whole())
    assert Wheel.read(path, SMALL).requires
    unpack(path, tmp_path / "out", SMALL)
    assert record_problems(tmp_path / "out") == []


@cases(500)
@given(damaged(whole(), zip_fields(whole())))
def test_damaged_wheel_never_writes_outside_the_folder(room, counted, data):
    tried(room, data)
    counted(COUNTED)


LINES = st.one_of(
    st.sampled_from(
        ["Metadata-Version: 2.1", "Metadata-Version: 99", "Name: sample", "Name: ../x", "Version: 1.0",
         "Version: " + "9" * 5000, "Requires-Dist: a" + "[" * 500, "Requires-Dist: a; " + "(" * 3000,
         "Requires-Python: >=" + "1." * 3000 + "1", "Wheel-Version: 1.0", "Wheel-Version: \x1b[2J",
         "Tag: py3-none-any", "Tag: " + "-".join(["a." * 400 + "a"] * 3), "Tag: a", "Tag: ---", "Build: 1",
         "Content-Type: text/plain; " + "a=" * 999, " folded", "", "\0", ": x", "=?utf-8?q?=ff?=",
         "sample/data.txt,sha256=,5", "sample/data.txt,sha256=x,-1", '"', '"open', "a,b,c,d", "\x1b[2J,,", "sample,,",
         "../secret,sha256=x,1", "/etc/passwd,sha256=x,1", "sample-1.0.dist-info/RECORD,,", "x" * 140_000 + ",,"]
    ),
    st.text(max_size=40),
)  # fmt: skip


@cases(400)
@given(
    st.dictionaries(
        st.sampled_from(["METADATA", "WHEEL", "RECORD"]),
        st.tuples(st.lists(LINES, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\r", "\x85"])),
        min_size=1,
    )
)
def test_arbitrary_metadata_is_read_or_refused(room, counted, texts):
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole())) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if change := texts.get(entry.filename.rpartition("/")[2]):
                lines, added, end = change
                data = (data if added else b"") + end.join([*lines, ""]).encode("utf-8", "surrogatepass")
            new.writestr(entry, data)
    tried(room, made.getvalue())
    counted(COUNTED)


@cases(150)
@given(
    st.one_of(
        st.sampled_from(
            ["1" * 200, "a-1.0", "sample-1.0-1-py3-none-any-x", "sample-1!2.dev3+l.4-py3-none-any", "-----"]
        ),
        st.text(st.sampled_from("ab19.-_+! \u00e9\n"), min_size=1, max_size=60),
        st.builds("sample-{}-{}-{}-{}".format, *[st.text(st.sampled_from("ab1._"), max_size=30)] * 4),
    )
)
def test_arbitrary_file_name_is_read_or_refused(room, counted, name):
    path = room.path.parent / f"{name}.whl"
    path.write_bytes(whole())
    with room.watched(WheelError):
        Wheel.read(path)
    path.unlink()
    counted(COUNTED)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@cases(150)
@given(st.lists(st.text(st.sampled_from("abA./\\~ \0\u00e9\u0301\n"), min_size=1, max_size=8), max_size=4))
def test_arbitrary_entry_names_never_write_outside_the_folder(room, counted, names):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), b"x")
    tried(room, made.getvalue())
    counted(COUNTED)


@pytest.mark.parametrize("size", [20_001, 0xFFFFFFFE])
def test_declared_size_over_the_limit_is_refused(tmp_path, size):
    data = bytearray(whole())
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = data.index(mark) + at
        data[place : place + 4] = size.to_bytes(4, "little")
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    path.write_bytes(data)
    for open_it in (Wheel.read, lambda path, limits: unpack(path, tmp_path / "out", limits)):
        with pytest.raises(WheelError, match=r"unpacks to more than 20\.0 kB"):
            open_it(path, SMALL)
    assert not (tmp_path / "out").exists()


def test_no_more_than_the_declared_size_is_written(tmp_path):
    """Write a zip file whose two headers declare 100 bytes for a member of 5 MB."""
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(5_000_000))
    data = bytearray((tmp_path / "bomb.whl").read_bytes())
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = data.index(mark) + at
        data[place : place + 4] = (100).to_bytes(4, "little")
    (tmp_path / "bomb.whl").write_bytes(data)
    with bounded(), pytest.raises(WheelError, match="Bad CRC-32"):
        unpack(tmp_path / "bomb.whl", tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "a").stat().st_size <= 100


def test_number_of_files_over_the_limit_is_refused(tmp_path):
    path = archive(tmp_path / "a.whl", {str(number): "" for number in range(41)})
    with pytest.raises(WheelError, match="has more than 40 members"):
        unpack(path, tmp_path / "out", SMALL)


@pytest.mark.parametrize(
    ("mark", "at", "value"),
    [(b"PK\3\4", 8, 0), (b"PK\3\4", 14, 7), (b"PK\3\4", 18, 1), (b"PK\3\4", 22, 1), (b"PK\3\4", 30, 0x41)],
    ids=["method", "checksum", "compressed size", "size", "name"],
)
def test_contradictory_zip_headers_are_refused(tmp_path, mark, at, value):
    data = bytearray(whole())
    data[data.index(mark) + at] = value
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    path.write_bytes(data)
    for open_it in (Wheel.read, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(WheelError, match="its own header and the archive's directory differ"):
            open_it(path)
    assert not (tmp_path / "out").exists()


def test_wheel_written_to_a_pipe_is_read(tmp_path):
    """Write a zip file with the sizes after each member's data and zeros before it (APPNOTE 4.3.9)."""

    class Pipe(io.RawIOBase):
        def write(self, data: bytes) -> int:
            return file.write(data)

        def writable(self) -> bool:
            return True

    path = tmp_path / "sample-1.0-py3-none-any.whl"
    with path.open("wb") as file, zipfile.ZipFile(Pipe(), "w", zipfile.ZIP_DEFLATED) as streamed:
        for name, data in parts().items():
            streamed.writestr(name, data)
    assert Wheel.read(path).version == Version("1.0")
    unpack(path, tmp_path / "out")


def test_overlapping_zip_entries_are_refused(tmp_path):
    path = archive(tmp_path / "a.whl", {"a": "x" * 99, "b": "x" * 99})
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[second + 42 : second + 46] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(WheelError, match="b: overlaps another member"):
        unpack(path, tmp_path / "out")


def test_names_that_differ_only_in_case_are_refused(tmp_path):
    with pytest.raises(WheelError, match=r"a/b.txt: is the same as a/B.txt on file systems that ignore case"):
        unpack(archive(tmp_path / "bad.whl", {"a/B.txt": "", "a/b.txt": ""}), tmp_path / "out")


def test_tag_line_that_expands_to_millions_is_refused_unexpanded(tmp_path):
    text = WHEEL.format(tag="-".join(["a." * 400 + "a"] * 3))
    path = archive(tmp_path / "sample-1.0-py3-none-any.whl", {**parts(), "sample-1.0.dist-info/WHEEL": text})
    with bounded(), pytest.raises(WheelError, match="has more than 1000 tags in its WHEEL file"):
        Wheel.read(path)


def test_messages_shorten_metadata_and_escape_control_characters(tmp_path):
    text = "Wheel-Version: \x1b[2J" + "x" * 100_000 + "\n"
    path = archive(tmp_path / "sample-1.0-py3-none-any.whl", {**parts(), "sample-1.0.dist-info/WHEEL": text})
    with pytest.raises(WheelError) as caught:
        Wheel.read(path)
    assert len(caught.value.what) < 1000
    assert "\x1b" not in caught.value.what


def test_metadata_of_a_vendored_package_is_ignored(tmp_path):
    """A vendored dist-info folder, as in the wheel of setuptools, is no second one."""
    other = {"sample/_vendor/other-2.0.dist-info/METADATA": METADATA.format(name="other", version="2.0", more="")}
    path = archive(tmp_path / "sample-1.0-py3-none-any.whl", {**other, **parts()})
    assert metadata_bytes(path).decode() == parts()["sample-1.0.dist-info/METADATA"]


def test_oversized_record_is_not_read(tmp_path):
    unpack(wheel(tmp_path / "a", PACKAGE), tmp_path / "b")
    with (tmp_path / "b" / "sample-1.0.dist-info" / "RECORD").open("ab") as record:
        record.truncate(8 << 30)  # a hole
    with bounded():
        assert record_problems(tmp_path / "b") == ["sample-1.0.dist-info/RECORD is larger than 100.0 MB"]


def test_equal_content_gives_equal_bytes(tmp_path, monkeypatch):
    content = {**PACKAGE, "sample/é.txt": "accent\n", "sample-1.0.data/scripts/sample": "#!python\n"}
    first = normalise(unpacked(tmp_path / "a", content), tmp_path / "one", tag="py3-none-any", epoch=EPOCH)
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    monkeypatch.setenv("LC_ALL", "C")
    time.tzset()
    old = os.umask(0o077)
    try:
        again = unpacked(tmp_path / "b", dict(reversed(content.items())))
        for file in again.rglob("*"):
            os.utime(file, (1, 1))
        (again / "sample-1.0.dist-info" / "RECORD").write_text("an older one\n")
        (again / "sample-1.0.dist-info" / "RECORD.jws").write_text("its signature\n")
        (again / "empty").mkdir()
        second = normalise(again, tmp_path / "two", tag="py3-none-any", epoch=EPOCH)
    finally:
        os.umask(old)
        monkeypatch.undo()
        time.tzset()
    assert first.name == second.name == "sample-1.0-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()


def test_different_zip_of_the_same_files_normalises_to_equal_bytes(tmp_path):
    first = wheel(tmp_path / "a", PACKAGE)
    unpack(first, tmp_path / "b")
    assert normalise(tmp_path / "b", tmp_path / "c", tag="py3-none-any", epoch=EPOCH).read_bytes() == first.read_bytes()


def test_entries_are_sorted_and_independent_of_the_machine(tmp_path):
    library = compiled(tmp_path / "lib.so", "")
    library.chmod(0o600)
    content = {"zz.py": "", "sample/_C.so": library, "sample-1.0.data/scripts/run": "#!python\n", **PACKAGE}
    with zipfile.ZipFile(wheel(tmp_path, content)) as file:
        entries = file.infolist()
    assert [entry.filename for entry in entries] == [
        "sample-1.0.data/scripts/run", "sample/_C.so", "sample/__init__.py", "sample/data.txt", "zz.py",
        "sample-1.0.dist-info/METADATA", "sample-1.0.dist-info/WHEEL", "sample-1.0.dist-info/RECORD",
    ]  # fmt: skip
    assert {entry.date_time for entry in entries} == {(2023, 11, 14, 22, 13, 20)}
    assert {entry.extra for entry in entries} == {b""}
    assert {entry.create_system for entry in entries} == {3}
    modes = {entry.filename: entry.external_attr >> 16 for entry in entries}
    assert modes["sample/_C.so"] == modes["sample-1.0.data/scripts/run"] == stat.S_IFREG | 0o755
    assert modes["zz.py"] == modes["sample-1.0.dist-info/RECORD"] == stat.S_IFREG | 0o644


@pytest.mark.parametrize(("epoch", "date"), [(0, (1980, 1, 1, 0, 0, 0)), (2**40, (2107, 12, 31, 23, 59, 58))])
def test_epoch_outside_the_zip_range_becomes_the_nearest_time(tmp_path, epoch, date):
    path = normalise(unpacked(tmp_path / "a", PACKAGE), tmp_path, tag="py3-none-any", epoch=epoch)
    with zipfile.ZipFile(path) as file:
        assert {entry.date_time for entry in file.infolist()} == {date}


def test_wheel_file_gets_new_tag_and_generator_and_keeps_build_number(tmp_path):
    folder = unpacked(tmp_path / "a", PACKAGE)
    text = folder / "sample-1.0.dist-info" / "WHEEL"
    text.write_text(text.read_text() + "Build: 7\n")
    path = normalise(folder, tmp_path, tag="py2.py3-none-any", epoch=EPOCH)
    assert path.name == "sample-1.0-7-py2.py3-none-any.whl"
    with zipfile.ZipFile(path) as file:
        assert file.read("sample-1.0.dist-info/WHEEL").decode() == (
            "Wheel-Version: 1.0\nGenerator: voltforge\nRoot-Is-Purelib: false\nBuild: 7\n"
            "Tag: py2-none-any\nTag: py3-none-any\n"
        )


def test_link_in_the_folder_is_refused(tmp_path):
    folder = unpacked(tmp_path / "a", PACKAGE)
    (folder / "sample" / "link").symlink_to("/etc")
    with pytest.raises(WheelError, match="sample/link is neither a file nor a folder"):
        normalise(folder, tmp_path, tag="py3-none-any", epoch=EPOCH)
    assert list(tmp_path.glob("*.whl")) == []


def test_pip_installs_the_normalised_wheel(tmp_path):
    path = wheel(tmp_path, {**PACKAGE, 'sample/a "comma", quoted.txt': "x"})
    target = tmp_path / "target"
    command = [programs.find("uv"), "pip", "install", "--offline", "--no-deps", "--no-config", "--target", target, path]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert (target / "sample" / 'a "comma", quoted.txt').read_text() == "x"


def test_normalised_wheel_has_a_correct_record(tmp_path):
    unpack(wheel(tmp_path / "a", {**PACKAGE, 'odd, "name".txt': "x"}), tmp_path / "b")
    assert record_problems(tmp_path / "b") == []


def test_every_disagreement_with_record_is_reported(tmp_path):
    unpack(wheel(tmp_path / "a", {**PACKAGE, "gone.py": "", "grown.py": "", "unhashed.py": ""}), tmp_path / "b")
    (tmp_path / "b" / "sample" / "data.txt").write_text("changed\n")
    (tmp_path / "b" / "gone.py").unlink()
    (tmp_path / "b" / "added.py").write_text("")
    record = tmp_path / "b" / "sample-1.0.dist-info" / "RECORD"
    lines = [line for line in record.read_text().splitlines() if not line.startswith(("grown", "unhashed"))]
    empty = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    record.write_text("\n".join([*lines, f"grown.py,{empty},5", "unhashed.py,md5=abc,0", "torn,line", lines[0]]) + "\n")
    assert [problem.split(" ")[0] for problem in record_problems(tmp_path / "b")] == [
        "gone.py", "sample/data.txt", "grown.py", "unhashed.py", "sample-1.0.dist-info/RECORD", "gone.py", "gone.py",
        "added.py",
    ]  # fmt: skip


def test_pure_python_wheel_has_platform_any(tmp_path):
    assert platform_tag(wheel(tmp_path, PACKAGE)).tag == "any"


def test_platform_tag_follows_the_newest_symbol(tmp_path):
    old = compiled(tmp_path / "old.so", "#include <stdlib.h>\nvoid *f(void) { return malloc(1); }")
    tag = "py3-none-linux_x86_64"
    found = platform_tag(wheel(tmp_path / "a", {"sample/_C.so": old}, tag=tag))
    assert (found.tag, found.glibc) == ("manylinux_2_5_x86_64", "2.2.5")
    # A C library made for this test: the required version must not depend on the machine's own glibc.
    script = tmp_path / "script"
    script.write_text("GLIBC_2.34 { global: f; };")
    flags = ("-Wl,-soname,libc.so.6", f"-Wl,--version-script,{script}")
    libc = compiled(tmp_path / "libc.so.6", "int f(void) { return 1; }", *flags)
    new = compiled(tmp_path / "new.so", "int f(void); int g(void) { return f(); }", str(libc))
    found = platform_tag(wheel(tmp_path / "b", {"sample/_C.so": new}, tag=tag))
    assert (found.tag, found.glibc) == ("manylinux_2_34_x86_64", "2.34")
    assert found.why == "its newest symbols are GLIBC_2.34"


def test_library_outside_every_policy_gives_a_linux_tag(tmp_path):
    base = compiled(tmp_path / "libodd.so.3", "int odd(void) { return 1; }", "-Wl,-soname,libodd.so.3")
    user = compiled(tmp_path / "user.so", "int odd(void); int f(void) { return odd(); }", str(base))
    path = wheel(tmp_path, {"sample/_C.so": user}, tag="py3-none-linux_x86_64")
    found = platform_tag(path)
    assert found.tag == "linux_x86_64"
    assert found.why == "it needs libodd.so.3, which no manylinux policy allows"
    assert platform_tag(path, exclude=["libodd.so.*"]).tag.startswith("manylinux_")


def test_finished_wheel_is_stripped_and_has_runpaths_and_tag(tmp_path):
    torch = compiled(tmp_path / "libtorch.so", "int torch(void) { return 1; }", "-Wl,-soname,libtorch.so")
    extension = compiled(
        tmp_path / "_C.abi3.so", "int torch(void); int f(void) { return torch(); }", str(torch), "-g",
        "-Wl,-rpath,/build/torch/lib",
    )  # fmt: skip
    content = {"sample/_C.abi3.so": extension, "sample/deep/_D.abi3.so": extension, "sample/__init__.py": ""}
    raw = wheel(tmp_path / "raw", content, tag="cp38-abi3-linux_x86_64")
    runpath = {"sample/*.so": ["$ORIGIN/../torch/lib"], "sample/deep/*.so": ["$ORIGIN/../../torch/lib"]}
    done = finish(raw, tmp_path / "done", runpath=runpath, epoch=EPOCH)
    assert done.name == "sample-1.0-cp38-abi3-manylinux_2_5_x86_64.whl"
    assert Wheel.read(done).tags == Wheel.read(done).declared
    unpack(done, tmp_path / "out")
    found = Elf.read(tmp_path / "out" / "sample" / "_C.abi3.so")
    assert found.stripped
    assert found.runpath == ("$ORIGIN/../torch/lib",)
    assert Elf.read(tmp_path / "out" / "sample" / "deep" / "_D.abi3.so").runpath == ("$ORIGIN/../../torch/lib",)
    assert record_problems(tmp_path / "out") == []
    again = finish(raw, tmp_path / "again", runpath=runpath, epoch=EPOCH)
    assert again.read_bytes() == done.read_bytes()


def test_runpath_pattern_that_matches_no_binary_is_refused(tmp_path):
    raw = wheel(tmp_path, PACKAGE)
    with pytest.raises(WheelError, match=r"no binary of the wheel matches the RUNPATH pattern 'vllm/\*\.so'"):
        finish(raw, tmp_path / "done", runpath={"vllm/*.so": ["$ORIGIN"]}, epoch=EPOCH)


def test_folder_without_dist_info_is_refused(tmp_path):
    with pytest.raises(WheelError, match="has 0 dist-info folders"):
        normalise(tree(tmp_path / "a", {"a.py": ""}), tmp_path, tag="py3-none-any", epoch=EPOCH)
