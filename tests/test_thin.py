"""Device images removed from shared objects and wheels: what stays is the same bytes, and everything still loads."""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.samples import compiled, container, image, wheel
from voltforge import cubin, elf, environment, files
from voltforge.checkout import Settings
from voltforge.elf import Elf
from voltforge.fatbin import ThinError, thin_binary
from voltforge.pipeline import Pipeline
from voltforge.recipe import Stub, Thin, ThinRecipe, load_all
from voltforge.thin import NVIDIA, make_stub, thin_wheel
from voltforge.wheel import Wheel, record_problems, unpack

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEFT_OUT = ("nvidia-cusparselt-cu12", "nvidia-nvshmem-cu12")
REGISTERED = """
    __attribute__((visibility("hidden"))) extern const struct wrapper {
        unsigned magic, version; const unsigned char *data; const void *more;
    } wrappers[];
    static const char *const words[] = {"far", "behind"};
    const unsigned char *code_of(int number) { return wrappers[number].data; }
    const char *word(int number) { return words[number]; }
"""


def payload(seed: int, size: int = 9000) -> bytes:
    """Bytes that are the same for the same seed and compress badly, like a cubin that nvcc has compressed."""
    return hashlib.shake_128(bytes([seed])).digest(size // 8 * 8)


def registered(
    path: Path, *containers: bytes, flags: tuple[str, ...] = (), source: str = "", wrappers: str | None = None
) -> Path:
    """A shared object with these fatbins, registered as nvcc does it. Made up, for where no nvcc can be had.

    ``wrappers`` is the assembly of ``.nvFatBinSegment``; without it each fatbin has a wrapper, in order.
    """
    code = ""
    for number, data in enumerate(containers):
        raw = path.with_suffix(f".{number}")
        raw.write_bytes(data)
        code += f'.balign 8\\nfatbin{number}:\\n.incbin \\"{raw}\\"\\n'
    if wrappers is None:
        wrappers = "".join(f".long 0x466243b1, 1\\n.quad fatbin{number}, 0\\n" for number in range(len(containers)))
    assembly = f'.pushsection .nv_fatbin,\\"a\\"\\n{code}.popsection\\n'
    table = f".hidden wrappers\\n.globl wrappers\\nwrappers:\\n{wrappers}"
    assembly += f'.pushsection .nvFatBinSegment,\\"aw\\"\\n.balign 8\\n{table}.popsection'
    return compiled(path, f'__asm__("{assembly}");\n{REGISTERED}{source}', "-Wl,--build-id", *flags)


def two_units(path: Path, **more) -> Path:
    """Two fatbins with code for 7.0, 8.0 and 9.0, the second with PTX besides."""
    return registered(
        path,
        container(image(70, payload=payload(1)), image(80, payload=payload(2)), image(90, payload=payload(3))),
        container(
            image(80, payload=payload(4)), image(70, payload=payload(5, 16)), image(90, payload=payload(6)),
            image(90, kind=1, payload=payload(7)), image(90, payload=payload(8), flags=0x100011),
        ),
        **more,
    )  # fmt: skip


def hashes(path: Path, *names: str) -> list[tuple[int, str, str]]:
    found = [(image.container, image.name, image.sha256()) for image in cubin.images(path)]
    return [one for one in found if one[1] in names] if names else found


def loaded(path: Path, count: int) -> list[bytes]:
    """The fatbins that the wrappers of a library point to once it is loaded, read in a process of their own."""
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
def test_only_the_images_of_the_asked_archs_stay_and_the_rest_loads_as_before(tmp_path, archs, first, second):
    path = two_units(tmp_path / "lib.so")
    out = tmp_path / "thin.so"
    thinned = thin_binary(path, out, archs)
    assert hashes(out) == hashes(path, *cubin.names(archs))
    assert (thinned.kept, thinned.removed) == (len(first + second), 8 - len(first + second))
    assert (thinned.before, thinned.after) == (path.stat().st_size, out.stat().st_size)
    removed = sum(image.size for image in cubin.images(path)) - sum(image.size for image in cubin.images(out))
    assert thinned.before - thinned.after > removed - 4096
    sizes = {1: 9000, 2: 9000, 4: 9000, 5: 16}
    expected = [
        container(*(image(arch, payload=payload(seed, sizes[seed])) for arch, seed in one)) for one in (first, second)
    ]
    assert loaded(out, 2) == expected


def test_variants_and_ptx_stay_where_they_are_asked_for(tmp_path):
    path = two_units(tmp_path / "lib.so")
    for archs, names in [
        (["9.0"], {"sm_90"}),
        (["9.0", "9.0a"], {"sm_90", "sm_90a"}),
        (["9.0+PTX"], {"sm_90", "compute_90"}),
    ]:
        thin_binary(path, tmp_path / "thin.so", archs)
        assert {image.name for image in cubin.images(tmp_path / "thin.so")} == names


def test_nothing_but_the_device_code_changes_its_address_or_content(tmp_path):
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
    # The wrappers hold the addends of their relocations too, as GNU ld leaves them; labels of containers follow them.
    assert changed == {".nv_fatbin", ".rela.dyn", ".nvFatBinSegment", ".symtab"}
    assert all(before[name][0] == after[name][0] for name in before)
    assert Elf.read(tmp_path / "thin.so").undefined == Elf.read(path).undefined


def test_labels_of_containers_follow_them(tmp_path):
    path = two_units(tmp_path / "lib.so")
    thin_binary(path, tmp_path / "thin.so", ["7.0"])
    second = cubin.containers(tmp_path / "thin.so")[1]
    with (tmp_path / "thin.so").open("rb") as file:
        parsed = ELFFile(file)
        labels = {symbol.name: symbol["st_value"] for symbol in parsed.get_section_by_name(".symtab").iter_symbols()}
        assert list(parsed.address_offsets(labels["fatbin1"])) == [second.offset]


def test_the_segments_stay_ascending_congruent_and_within_the_file(tmp_path):
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


def test_where_less_than_a_page_is_saved_the_file_keeps_its_size(tmp_path):
    path = registered(
        tmp_path / "lib.so", container(image(70, payload=payload(1, 64)), image(80, payload=payload(2, 64)))
    )
    thinned = thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert thinned.after == thinned.before
    assert loaded(tmp_path / "thin.so", 1) == [container(image(70, payload=payload(1, 64)))]


def test_where_nothing_is_to_be_removed_the_file_stays_as_it_is(tmp_path):
    path = registered(tmp_path / "lib.so", container(image(70)), container(), container(image(70)))
    thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert (tmp_path / "thin.so").read_bytes() == path.read_bytes()
    host = compiled(tmp_path / "host.so", "int answer(void) { return 42; }")
    assert thin_binary(host, tmp_path / "copy.so", ["7.0"]).kept == 0
    assert (tmp_path / "copy.so").read_bytes() == host.read_bytes()


def test_a_container_without_the_arch_is_refused_by_number_and_place_or_emptied_if_told(tmp_path):
    path = registered(
        tmp_path / "lib.so",
        container(image(70, payload=payload(1))),
        container(),
        container(image(80, payload=payload(2))),
    )
    with pytest.raises(ThinError, match="is container 2, which has sm_80 and no sm_70") as caught:
        thin_binary(path, tmp_path / "thin.so", ["7.0"])
    assert caught.value.offset == cubin.containers(path)[2].offset
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
        ("points to more than a container", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 7\\n"}),
        ("points to more than a container", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, fatbin1\\n"}),
        ("no section of whole wrappers", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0\\n"}),
        ("has wrappers that no relocation fills", {"wrappers": ".long 0x466243b1, 1\\n.quad 0, 0\\n"}),
        ("is a container that no wrapper points to", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 0\\n"}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0, 0\\n" * 2}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad fatbin0 + 16, 0\\n"}),
        ("a container of its own", {"wrappers": ".long 0x466243b1, 1\\n.quad word, 0\\n"}),
        ("leads into the device code, and not from", {"source": '__asm__(".data\\n.quad fatbin1\\n.text");'}),
        ("leads into the device code, and not from", {"source": '__asm__(".data\\n.quad fatbin1 + 40\\n.text");'}),
        ("is a symbol that leads into the device code", {"source": '__asm__(".globl other\\nother = fatbin0");'}),
        ("is a symbol that leads into the device code", {"source": '__asm__("inside = fatbin0 + 40");'}),
        ("has relocations that are not understood here (DT_RELR)", {"flags": ("-Wl,-z,pack-relative-relocs",)}),
        ("has no room for the program header", {"flags": NO_NOTES}),
        ("is no shared object", {"flags": ("-pie", "-no-pie"), "source": "int main(void) { return 0; }"}),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path, why, more):
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


NAMED = (".dynamic", ".rela.dyn", ".nvFatBinSegment", ".nv_fatbin", ".dynsym", "headers")


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from(["", *NAMED]), st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4
    ),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=2),
)
def test_damage_is_refused_or_harmless_and_nothing_half_written_stays(tmp_path, near, anywhere):
    whole, damaged, out = tmp_path / "whole.so", tmp_path / "damaged.so", tmp_path / "thin.so"
    if not whole.exists():
        two_units(whole)
    content = bytearray(whole.read_bytes())
    places = {section.name: section.offset for section in Elf.read(whole).sections}
    places |= {"": 0, "headers": int.from_bytes(content[40:48], "little")}
    for name, at, byte in near:
        content[min(places[name] + at, len(content) - 1)] = byte
    for part, byte in anywhere:
        content[int(part * len(content))] = byte
    damaged.write_bytes(content)
    out.unlink(missing_ok=True)
    with contextlib.suppress(ThinError):
        thinned = thin_binary(damaged, out, ["7.0", "9.0"])
        assert out.stat().st_size == thinned.after
    if out.exists():
        assert hashes(out) == hashes(damaged, "sm_70", "sm_90")
    assert {path.name for path in tmp_path.iterdir()} <= {"whole.so", "whole.0", "whole.1", "damaged.so", "thin.so"}


