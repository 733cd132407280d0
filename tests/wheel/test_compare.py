"""Tests of comparing two built files: the tier, and the place of each difference."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

from tests.support.samples import EPOCH, compiled, container, image, unpacked, wheel, with_device_code
from voltforge.binary import elf
from voltforge.compile.toolchain import Toolchain
from voltforge.wheel.compare import MAX_DIFFERENCES, Comparison, Difference, compare, report
from voltforge.wheel.wheelfile import normalise

SOURCE = 'const char built[] = "built at 12:01"; int twice(int x) { return 2 * x; }'
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes wheels with a C extension and a module."""
    count = iter(range(100))

    def made(source: str = SOURCE, *flags: str, **files: str | bytes | Path) -> Path:
        folder = tmp_path / str(next(count))
        library = compiled(folder / "built.so", source, "-O1", *flags)
        elf.strip(library)
        named = {name.replace("__", "/", 1).replace("__", "."): data for name, data in files.items()}
        return wheel(folder, {"p/a.py": "one = 1\ntwo = 2\n", "p/_C.so": library, **named})

    return made


def only(comparison: Comparison) -> Difference:
    [difference] = comparison.differences
    assert not comparison.more
    return difference


# --- tiers ---


def test_equal_bytes_are_identical(make: Make) -> None:
    compared = compare(make(), make())
    assert (compared.tier, compared.differences) == ("identical", ())
    assert compared.sha256[0] == compared.sha256[1] != ""


def test_order_times_and_compression_are_archive_only_differences(make: Make, tmp_path: Path) -> None:
    one, other = make(), tmp_path / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(one) as source, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as target:
        for entry in reversed(source.infolist()):
            again = zipfile.ZipInfo(entry.filename, (2020, 2, 2, 2, 2, 2))
            again.external_attr = entry.external_attr
            target.writestr(again, source.read(entry))
    assert (compare(one, other).tier, compare(one, other).differences) == ("archive only", ())


def test_changed_string_in_a_binary_is_same_code_and_symbols(make: Make) -> None:
    compared = compare(make(), make(SOURCE.replace("12:01", "12:07")))
    assert compared.tier == "same code and symbols"
    difference = only(compared)
    assert (difference.file, difference.section, difference.symbol) == ("p/_C.so", ".rodata", "built")
    assert difference.one == '31 00 at 0xd, in "built at 12:01"'
    assert difference.other == '37 00 at 0xd, in "built at 12:07"'


def test_changed_instruction_is_reported_with_its_function(make: Make) -> None:
    compared = compare(make(), make(SOURCE.replace("2 * x", "x - 3")))
    assert compared.tier == "different"
    assert ("p/_C.so", ".text", "twice") in [(row.file, row.section, row.symbol) for row in compared.differences]


@pytest.mark.parametrize(
    ("old", "new", "symbol", "kinds"),
    [
        ("built[]", "made[]", "built", ("object, 15 bytes", "absent")),
        ('"built at 12:01"', '"built at 12:01, or so"', "built", ("object, 15 bytes", "object, 22 bytes")),
        ("const char built[] =", "int built(void) { return 1; } char text[] =", "built", ("object, 15 bytes", "func")),
    ],
)  # fmt: skip
def test_symbol_with_another_name_kind_or_size_is_different(make: Make, old, new, symbol, kinds) -> None:
    compared = compare(make(), make(SOURCE.replace(old, new), "-w"))
    assert compared.tier == "different"
    [row] = [row for row in compared.differences if (row.section, row.symbol) == (".dynsym", symbol)]
    assert row.one.startswith(kinds[0])
    assert row.other.startswith(kinds[1])


def test_changed_runpath_is_same_code_and_symbols(make: Make) -> None:
    compared = compare(make(SOURCE, "-Wl,-rpath,/one"), make(SOURCE, "-Wl,-rpath,/two"))
    assert (compared.tier, only(compared).section) == ("same code and symbols", ".dynstr")


# --- repeated differences are reported once ---


def test_build_id_is_reported_only_if_nothing_else_differs(make: Make) -> None:
    ids = "-Wl,--build-id=0x0101010101", "-Wl,--build-id=0x0202020202"
    alone = compare(make(SOURCE, ids[0]), make(SOURCE, ids[1]))
    assert (alone.tier, only(alone).section) == ("same code and symbols", ".note.gnu.build-id")
    beside = compare(make(SOURCE, ids[0]), make(SOURCE.replace("12:01", "12:07"), ids[1]))
    assert only(beside).section == ".rodata"


