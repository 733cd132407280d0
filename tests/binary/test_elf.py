"""Tests of reading and changing ELF files, with the real gcc, strip and dynamic linker."""

import contextlib
import io
import struct
import sys
import zlib
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from tests.support.corruption import ELF_COUNTED, bounded, cases, damaged, elf_fields
from tests.support.samples import compiled, loads
from voltforge.binary import elf, fatbin
from voltforge.binary.elf import Elf, ElfError, Symbol
from voltforge.binary.fatbin import FatbinError


@pytest.fixture
def library(tmp_path):
    return compiled(tmp_path / "libbase.so.1", "int base(void) { return 1; }", "-Wl,-soname,libbase.so.1")


def test_soname_needed_libraries_and_runpath_are_read(tmp_path, library):
    user = compiled(
        tmp_path / "libuser.so", "int base(void); int use(void) { return base(); }", str(library),
        "-Wl,-soname,libuser.so.2", "-Wl,-rpath,$ORIGIN:/opt/lib", "-Wl,--enable-new-dtags",
    )  # fmt: skip
    binary = Elf.read(user)
    assert binary.soname == "libuser.so.2"
    assert binary.needed[0] == "libbase.so.1"
    assert binary.runpath == ("$ORIGIN", "/opt/lib")
    assert binary.rpath == ()
    assert Symbol("base", None) in binary.undefined
    assert "use" in binary.names


def test_rpath_is_distinguished_from_runpath(tmp_path):
    old = compiled(tmp_path / "libold.so", "", "-Wl,-rpath,/opt/lib", "-Wl,--disable-new-dtags")
    assert (Elf.read(old).rpath, Elf.read(old).runpath) == (("/opt/lib",), ())


def test_symbols_have_required_and_provided_versions(tmp_path):
    script = tmp_path / "versions"
    script.write_text("OURS_1.0 { global: greet; local: *; };")
    source = "#include <stdio.h>\nvoid hidden(void) {} void greet(char *text, FILE *to) { fputs(text, to); }"
    binary = Elf.read(compiled(tmp_path / "libgreet.so", source, f"-Wl,--version-script,{script}"))
    assert Symbol("greet", "OURS_1.0") in binary.defined
    assert "hidden" not in binary.names
    required = {symbol.name: symbol.version for symbol in binary.undefined}
    assert required["fputs"].startswith("GLIBC_2.")
    assert ("libc.so.6", required["fputs"]) in binary.required_versions


def test_weak_undefined_symbol_is_not_required(tmp_path):
    source = (
        "__attribute__((weak)) int maybe(void); int must(void); int f(void) { return must() + (maybe ? maybe() : 0); }"
    )
    binary = Elf.read(compiled(tmp_path / "libweak.so", source))
    assert [symbol.name for symbol in binary.undefined] == ["must"]


def test_sections_have_offset_and_size(library):
    section = next(section for section in Elf.read(library).sections if section.name == ".dynstr")
    assert b"libbase.so.1\0" in library.read_bytes()[section.offset : section.offset + section.size]


def test_large_file_is_not_read_whole(library):
    with library.open("ab") as file:
        file.truncate(8 << 30)  # a sparse file: reading it whole would take 8 GiB of memory
    assert Elf.read(library).soname == "libbase.so.1"


def test_strip_removes_debug_information_reproducibly(tmp_path):
    results = []
    for name in ("a", "b"):
        path = compiled(tmp_path / name / "lib.so", "static int secret; int f(void) { return secret; }", "-g")
        assert not Elf.read(path).stripped
        elf.strip(path)
        assert Elf.read(path).stripped
        assert "f" in Elf.read(path).names
        results.append(path.read_bytes())
    assert results[0] == results[1]


def test_a_runpath_is_set_replaced_and_removed(tmp_path, library):
    user = compiled(
        tmp_path / "libuser.so", "int base(void); int use(void) { return base(); }", str(library),
        "-Wl,-rpath,/build/lib", "-Wl,--disable-new-dtags",
    )  # fmt: skip
    assert not loads(user)
    elf.strip(user)
    elf.set_runpath(user, ["$ORIGIN/../torch/lib", "$ORIGIN"])
    assert Elf.read(user).runpath == ("$ORIGIN/../torch/lib", "$ORIGIN")
    assert Elf.read(user).rpath == ()
    assert loads(user)
    elf.set_runpath(user, [])
    assert Elf.read(user).runpath == ()
    assert not loads(user)


def test_a_colon_cannot_be_part_of_a_runpath_entry(library):
    with pytest.raises(ElfError, match="'a:b' as a RUNPATH entry"):
        elf.set_runpath(library, ["a:b"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"#!/bin/sh\n", "is not an ELF file"),
        (b"\x7fELF", "is not a well-formed ELF file"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\xff" * 48, "is not a well-formed ELF file"),
        (b"\x7fELF\x01\x01\x01" + bytes(45), "is not a 64-bit little-endian ELF file"),
    ],
)
def test_file_that_is_not_elf_is_refused(tmp_path, content, why):
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    with pytest.raises(ElfError, match=why):
        Elf.read(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ElfError, match="cannot be read: No such file"):
        Elf.read(tmp_path / "lib.so")