STUB = Stub(folder="sample", why="which is left out", answers={"is_there": 7})


def called(path: Path, name: str) -> subprocess.CompletedProcess[str]:
    program = f"import ctypes; print(ctypes.CDLL({str(path)!r}).{name}(1, 2, 3))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_stub_answers_or_says_which_function_was_called_and_ends_the_program(tmp_path):
    path = tmp_path / "libodd.so.3"
    make_stub(path, "libodd.so.3", ["compute", "is_there", "_ZN3odd4tellEv"], STUB)
    assert called(path, "is_there").stdout == "7\n"
    done = called(path, "compute")
    assert done.returncode == -6
    assert done.stderr == "compute was called, a function of libodd.so.3, which is left out.\n"
    found = Elf.read(path)
    assert found.soname == "libodd.so.3"
    assert found.names == {"compute", "is_there", "_ZN3odd4tellEv"}
    assert found.needed == ("libc.so.6",)
    assert found.needs == {("libc.so.6", "GLIBC_2.2.5")}
    assert path.stat().st_size < 20_000


def test_a_stub_is_the_same_bytes_wherever_it_is_made(tmp_path):
    for folder in ("one", "two"):
        make_stub(tmp_path / folder / "libodd.so", "libodd.so", ["compute"], STUB)
    assert (tmp_path / "one/libodd.so").read_bytes() == (tmp_path / "two/libodd.so").read_bytes()