def test_record_is_reported_only_if_it_differs_by_itself(make: Make, tmp_path: Path) -> None:
    assert only(compare(make(), make(p__a__py="one = 1\ntwo = 3\n"))).file == "p/a.py"
    one, other = make(), tmp_path / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(one) as source, zipfile.ZipFile(other, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            turned = b"".join(sorted(data.splitlines(keepends=True), reverse=True))
            target.writestr(entry, turned if entry.filename.endswith("RECORD") else data)
    compared = compare(one, other)
    assert (compared.tier, only(compared).file) == ("different", "sample-1.0.dist-info/RECORD")


def test_sbom_is_reported_only_if_it_differs_by_itself(make: Make) -> None:
    def described(sha256: str, version: str = "1.0", serial: str = "a") -> str:
        components = [{"name": "p/_C.so", "hashes": [{"content": sha256}]}, {"name": "cmake", "version": version}]
        return json.dumps({"serialNumber": serial, "components": components})

    sbom = {"sample-1.0.dist-info/sboms/sample.cdx.json": described("1")}
    pair = make(**sbom), make(SOURCE.replace("12:01", "12:07"), **{name: described("2", serial="b") for name in sbom})
    assert compare(*pair).tier == "same code and symbols"
    assert only(compare(*pair)).section == ".rodata"
    for other in (described("2"), described("1", "2.0"), "[1]", "{"):
        difference = only(compare(pair[0], make(**dict.fromkeys(sbom, other))))
        assert difference.file == "sample-1.0.dist-info/sboms/sample.cdx.json"


# --- texts, modes, members ---


def test_text_difference_is_reported_by_line_and_long_lines_are_cut(make: Make) -> None:
    one = "x = 1\n" + "y" * 500 + "1\n"
    compared = compare(make(p__b__py=one), make(p__b__py=one.replace("y" * 500 + "1", "z" * 500 + "2")))
    difference = only(compared)
    assert (difference.file, difference.section) == ("p/b.py", "line 2")
    assert (difference.one, difference.other) == ("y" * 120 + "…", "z" * 120 + "…")
    shorter = only(compare(make(p__b__py="a\nb\n"), make(p__b__py="a\n")))
    assert (shorter.section, shorter.one, shorter.other) == ("line 2", "b", "ends before")


def test_missing_member_and_changed_mode_are_reported(tmp_path: Path) -> None:
    wheels = []
    for number, mode in enumerate((0o644, 0o755)):
        folder = unpacked(tmp_path / f"{number}" / "unpacked", {"p/run": "echo\n", f"p/{number}.py": "x"})
        (folder / "p" / "run").chmod(mode)
        wheels.append(normalise(folder, tmp_path / f"{number}", tag="py3-none-any", epoch=EPOCH))
    compared = compare(*wheels)
    assert compared.tier == "different"
    assert [(row.file, row.section, row.one, row.other) for row in compared.differences] == [
        ("p/0.py", "", "1 bytes", "absent"),
        ("p/1.py", "", "absent", "1 bytes"),
        ("p/run", "mode", "0o644", "0o755"),
    ]


def test_other_data_is_reported_by_byte_offset(make: Make) -> None:
    difference = only(compare(make(p__d__bin=b"\0\1\2\3"), make(p__d__bin=b"\0\1\2")))
    assert (difference.section, difference.one, difference.other) == ("byte 0x3", "03 at 0x3", "ends after 3 bytes")


def test_first_differences_are_kept_and_the_rest_counted(make: Make) -> None:
    ones = {f"p__m{number:02}__py": "1" for number in range(30)}
    compared = compare(make(**ones), make(**dict.fromkeys(ones, "2")))
    assert (len(compared.differences), compared.more) == (MAX_DIFFERENCES, 30 - MAX_DIFFERENCES)
    assert compared.differences[0].file == "p/m00.py"


def test_malformed_archive_or_binary_is_compared_by_byte(tmp_path: Path, make: Make) -> None:
    whole = make()
    broken = tmp_path / "broken.whl"
    data = bytearray(whole.read_bytes())
    data[40:60] = bytes(20)
    broken.write_bytes(data)
    assert compare(whole, broken).differences[0].section.startswith("byte 0x")
    elves = [tmp_path / name for name in ("one", "other")]
    for path, end in zip(elves, (b"\1", b"\2"), strict=True):
        path.write_bytes(b"\x7fELF" + bytes(60) + end)
    assert only(compare(*elves)).section == "byte 0x40"
    (tmp_path / "empty").touch()
    assert only(compare(elves[0], tmp_path / "empty")).other == "ends after 0 bytes"


# --- device code ---

KERNELS = "__global__ void first(float *x) { *x += 1; }\n__global__ void second(float *x) { *x += {}; }\n"


@pytest.mark.slow
def test_nvcc_device_code_difference_is_reported_by_image_container_and_kernel(
    tmp_path: Path, toolchain: Toolchain
) -> None:
    libraries = []
    for number in (2, 3):
        source = tmp_path / f"{number}" / "kernels.cu"
        source.parent.mkdir()
        source.write_text(KERNELS.replace("{}", str(number)))
        words = [toolchain.home / "bin/nvcc", "-ccbin", toolchain.host.cxx, "-gencode=arch=compute_70,code=sm_70"]
        words += ["-shared", "-cudart=none", "-Xcompiler=-fPIC", "--objdir-as-tempdir", "-o", "kernels.so", source.name]
        subprocess.run(words, cwd=source.parent, check=True, capture_output=True)
        elf.strip(source.with_name("kernels.so"))
        libraries.append(source.with_name("kernels.so"))
    compared = compare(*libraries)
    assert compared.tier == "different"
    [row] = [row for row in compared.differences if row.section == ".nv_fatbin"]
    assert row.symbol == "_Z6secondPf"
    assert row.one.startswith("sm_70 of container 0, sha256 ")
    assert row.other != row.one


def test_compressed_image_difference_is_reported_without_kernels(tmp_path: Path) -> None:
    libraries = []
    for name, code in (("one", b"packed 1"), ("other", b"packed 2")):
        packed = image(80, payload=code, packed=8, flags=0x2011)
        path = tmp_path / name / "lib.so"
        libraries.append(with_device_code(path, container(image(70)) + container(image(70), packed)))
    compared = compare(*libraries)
    difference = only(compared)
    assert compared.tier == "different"
    assert (difference.section, difference.symbol) == (".nv_fatbin", "")
    assert difference.one.startswith("sm_80 of container 1, sha256 ")


def test_added_image_and_image_for_another_arch_are_reported(tmp_path: Path) -> None:
    one = with_device_code(tmp_path / "one.so", container(image(70), image(80)))
    other = with_device_code(tmp_path / "other.so", container(image(75)))
    rows = [(row.one.split(",")[0], row.other.split(",")[0]) for row in compare(one, other).differences]
    assert rows[:2] == [("sm_70 of container 0", "sm_75 of container 0"), ("sm_80 of container 0", "absent")]


# --- images ---


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def entries(**content: str | bytes) -> list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]:
    members = []
    for name, data in content.items():
        entry = tarfile.TarInfo(name.replace("__", "/"))
        raw = data.encode() if isinstance(data, str) else data
        entry.size = len(raw)
        members.append((entry, raw))
    return members