@pytest.fixture(scope="module")
def versioned(tmp_path_factory):
    """Return a library with versions, SONAME, RUNPATH and the names of kernels."""
    folder = tmp_path_factory.mktemp("versioned")
    (folder / "script").write_text("OURS_1.0 { global: greet; local: *; }; OURS_2.0 { global: other; } OURS_1.0;")
    source = """
        #include <stdio.h>
        const char *const kernels[] = {"_Z3addPi", "_Z3subPi"};
        void greet(FILE *to) { fputs(kernels[0], to); }
        void other(void) { greet(stdout); }
    """
    flags = ("-Wl,-soname,libgreet.so.1", "-Wl,-rpath,$ORIGIN:/opt/lib", f"-Wl,--version-script,{folder}/script")
    return compiled(folder / "libgreet.so", source, *flags).read_bytes()


@cases(600)
@given(data=st.data())
def test_damaged_file_is_read_or_refused_within_limits(data, versioned, tmp_path, counted):
    damaged_file = tmp_path / "damaged.so"
    damaged_file.write_bytes(data.draw(damaged(versioned, elf_fields(versioned))))
    for read in (Elf.read, fatbin.kernels, fatbin.images):
        with bounded(), contextlib.suppress(ElfError, FatbinError):
            read(damaged_file)
    counted(ELF_COUNTED)


def patched(path: Path, whole: bytes, **sections: dict[int, int]) -> Path:
    """Write an ELF file with changed values in section headers, by their offset in an Elf64_Shdr."""
    content = bytearray(whole)
    parsed = ELFFile(io.BytesIO(whole))
    for name, changes in sections.items():
        header = parsed["e_shoff"] + 64 * parsed.get_section_index(f".{name}")
        for at, value in changes.items():
            size = 4 if at < 8 else 8
            content[header + at : header + at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    return path


KIND, FLAGS, OFFSET, SIZE = 4, 8, 24, 32


@pytest.mark.parametrize("name", ["dynsym", "dynstr", "rodata"])
def test_section_marked_as_compressed_is_not_inflated(tmp_path, versioned, name):
    """A section with the flag SHF_COMPRESSED inflates from a few bytes to gigabytes (elf(5), Elf64_Chdr)."""
    packed = struct.pack("<IIQQ", 1, 0, 250_000_000, 1) + zlib.compress(bytes(250_000_000))
    changes = {FLAGS: 0x802, OFFSET: len(versioned), SIZE: len(packed)}
    path = patched(tmp_path / "lib.so", versioned + packed, **{name: changes})
    for read in (Elf.read, fatbin.kernels):
        with bounded(), contextlib.suppress(ElfError):
            read(path)


@pytest.mark.parametrize("name", ["dynsym", "dynstr", "rodata"])
def test_section_without_bytes_does_not_allocate_zeros(tmp_path, versioned, name):
    path = patched(tmp_path / "lib.so", versioned, **{name: {KIND: 8, SIZE: 4 << 30}})  # SHT_NOBITS
    for read in (Elf.read, fatbin.kernels):
        with bounded(), contextlib.suppress(ElfError):
            read(path)


def test_overlapping_symbol_names_are_refused(tmp_path, versioned):
    """40,000 symbols with names of half a megabyte would take 20 GB."""
    symbols = b"".join(struct.pack("<IBBHQQ", number + 1, 0x12, 0, 1, 0, 0) for number in range(40_000))
    names = {OFFSET: len(versioned) + len(symbols), SIZE: 500_002}
    whole = versioned + symbols + b"\0" + b"x" * 500_000 + b"\0"
    path = patched(tmp_path / "lib.so", whole, dynsym={OFFSET: len(versioned), SIZE: len(symbols)}, dynstr=names)
    with bounded(), pytest.raises(ElfError, match="the names of its symbols overlap"):
        Elf.read(path)


def test_endless_version_table_is_refused(tmp_path):
    path = compiled(tmp_path / "lib.so", "#include <stdio.h>\nvoid f(void) { puts(0); }")
    section = next(section for section in Elf.read(path).sections if section.name == ".gnu.version_r")
    content = bytearray(path.read_bytes())
    content[section.offset + 12 : section.offset + 16] = bytes(4)  # vn_next: the entry is its own successor
    header = content.index(struct.pack("<QQ", section.offset, section.size)) + 16
    content[header + 4 : header + 8] = b"\xff\xff\xff\xff"  # sh_info: the number of entries
    path.write_bytes(content)
    with pytest.raises(ElfError, match="refer to the same bytes too often"):
        Elf.read(path)


def test_programs_and_shared_objects_are_binaries_and_cubins_are_not(tmp_path, library):
    cubin = bytearray(library.read_bytes())
    cubin[18:20] = (190).to_bytes(2, "little")
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    (tmp_path / "short").write_bytes(b"\x7fELF")
    assert elf.is_binary(library)
    assert elf.is_binary(Path(sys.executable))
    assert not elf.is_binary(tmp_path / "kernel.cubin")
    assert not elf.is_binary(tmp_path / "short")
    assert not elf.is_binary(Path(__file__))