@pytest.mark.parametrize("symbol", ["_ZTV3Odd", "not a name", "odd@@V1"])
def test_what_is_no_function_gets_no_stub(tmp_path, symbol):
    with pytest.raises(ThinError, match="which is no function"):
        make_stub(tmp_path / "libodd.so", "libodd.so", [symbol], STUB)
    assert not (tmp_path / "libodd.so").exists()


SPECIAL = Thin(
    drop=("sample/bin/tool-*",),
    stubs={
        "libodd.so.3": Stub(
            folder="sample/lib", prefix="odd", why="which is left out", since="8.0", requirement="odd-lib",
            lines={"sample/__init__.py": '"odd": "libodd.so",'},
        )
    },
    version="sample/version.py",
    arch_list="sample/lib/libtold.so",
)  # fmt: skip
METADATA = 'Requires-Dist: numpy\nRequires-Dist: Odd_Lib==1.0; platform_system == "Linux"\n\nVersion: of the text\n'


def sample_wheel(folder: Path, **content) -> Path:
    """A wheel of torch's shape, small: a library with device code, one that lists archs, one that needs another."""
    folder.mkdir(parents=True, exist_ok=True)
    odd = compiled(folder / "real/libodd.so.3", "int odd_one(void) { return 1; }", "-Wl,-soname,libodd.so.3")
    user = "int odd_one(void); int used(void) { return odd_one(); }"
    return wheel(
        folder,
        {
            "sample/__init__.py": 'libraries = {\n    "even": "libeven.so",\n    "odd": "libodd.so",\n}\n',
            "sample/version.py": "__version__ = '1.0+cu128'\ncuda = '12.8'\n",
            "sample/bin/tool-3.13": "#!/bin/sh\n",
            "sample/lib/libcode.so": two_units(folder / "libcode.so"),
            "sample/lib/libcublas.so.12": two_units(folder / "libcublas.so.12"),
            "sample/lib/libtold.so": compiled(
                folder / "libtold.so", 'const char *archs(void) { return "sm_70 sm_80 sm_90 compute_90"; }'
            ),
            "sample/lib/libuser.so": compiled(folder / "libuser.so", user, str(odd), "-Wl,-rpath,$ORIGIN"),
            **content,
        },
        tag="cp38-abi3-manylinux_2_28_x86_64",
        metadata=METADATA,
    )