def layer(content: list, pack: Callable[[bytes], bytes] = gzipped, time: int = 0) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for entry, data in content:
            entry.mtime = time
            tar.addfile(entry, io.BytesIO(data))
    return pack(sink.getvalue())


def layout(path: Path, *layers: bytes, label: str = "one", names: tuple[str, ...] = ("1.0", "latest")) -> Path:
    """Write an archive of an OCI image layout with these layers."""
    blobs = {}

    def put(data: bytes) -> dict[str, str | int]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"digest": f"sha256:{digest}", "size": len(data)}

    descriptors = [put(data) for data in layers]
    configuration = {
        "config": {"Labels": {"a": label}},
        "rootfs": {"diff_ids": [descriptor["digest"] for descriptor in descriptors]},
        "history": [{"created_by": f"COPY {descriptor['digest']}"} for descriptor in descriptors],
    }
    manifest = put(json.dumps({"config": put(json.dumps(configuration).encode()), "layers": descriptors}).encode())
    index = [{**manifest, "annotations": {"org.opencontainers.image.ref.name": name}} for name in names]
    content = {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    content |= {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"manifests": index}).encode(),
    }
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pack", [gzipped, zstd.compress, bytes])
def test_layers_with_equal_members_are_archive_only_differences(tmp_path: Path, pack) -> None:
    content = entries(opt__a="a", opt__b="b" * 300_000)
    one = layout(tmp_path / "one.tar", layer(content), layer(entries(c="c")))
    other = layout(tmp_path / "other.tar", layer(content[::-1], pack, time=9), layer(entries(c="c")))
    compared = compare(one, other)
    assert (compared.tier, compared.differences) == ("archive only", ())


