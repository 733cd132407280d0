"""Tests of reading device code: synthetic fatbins, and real ones if nvcc is available."""

import contextlib
import hashlib
import re
import struct
import subprocess
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.corruption import ELF_COUNTED, bounded, cases
from tests.support.samples import compiled, container, image, with_device_code
from voltforge.binary import fatbin
from voltforge.binary.elf import Elf
from voltforge.binary.fatbin import FatbinError


def test_images_have_name_container_size_and_offset(tmp_path):
    units = (
        container(image(70, payload=b"\x7fELF 70"), image(80, kind=1, flags=0x2011, payload=b"ptx", packed=3))
        + bytes(8)  # the padding that a linker puts between two units
        + container(image(90, flags=0x100011), image(100, flags=0x1208011, payload=b"zstd", packed=4))
    )
    path = with_device_code(tmp_path / "lib.so", units)
    images = fatbin.images(path)
    assert [image.name for image in images] == ["sm_70", "compute_80", "sm_90a", "sm_100f"]
    assert [image.container for image in images] == [0, 0, 1, 1]
    assert [image.compressed for image in images] == [False, True, False, True]
    assert [image.uncompressed for image in images][:2] == [7, 9]
    assert path.read_bytes()[images[0].offset : images[0].offset + images[0].size] == b"\x7fELF 70"
    assert images[0].sha256() == hashlib.sha256(b"\x7fELF 70").hexdigest()


def test_a_binary_without_device_code_has_no_images(tmp_path):
    assert fatbin.images(compiled(tmp_path / "lib.so", "")) == []


def test_unlinked_device_code_is_marked_relocatable(tmp_path):
    path = with_device_code(tmp_path / "lib.so", container(image(70)), section="__nv_relfatbin")
    assert [image.relocatable for image in fatbin.images(path)] == [True]


@pytest.mark.parametrize(
    ("code", "at", "why"),
    [
        (b"not a fatbin at all", 0, "is not a container: it begins with 0x20746f6e"),
        (container(image(70))[:-1], 0, "is a container that ends beyond its section"),
        (container()[:10], 0, "is cut short within a container's header"),
        (container(image(70)[:20]), 16, "is cut short within an image's header"),
        (container(image(70)[:-1]), 16, "is an image that ends beyond its container"),
        (container(image(70), image(70, kind=64)), 16 + 72, "is an image of kind 64"),
        (container(image(70, flags=0x2011)), 16, "whose compressed size contradicts its flags"),
        (container(image(70, packed=99, flags=0x2011)), 16, "whose compressed size contradicts its flags"),
        (b"\x50\xed\x55\xba\x02\x00" + bytes(26), 0, "is a container of version 2"),
        (b"\x50\xed\x55\xba\x01\x00\x00\x00" + bytes(24), 0, "is a container of version 1"),
    ],
)
def test_malformed_device_code_is_refused_with_its_offset(tmp_path, code, at, why):
    path = with_device_code(tmp_path / "lib.so", code)
    with pytest.raises(FatbinError, match=why) as caught:
        fatbin.images(path)
    section = next(section for section in Elf.read(path).sections if section.name == ".nv_fatbin")
    assert caught.value.offset == section.offset + at


def test_a_section_that_ends_beyond_the_file_is_refused(tmp_path):
    path = with_device_code(tmp_path / "lib.so", container(image(70)))
    section = next(section for section in Elf.read(path).sections if section.name == ".nv_fatbin")
    header = struct.pack("<QQ", section.offset, section.size)
    assert path.read_bytes().count(header) == 1
    path.write_bytes(path.read_bytes().replace(header, struct.pack("<QQ", section.offset, 1 << 40)))
    with pytest.raises(FatbinError, match="ends beyond the file"):
        fatbin.images(path)


@cases(300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.just(bytes(8)),
            st.lists(
                st.builds(
                    image, st.integers(0, 2**32 - 1), kind=st.integers(0, 3), payload=st.binary(max_size=40),
                    flags=st.sampled_from([0x11, 0x2011, 0x8011, 0x100011]), packed=st.integers(0, 50),
                ),
                max_size=3,
            ).map(lambda images: container(*images)),
        ),
        max_size=4,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)  # fmt: skip