def test_a_wheel_is_thinned_and_says_so(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], special=SPECIAL)
    assert thin.name == "sample-1.0+sm70.thin-cp38-abi3-manylinux_2_28_x86_64.whl"
    found = Wheel.read(thin)
    assert [str(requirement) for requirement in found.requires] == ["numpy"]
    assert found.tags == found.declared == Wheel.read(stock).tags
    folder = tmp_path / "content"
    unpack(thin, folder)
    assert record_problems(folder) == []
    assert (folder / "sample-1.0+sm70.thin.dist-info/METADATA").read_text().endswith("\n\nVersion: of the text\n")
    assert (folder / "sample/version.py").read_text() == "__version__ = '1.0+sm70.thin'\ncuda = '12.8'\n"
    assert (folder / "sample/__init__.py").read_text() == 'libraries = {\n    "even": "libeven.so",\n}\n'
    assert not (folder / "sample/bin").exists()
    assert {image.name for image in cubin.images(folder / "sample/lib/libcode.so")} == {"sm_70"}
    assert Elf.read(folder / "sample/lib/libcode.so").stripped
    assert called(folder / "sample/lib/libuser.so", "used").stderr == (
        "odd_one was called, a function of libodd.so.3, which is left out.\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).archs; f.restype = ctypes.c_char_p;"
         "print(f().split())", folder / "sample/lib/libtold.so"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told == "[b'sm_70']\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [thin.name]


def test_nvidias_libraries_stay_as_they_are(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], special=SPECIAL)
    with zipfile.ZipFile(stock) as before, zipfile.ZipFile(thin) as after:
        name = "sample/lib/libcublas.so.12"
        assert after.read(name) == before.read(name)
    own = wheel(tmp_path / "own", {"nvidia/a.py": ""}, name="nvidia_cublas_cu12")
    with pytest.raises(ThinError, match="licence does not allow"):
        thin_wheel(own, tmp_path / "out", ["7.0"])