@pytest.mark.parametrize("pack", [gzipped, zstd.compress])
def test_layer_difference_is_reported_by_layer_and_member(tmp_path: Path, pack) -> None:
    base = layer(entries(base="base"), pack)
    one = layout(tmp_path / "one.tar", base, layer(entries(opt__a="1\n2\n", opt__b="b"), pack))
    other = layout(tmp_path / "other.tar", base, layer(entries(opt__a="1\n3\n", opt__b="b"), pack))
    compared = compare(one, other)
    assert compared.tier == "different"
    assert only(compared) == Difference("layer 1, opt/a", "line 2", "", "2", "3")


def test_binary_difference_in_a_layer_is_reported_by_section(tmp_path: Path) -> None:
    layouts = []
    for name, text in (("one", "12:01"), ("other", "12:07")):
        library = compiled(tmp_path / f"{name}.so", SOURCE.replace("12:01", text), "-s")
        layouts.append(layout(tmp_path / f"{name}.tar", layer(entries(lib__x=library.read_bytes()))))
    compared = compare(*layouts)
    assert compared.tier == "same code and symbols"
    assert only(compared).place == "layer 0, lib/x .rodata built"


def test_owner_mode_and_link_differences_in_layers_are_reported(tmp_path: Path) -> None:
    layouts = []
    for number, (mode, target) in enumerate(((0o755, "python3.11"), (0o700, "python3.12"))):
        content = [*entries(a="a"), *entries(b="b"), *entries(link="")]
        content[0][0].mode = mode
        content[1][0].uid = number
        content[2][0].type, content[2][0].linkname = tarfile.SYMTYPE, target
        layouts.append(layout(tmp_path / f"{number}.tar", layer(content)))
    assert [(row.file, row.section, row.one, row.other) for row in compare(*layouts).differences] == [
        ("layer 0, a", "mode", "0o755", "0o700"),
        ("layer 0, b", "owner", "0:0", "1:0"),
        ("layer 0, link", "kind", "a link to python3.11", "a link to python3.12"),
    ]


def test_configuration_difference_is_reported_by_key_and_added_layer_by_digest(tmp_path: Path) -> None:
    first, more = layer(entries(a="a")), layer(entries(b="b"))
    one = layout(tmp_path / "one.tar", first)
    assert only(compare(one, layout(tmp_path / "label.tar", first, label="two"))) == Difference(
        "configuration", "config.Labels.a", "", "one", "two"
    )
    longer = only(compare(one, layout(tmp_path / "more.tar", first, more)))
    assert (longer.file, longer.one, longer.other[:7]) == ("layer 1", "absent", "sha256:")
    named = only(compare(one, layout(tmp_path / "named.tar", first, names=("1.0",))))
    assert (named.file, named.section, named.other) == ("index.json", "latest", "absent")


def test_truncated_layer_is_compared_by_byte(tmp_path: Path) -> None:
    whole = layout(tmp_path / "whole.tar", layer(entries(a="whole"), zstd.compress))
    cut = layout(tmp_path / "cut.tar", layer(entries(a="cut"), zstd.compress)[:-9])
    assert compare(whole, cut).differences[0].section.startswith("byte 0x")


# --- the report ---


@pytest.fixture
def pair(make: Make) -> Iterator[tuple[Path, Path]]:
    return make(), make(p__a__py="one = 1\ntwo = 3\n")


def test_report_prints_tier_hashes_and_differences(pair, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    compared = compare(*pair)
    report(compared)
    printed = capsys.readouterr().out
    assert "* sample-1.0-py3-none-any.whl: not the same" in printed
    for words in (*compared.sha256, "p/a.py", "line 2", "two = 2", "two = 3"):
        assert words in printed
    assert compared.detail is None
    report(compare(pair[0], pair[0]))
    assert "the same, bit for bit" in capsys.readouterr().out


def test_diffoscope_report_is_written_beside_the_second_file(pair, tmp_path: Path, capsys, monkeypatch) -> None:
    """A script replaces diffoscope and exits with its status for a difference."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "diffoscope"
    program.write_text('#!/bin/sh\n[ "$1" = --text ] && echo "$3 is not $4" >"$2"; exit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    compared = compare(*pair)
    assert compared.detail == pair[1].with_name(f"{pair[1].name}.diffoscope.txt")
    report(compared)
    assert compared.detail.read_text() == f"{pair[0]} is not {pair[1]}\n"
    assert "diffoscope's report: " in capsys.readouterr().out
    program.write_text("#!/bin/sh\nexit 2\n")
    report(compared)
    assert "! diffoscope failed with status 2" in capsys.readouterr().out