def test_arbitrary_device_code_is_read_or_refused_within_limits(tmp_path, counted, pieces, damage):
    code = bytearray(b"".join(pieces))
    for place, byte in damage:
        if place < len(code):
            code[place] = byte
    host = tmp_path / "host.so"
    if not host.exists():
        with_device_code(host, bytes(4096))
    section = next(section for section in Elf.read(host).sections if section.name == ".nv_fatbin")
    path = tmp_path / "damaged.so"
    whole = bytearray(host.read_bytes())
    whole[section.offset : section.offset + section.size] = code.ljust(section.size, b"\0")[: section.size]
    path.write_bytes(whole)
    with bounded(), contextlib.suppress(FatbinError):
        for device_image in fatbin.images(path):
            assert (
                section.offset
                < device_image.offset
                <= device_image.offset + device_image.size
                <= section.offset + section.size
            )
    counted(ELF_COUNTED)


def test_overlapping_device_code_sections_are_refused(tmp_path):
    path = with_device_code(tmp_path / "lib.so", container(image(70)) * 400)
    content = tmp_path / "piece"
    content.write_bytes(bytes(8))
    words = ["objcopy", "--add-section", f"__nv_relfatbin={content}", path]
    subprocess.run([*map(str, words)], check=True)
    code = next(section for section in Elf.read(path).sections if section.name == ".nv_fatbin")
    piece = next(section for section in Elf.read(path).sections if section.name == "__nv_relfatbin")
    header = struct.pack("<QQ", piece.offset, piece.size)
    assert path.read_bytes().count(header) == 1
    path.write_bytes(path.read_bytes().replace(header, struct.pack("<QQ", code.offset, code.size)))
    with pytest.raises(FatbinError, match="overlaps another section with device code"):
        fatbin.images(path)


def test_large_padding_between_units_is_skipped_without_a_copy(tmp_path):
    path = with_device_code(tmp_path / "lib.so", container(image(70)) + bytes(20_000_000) + container(image(80)))
    tracemalloc.start()
    try:
        assert [device_image.name for device_image in fatbin.images(path)] == ["sm_70", "sm_80"]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_kernels_are_found_by_mangled_name_but_operators_are_not(tmp_path):
    source = """
        const char *registered[] = {"_ZN6marlin6MarlinILi256EEvPKf", "_Z3addPi", "marlin_gemm(Tensor a) -> Tensor"};
        const char *odd = "_Z3two words";
    """
    path = compiled(tmp_path / "lib.so", source)
    assert fatbin.kernels(path) == {"_ZN6marlin6MarlinILi256EEvPKf", "_Z3addPi"}


def test_kernel_name_directly_after_a_table_is_found(tmp_path):
    source = """
        const struct { char table[8], name[9], word[24]; } all = {"NO ZEROS", "_Z3addPi", "in the middle_Z3of"};
        const void *kept = &all;
    """
    assert fatbin.kernels(compiled(tmp_path / "lib.so", source)) == {"_Z3addPi"}


@pytest.mark.slow
def test_nvcc_device_code_is_listed_as_by_cuobjdump(tmp_path, toolchain):
    nvcc = toolchain.home / "bin" / "nvcc"
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    oldest, newest = codes[0], codes[-1]
    units = []
    for name in ("one", "two"):
        source = tmp_path / f"{name}.cu"
        source.write_text(f"__global__ void {name}(int *a) {{ a[threadIdx.x] += 1; }}\nvoid go(int *a);\n")
        units.append(tmp_path / f"{name}.o")
        arch = [
            f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in dict.fromkeys([oldest, newest])
        ]
        ptx = oldest.replace("sm", "compute")
        command = [nvcc, "-ccbin", toolchain.host.cxx, *arch, f"-gencode=arch={ptx},code={ptx}"]
        command += ["-Xcompiler", "-fPIC", "-c", source, "-o", units[-1]]
        subprocess.run([*map(str, command)], check=True, cwd=tmp_path)
    path = tmp_path / "lib.so"
    subprocess.run(["gcc", "-shared", "-o", path, *units, "-Wl,--unresolved-symbols=ignore-all"], check=True)
    counts = Counter(image.name for image in fatbin.images(path))
    assert counts == Counter({oldest: 2, newest: 2, ptx: 2})
    assert fatbin.kernels(path) == {"_Z3onePi", "_Z3twoPi"}
    words = [toolchain.home / "bin" / "cuobjdump", "-lelf", path]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert Counter(re.findall(r"(sm_\w+)\.cubin", listed)) == Counter({oldest: 2, newest: 2})