@pytest.mark.parametrize("name", ["libcudart-218eec4c.so.12", "libcuda.so.1", "libnccl.so.2", "libcudnn_ops.so.9"])
def test_bundled_libraries_of_nvidia_are_known_by_name(name):
    assert any(Path(name).match(pattern) for pattern in NVIDIA)
    assert not any(Path(other).match(pattern) for pattern in NVIDIA for other in ("libcudf.so", "libtorch_cuda.so"))


def test_equal_wheels_give_equal_bytes(tmp_path, monkeypatch):
    stock = sample_wheel(tmp_path / "stock")
    one = thin_wheel(stock, tmp_path / "one", ["7.0"], special=SPECIAL)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    two = thin_wheel(Path(shutil.copy(stock, tmp_path)), tmp_path / "two", ["7.0"], special=SPECIAL)
    assert one.read_bytes() == two.read_bytes()


def test_the_version_names_every_arch_and_keeps_a_local_part(tmp_path):
    content = {"sample/lib.so": two_units(tmp_path / "lib.so")}
    stock = wheel(tmp_path / "stock", content, version="1.0+cu128", tag="py3-none-linux_x86_64")
    thin = thin_wheel(stock, tmp_path, ["7.0", "9.0", "9.0a+PTX"])
    assert Wheel.read(thin).version.local == "cu128.sm70.sm90.sm90a.compute90a.thin"


def test_binaries_without_the_arch_are_all_named_or_left_out_if_told(tmp_path):
    foreign = {name: registered(tmp_path / name, container(image(90))) for name in ("fa3.so", "mla.so")}
    mixed = registered(tmp_path / "mixed.so", container(image(70)), container(image(80)))
    content = {**{f"sample/{name}": path for name, path in foreign.items()}, "sample/mixed.so": mixed}
    stock = wheel(tmp_path / "stock", content, tag="py3-none-linux_x86_64")
    with pytest.raises(ThinError) as caught:
        thin_wheel(stock, tmp_path / "out", ["7.0"])
    for said in ("sample/fa3.so has device code for sm_90 alone", "sample/mla.so", "sample/mixed.so", "container 1"):
        assert said in caught.value.what
    assert "drop_foreign" in caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], drop_foreign=True)
    unpack(thin, tmp_path / "content")
    assert [path.name for path in (tmp_path / "content/sample").iterdir()] == ["mixed.so"]
    assert [image.name for image in cubin.images(tmp_path / "content/sample/mixed.so")] == ["sm_70"]


@pytest.mark.parametrize(
    ("why", "content"),
    [
        ("holds nothing that matches sample/bin/tool-*", {"drop": ("sample/bin/tool-*",)}),
        ("says __version__ 0 times", {"version": "sample/__init__.py"}),
        ("holds no sample/version.py", {"version": "sample/version.py"}),
        ("holds 0 lists of archs", {"arch_list": "sample/lib.so"}),
        (
            "imports nothing from libodd.so",
            {"stubs": {"libodd.so": Stub(folder="sample", why="which is left out", prefix="odd")}},
        ),
    ],
)
def test_a_step_that_finds_nothing_to_do_is_refused(tmp_path, why, content):
    stock = wheel(
        tmp_path / "stock", {"sample/__init__.py": "", "sample/lib.so": compiled(tmp_path / "lib.so", "")},
        tag="py3-none-linux_x86_64",
    )  # fmt: skip
    with pytest.raises(ThinError, match=re.escape(why)):
        thin_wheel(stock, tmp_path / "out", ["7.0"], special=Thin(**content))


