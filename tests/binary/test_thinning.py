"""Tests of removing device images from shared objects: the rest keeps its bytes, and the file still loads."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from tests.support.corruption import ELF_COUNTED, bounded, cases, damaged, elf_fields
from tests.support.samples import compiled, container, image, listed_by_cuobjdump, payload, registered, two_units
from tests.support.samples import cubin_hashes as hashes
from voltforge.binary import elf, fatbin
from voltforge.binary.elf import Elf, ElfError
from voltforge.binary.fatbin import FatbinError
from voltforge.binary.thinning import ThinError, thin_binary


def loaded(path: Path, count: int) -> list[bytes]:
    """Return the fatbins that the wrappers of a loaded library point to, read in a process of its own."""
    program = """if True:
        import ctypes, sys
        library = ctypes.CDLL(sys.argv[1])
        library.code_of.restype, library.word.restype = ctypes.c_void_p, ctypes.c_char_p
        assert [library.word(0), library.word(1)] == [b"far", b"behind"]
        for number in range(int(sys.argv[2])):
            head = ctypes.string_at(library.code_of(number), 16)
            body = int.from_bytes(head[8:], "little")
            print((ctypes.string_at(library.code_of(number), 16 + body)).hex())
    """
    done = subprocess.run([sys.executable, "-c", program, path, str(count)], capture_output=True, text=True, check=True)
    return [bytes.fromhex(line) for line in done.stdout.split()]


@pytest.mark.parametrize(
    ("archs", "first", "second"),
    [
        (["7.0"], [(70, 1)], [(70, 5)]),
        (["8.0"], [(80, 2)], [(80, 4)]),
        (["7.0", "8.0"], [(70, 1), (80, 2)], [(80, 4), (70, 5)]),
    ],
)
def test_only_images_of_the_wanted_archs_stay_and_still_load(tmp_path, archs, first, second):
    path = two_units(tmp_path / "lib.so")
    out = tmp_path / "thin.so"
    thinned = thin_binary(path, out, archs)
    assert hashes(out) == hashes(path, *fatbin.image_names(archs))
    assert (thinned.kept, thinned.removed) == (len(first + second), 8 - len(first + second))
    assert (thinned.before, thinned.after) == (path.stat().st_size, out.stat().st_size)
    removed = sum(image.size for image in fatbin.images(path)) - sum(image.size for image in fatbin.images(out))
    assert thinned.before - thinned.after > removed - 4096
    sizes = {1: 9000, 2: 9000, 4: 9000, 5: 16}
    expected = [
        container(*(image(arch, payload=payload(seed, sizes[seed])) for arch, seed in one)) for one in (first, second)
    ]
    assert loaded(out, 2) == expected


def test_variants_and_ptx_stay_if_requested(tmp_path):
    path = two_units(tmp_path / "lib.so")
    for archs, names in [
        (["9.0"], {"sm_90"}),
        (["9.0", "9.0a"], {"sm_90", "sm_90a"}),
        (["9.0+PTX"], {"sm_90", "compute_90"}),
    ]:
        thin_binary(path, tmp_path / "thin.so", archs)
        assert {image.name for image in fatbin.images(tmp_path / "thin.so")} == names


def test_only_device_code_and_its_references_change(tmp_path):
    path = two_units(tmp_path / "lib.so")
    thin_binary(path, tmp_path / "thin.so", ["7.0"])

    def sections(path):
        with path.open("rb") as file:
            return {
                section.name: (section["sh_addr"], section.data() if section["sh_type"] != "SHT_NOBITS" else b"")
                for section in ELFFile(file).iter_sections()
            }

    before, after = sections(path), sections(tmp_path / "thin.so")
    changed = {name for name in before if before[name] != after[name]}
    # GNU ld also writes the addends of relocations into the wrappers; debug symbols of containers follow them.
    assert changed == {".nv_fatbin", ".rela.dyn", ".nvFatBinSegment", ".symtab"}
    assert all(before[name][0] == after[name][0] for name in before)
    assert Elf.read(tmp_path / "thin.so").undefined == Elf.read(path).undefined


def test_debug_symbols_follow_their_containers(tmp_path):
    path = two_units(tmp_path / "lib.so")
    thin_binary(path, tmp_path / "thin.so", ["7.0"])
    second = fatbin.containers(tmp_path / "thin.so")[1]
    with (tmp_path / "thin.so").open("rb") as file:
        parsed = ELFFile(file)
        labels = {symbol.name: symbol["st_value"] for symbol in parsed.get_section_by_name(".symtab").iter_symbols()}
        assert list(parsed.address_offsets(labels["fatbin1"])) == [second.offset]


def test_segments_stay_ascending_congruent_and_within_the_file(tmp_path):
    path = two_units(tmp_path / "lib.so")
    thin_binary(path, tmp_path / "thin.so", ["8.0"])
    with path.open("rb") as old, (tmp_path / "thin.so").open("rb") as new:
        before, after = ([s.header for s in ELFFile(file).iter_segments()] for file in (old, new))
    loads = [segment for segment in after if segment["p_type"] == "PT_LOAD"]
    assert len(after) == len(before)
    assert len(loads) == 1 + sum(segment["p_type"] == "PT_LOAD" for segment in before)
    ends = [0]
    for load in loads:
        assert load["p_offset"] % 4096 == load["p_vaddr"] % 4096
        assert load["p_offset"] + load["p_filesz"] <= (tmp_path / "thin.so").stat().st_size
        assert load["p_vaddr"] // 4096 * 4096 >= ends[-1]
        ends.append((load["p_vaddr"] + load["p_memsz"] + 4095) // 4096 * 4096)


def test_a_thinned_file_can_be_stripped_and_thinned_again(tmp_path):
    path = two_units(tmp_path / "lib.so")
    stock = hashes(path, "sm_70")
    thin_binary(path, path, ["7.0", "8.0"])
    elf.strip(path)
    thin_binary(path, path, ["7.0"])
    assert hashes(path) == stock
    assert len(loaded(path, 2)) == 2


def test_file_keeps_its_size_if_less_than_a_page_is_saved(tmp_path):
    path = registered(
        tmp_path / "lib.so", container(image(70, payload=payload(1, 64)), image(80, payload=payload(2, 64)))
    )
    thinned = thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert thinned.after == thinned.before
    assert loaded(tmp_path / "thin.so", 1) == [container(image(70, payload=payload(1, 64)))]


def test_file_is_unchanged_if_no_image_is_removed(tmp_path):
    path = registered(tmp_path / "lib.so", container(image(70)), container(), container(image(70)))
    thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert (tmp_path / "thin.so").read_bytes() == path.read_bytes()
    host = compiled(tmp_path / "host.so", "int answer(void) { return 42; }")
    assert thin_binary(host, tmp_path / "copy.so", ["7.0"]).kept == 0
    assert (tmp_path / "copy.so").read_bytes() == host.read_bytes()


def test_container_without_the_arch_is_refused_or_emptied_with_drop_foreign(tmp_path):
    path = registered(
        tmp_path / "lib.so",
        container(image(70, payload=payload(1))),
        container(),
        container(image(80, payload=payload(2))),
    )
    with pytest.raises(ThinError, match="is container 2, which has sm_80 and no sm_70") as caught:
        thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert caught.value.offset == fatbin.containers(path)[2].offset
    assert not (tmp_path / "thin.so").exists()
    thin_binary(path, tmp_path / "thin.so", ["7.0"], drop_foreign=True)
    assert loaded(tmp_path / "thin.so", 3) == [container(image(70, payload=payload(1))), container(), container()]


CODE = (container(image(70, payload=payload(1)), image(80, payload=payload(2))), container(image(70), image(80)))
NO_NOTES = ("-nostartfiles", "-fcf-protection=none", "-Wl,--build-id=none")


@pytest.mark.parametrize(
    ("why", "more"),
    [
        ("is a wrapper 0x466243b1 of version 2", {"wrappers": ".long 0x466243b1, 2\\n.quad fatbin0, 0\\n"}),
        ("is a wrapper 0x12345678 of version 1", {"wrappers": ".long 0x12345678, 1\\n.quad fatbin0, 0\\n"}),
        ("points to more than one container", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 7\\n"}),
        ("points to more than one container", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, fatbin1\\n"}),
        ("is not a loaded section of whole wrappers", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0\\n"}),
        ("has wrappers that no relocation fills", {"wrappers": ".long 0x466243b1, 1\\n.quad 0, 0\\n"}),
        ("is a container that no wrapper points to", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 0\\n"}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 0\\n" * 2}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0 + 16, 0\\n"}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad word, 0\\n"}),
        ("is a relocation into the device code", {"source": '__asm__(".data\\n.quad fatbin1\\n.text");'}),
        ("is a relocation into the device code", {"source": '__asm__(".data\\n.quad fatbin1 + 40\\n.text");'}),
        ("is a symbol in the device code", {"source": '__asm__(".globl other\\nother = fatbin0");'}),
        ("is a symbol in the device code", {"source": '__asm__("inside = fatbin0 + 40");'}),
        ("has relocations that are not supported (DT_RELR)", {"flags": ("-Wl,-z,pack-relative-relocs",)}),
        ("has no room for the program header", {"flags": NO_NOTES}),
        ("is not a shared object", {"flags": ("-pie", "-no-pie"), "source": "int main(void) { return 0; }"}),
    ],
)  # fmt: skip
def test_unsupported_layouts_are_refused_and_leave_the_file_unchanged(tmp_path, why, more):
    path = registered(tmp_path / "lib.so", *CODE, **more)
    before = path.read_bytes()
    with pytest.raises(ThinError, match=re.escape(why)):
        thin_binary(path, path, ["7.0"])
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_relocatable_device_code_is_refused(tmp_path):
    (tmp_path / "piece").write_bytes(container(image(70)))
    piece = f'__asm__(".pushsection __nv_relfatbin,\\"a\\"\\n.incbin \\"{tmp_path}/piece\\"\\n.popsection");'
    path = registered(tmp_path / "lib.so", *CODE, source=piece)
    with pytest.raises(ThinError, match="is relocatable device code"):
        thin_binary(path, tmp_path / "thin.so", ["7.0"])


def tried(folder: Path, whole: bytes, damage: bytes) -> None:
    """Thin a damaged library, and check that it is refused, or that the wanted images are unchanged."""
    path, out = folder / "damaged.so", folder / "thin.so"
    path.write_bytes(damage)
    out.unlink(missing_ok=True)
    with bounded(), contextlib.suppress(ThinError):
        thinned = thin_binary(path, out, ["7.0", "9.0"], drop_foreign=True)
        assert out.stat().st_size == thinned.after <= len(damage)
    if out.exists():
        assert hashes(out) == hashes(path, "sm_70", "sm_90")
    assert path.read_bytes() == damage
    assert {file.name for file in folder.iterdir()} <= {"damaged.so", "thin.so"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return two_units(tmp_path_factory.mktemp("whole") / "lib.so").read_bytes()


@cases(500)
@given(data=st.data())
def test_damaged_library_is_refused_or_thinned_correctly(tmp_path, counted, whole, data):
    tried(tmp_path, whole, data.draw(damaged(whole, elf_fields(whole))))
    counted(ELF_COUNTED)


@pytest.fixture(scope="module")
def real(tmp_path_factory, toolchain):
    """Return a small library of nvcc with code for 7.0 and 8.0."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "add.cu").write_text("__global__ void add(int *a) { a[0]++; }\nvoid go(int *a) { add<<<1, 1>>>(a); }\n")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (70, 80)]
    words = [toolchain.home / "bin/nvcc", "-ccbin", toolchain.host.cxx, *codes, "-cudart=none", "-Xcompiler", "-fPIC"]
    subprocess.run([*map(str, words), "-c", "add.cu", "-o", "add.o"], check=True, cwd=folder)
    link = ["gcc", "-shared", "-o", "lib.so", "add.o", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run(link, check=True, cwd=folder)
    return (folder / "lib.so").read_bytes()


@pytest.mark.slow
@cases(400)
@given(data=st.data())
def test_damaged_nvcc_library_is_refused_or_thinned_correctly(tmp_path, counted, real, data):
    damage = data.draw(damaged(real, elf_fields(real)))
    tried(tmp_path, real, damage)
    for read in (Elf.read, fatbin.kernels, fatbin.images):
        with bounded(), contextlib.suppress(ElfError, FatbinError):
            read(tmp_path / "damaged.so")
    counted(ELF_COUNTED)


@pytest.mark.slow
def test_nvcc_library_is_thinned_to_either_arch_and_loads(tmp_path, toolchain):
    units = []
    for name in ("one", "two"):
        steps = "".join(
            f"x = x * x + sinf(x + {number}.f) / (x - {number}.5f); a[{number}] = x;\n" for number in range(80)
        )
        source = tmp_path / f"{name}.cu"
        source.write_text(
            f"__global__ void {name}(float *a) {{ float x = a[threadIdx.x]; {steps} }}\n"
            f'extern "C" int launch_{name}() {{ {name}<<<1, 1>>>(nullptr); return cudaGetLastError(); }}\n'
        )
        units.append(source.with_suffix(".o"))
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (70, 80)]
        words = [toolchain.home / "bin/nvcc", "-ccbin", toolchain.host.cxx, *codes, "-cudart=shared"]
        subprocess.run(
            [*map(str, words), "-Xcompiler", "-fPIC", "-c", source, "-o", units[-1]], check=True, cwd=tmp_path
        )
    path = tmp_path / "lib.so"
    runtime = toolchain.home / "lib64"
    link = ["g++", "-shared", "-o", path, *units, f"-L{runtime}", "-lcudart", f"-Wl,-rpath,{runtime.resolve()}"]
    subprocess.run(link, check=True)
    launch = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).launch_one())"
    stock = subprocess.run([sys.executable, "-c", launch, path], capture_output=True, text=True, check=True).stdout
    for arch, name in (("7.0", "sm_70"), ("8.0", "sm_80")):
        out = tmp_path / f"{name}.so"
        thinned = thin_binary(path, out, [arch])
        assert hashes(out) == hashes(path, name)
        assert [number for number, _, _ in hashes(out)] == [0, 1]
        assert thinned.after < thinned.before
        assert listed_by_cuobjdump(toolchain, out) == {name: 2}
        # Without a GPU the launch fails because there is no driver; both units are registered by then.
        assert (
            subprocess.run([sys.executable, "-c", launch, out], capture_output=True, text=True, check=True).stdout
            == stock
        )
        headers = subprocess.run(["readelf", "-lW", out], capture_output=True, text=True, check=True)
        assert not headers.stderr
        assert len(re.findall(r"^ +LOAD ", headers.stdout, re.MULTILINE)) == 5