@pytest.mark.parametrize(
    ("why", "more"),
    [
        ("does not require another-lib", {"requirement": "another-lib"}),
        ("has the line nowhere 0 times in sample/__init__.py", {"lines": {"sample/__init__.py": "nowhere"}}),
    ],
)
def test_what_a_stub_should_take_along_must_be_there(tmp_path, why, more):
    stock = sample_wheel(tmp_path / "stock")
    stub = Stub(folder="sample/lib", prefix="odd", why="which is left out", **more)
    with pytest.raises(ThinError, match=why):
        thin_wheel(stock, tmp_path / "out", ["7.0"], special=Thin(stubs={"libodd.so.3": stub}))


def test_a_library_that_has_code_for_an_asked_arch_is_not_replaced(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0", "8.0"], special=SPECIAL)
    assert len(Wheel.read(thin).requires) == 2
    with zipfile.ZipFile(thin) as archive:
        assert "sample/lib/libodd.so.3" not in archive.namelist()
        assert b'"odd"' in archive.read("sample/__init__.py")


def test_a_binary_that_strip_would_damage_is_refused(tmp_path, monkeypatch):
    content = {"sample/lib.so": two_units(tmp_path / "lib.so")}
    stock = wheel(tmp_path / "stock", content, tag="py3-none-linux_x86_64")

    def harmful(path):  # strip itself harms only what some releases of patchelf have laid out
        section = next(section for section in Elf.read(path).sections if section.name == ".rodata")
        with path.open("r+b") as file:
            file.seek(section.offset)
            file.write(b"!")

    monkeypatch.setattr(elf, "strip", harmful)
    with pytest.raises(ThinError, match="it is damaged by strip"):
        thin_wheel(stock, tmp_path / "out", ["7.0"])


def test_a_library_of_the_wheel_itself_is_replaced_by_what_the_others_import_from_it(tmp_path):
    odd = compiled(
        tmp_path / "libodd.so", "int one(void) { return 1; } int two(void) { return 2; }", "-Wl,-soname,libodd.so"
    )
    user = compiled(tmp_path / "libuser.so", "int one(void); int used(void) { return one(); }", str(odd))
    stock = wheel(tmp_path / "stock", {"sample/libodd.so": odd, "sample/libuser.so": user}, tag="py3-none-linux_x86_64")
    stubs = {"libodd.so": Stub(folder="sample", why="which is left out", answers={"one": 11})}
    unpack(thin_wheel(stock, tmp_path / "out", ["7.0"], special=Thin(stubs=stubs)), tmp_path / "content")
    assert Elf.read(tmp_path / "content/sample/libodd.so").names == {"one"}


@pytest.mark.slow
def test_a_real_library_of_nvccs_is_thinned_to_either_arch_and_loads(tmp_path, toolchain):
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
        assert [one for one, _, _ in hashes(out)] == [0, 1]
        assert thinned.after < thinned.before
        assert listed_by_cuobjdump(toolchain, out) == {name: 2}
        # Without a GPU that is the driver's absence; the runtime has registered both units by then.
        assert (
            subprocess.run([sys.executable, "-c", launch, out], capture_output=True, text=True, check=True).stdout
            == stock
        )
        said = subprocess.run(["readelf", "-lW", out], capture_output=True, text=True, check=True)
        assert not said.stderr
        assert len(re.findall(r"^ +LOAD ", said.stdout, re.MULTILINE)) == 5


def listed_by_cuobjdump(toolchain, path: Path) -> dict[str, int]:
    words = [toolchain.home / "bin/cuobjdump", "-lelf", path]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return dict(Counter(re.findall(r"(sm_\w+)\.cubin", printed)))


def recipe(repository: Path) -> ThinRecipe:
    found = load_all(repository / "recipes", {"torch": "thin"})["torch"]
    assert isinstance(found, ThinRecipe)
    return found


def test_every_stock_torch_wheel_is_one_of_the_lock(repository):
    locked = (repository / "recipes/locks/vllm-build.txt").read_text()
    stock = recipe(repository).wheels
    assert [wheel.file.split("-")[2] for wheel in stock] == ["cp310", "cp311", "cp312", "cp313"]
    assert all(f"--hash=sha256:{wheel.sha256}" in locked for wheel in stock)


@pytest.fixture(scope="module")
def torch(repository, tmp_path_factory):
    """The stock torch wheel of the running Python, and it thinned to 7.0."""
    pipeline = Pipeline.load(repository, Settings(torch="thin"))
    stock = pipeline.package(pipeline.recipes["torch"]).fetched()
    folder = tmp_path_factory.mktemp("torch")
    yield stock, thin_wheel(stock, folder, ["7.0"], special=recipe(repository).thin)
    files.remove(folder)


@pytest.mark.slow
def test_stock_torch_keeps_every_cubin_of_sm_70_byte_for_byte_and_nothing_else(torch, tmp_path, toolchain):
    stock, thin = torch
    assert thin.name == stock.name.replace("2.9.0", "2.9.0+sm70.thin")
    assert thin.stat().st_size <= 320_000_000
    for name, units, most in (("libtorch_cuda.so", 397, 212_000_000), ("libtorch_cuda_linalg.so", 107, 36_000_000)):
        before, after = tmp_path / "stock", tmp_path / "thin"
        for archive, folder in ((stock, before), (thin, after)):
            with zipfile.ZipFile(archive) as file:
                file.extract(f"torch/lib/{name}", folder)
        before, after = (folder / "torch/lib" / name for folder in (before, after))
        assert hashes(after) == hashes(before, "sm_70")
        assert [number for number, _, _ in hashes(after)] == list(range(units))
        assert after.stat().st_size <= most
        assert listed_by_cuobjdump(toolchain, after) == {"sm_70": units}
        files.remove(before)
        files.remove(after)


CPU_TEST = """
import torch
from torch.distributed._symmetric_memory import is_nvshmem_available
a, b = torch.randn(300, 300, dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)
assert torch.allclose(a @ torch.linalg.solve(a, b), b)
assert torch.allclose(torch.fft.ifft(torch.fft.fft(b)).real, b)
assert torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3)).sum() == 9 * 36
assert not is_nvshmem_available()
import ctypes, pathlib
ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib/libtorch_cuda_linalg.so"))
assert ctypes.CDLL("libcusparseLt.so.0").cusparseLtInit(None) == 10
print(torch.__version__, torch._C._cuda_getArchFlags().split())
"""


@pytest.mark.slow
def test_thinned_torch_works_in_an_environment_of_what_it_still_requires(torch, repository, tmp_path):
    _, thin = torch
    pins = re.split(r"(?m)^(?=[a-z0-9])", (repository / "recipes/locks/vllm-build.txt").read_text())
    lock = tmp_path / "lock.txt"
    lock.write_text("".join(pin for pin in pins if pin.split("==")[0] not in {"torch", *LEFT_OUT}))
    store = Pipeline.load(repository, Settings()).store
    fresh = environment.create(lock, tmp_path / "environment", store.indexes)
    environment.add(fresh, thin)
    assert environment.unmet(fresh) == []
    done = subprocess.run([fresh.python, "-I", "-c", CPU_TEST], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "2.9.0+sm70.thin ['sm_70']\n")
    loaded = fresh.site_packages / "nvidia"
    assert not [path for path in ("cusparselt", "nvshmem") if (loaded / path).exists()]
    files.remove(fresh.path)


@pytest.mark.slow
def test_thinned_torch_is_the_same_bytes_each_time(torch, repository, tmp_path):
    stock, thin = torch
    again = thin_wheel(stock, tmp_path, ["7.0"], special=recipe(repository).thin)
    assert files.sha256(again) == files.sha256(thin)
    again.unlink()
