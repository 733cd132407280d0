"""Tests of thinning wheels: remaining images keep their bytes, and stubs name the called function."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.samples import compiled, container, image, registered, two_units, wheel
from voltforge.binary import elf, fatbin
from voltforge.binary.elf import Elf
from voltforge.binary.thinning import ThinError
from voltforge.sources.recipe import Stub, Thin
from voltforge.wheel.thin import NVIDIA, make_stub, thin_wheel
from voltforge.wheel.wheelfile import Wheel, record_problems, unpack

STUB = Stub(folder="sample", why="which is left out", answers={"is_there": 7})


def called(path: Path, name: str) -> subprocess.CompletedProcess[str]:
    program = f"import ctypes; print(ctypes.CDLL({str(path)!r}).{name}(1, 2, 3))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_stub_returns_a_value_or_prints_the_called_function_and_aborts(tmp_path):
    path = tmp_path / "libodd.so.3"
    make_stub(path, "libodd.so.3", ["compute", "is_there", "_ZN3odd4tellEv"], STUB)
    assert called(path, "is_there").stdout == "7\n"
    done = called(path, "compute")
    assert done.returncode == -6
    assert done.stderr == "compute was called, a function of libodd.so.3, which is left out.\n"
    library = Elf.read(path)
    assert library.soname == "libodd.so.3"
    assert library.names == {"compute", "is_there", "_ZN3odd4tellEv"}
    assert library.needed == ("libc.so.6",)
    assert library.required_versions == {("libc.so.6", "GLIBC_2.2.5")}
    assert path.stat().st_size < 20_000


def test_stub_is_reproducible_in_any_folder(tmp_path):
    for folder in ("one", "two"):
        make_stub(tmp_path / folder / "libodd.so", "libodd.so", ["compute"], STUB)
    assert (tmp_path / "one/libodd.so").read_bytes() == (tmp_path / "two/libodd.so").read_bytes()


@pytest.mark.parametrize("symbol", ["_ZTV3Odd", "not a name", "odd@@V1"])
def test_stub_of_a_symbol_that_is_not_a_function_is_refused(tmp_path, symbol):
    with pytest.raises(ThinError, match="which is not a function"):
        make_stub(tmp_path / "libodd.so", "libodd.so", [symbol], STUB)
    assert not (tmp_path / "libodd.so").exists()


SETTINGS = Thin(
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
    """Return a small wheel like torch's: with device code, a list of archs, and a library that needs another."""
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


def test_wheel_is_thinned_and_gets_a_new_version(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], settings=SETTINGS)
    assert thin.name == "sample-1.0+sm70.thin-cp38-abi3-manylinux_2_28_x86_64.whl"
    thinned = Wheel.read(thin)
    assert [str(requirement) for requirement in thinned.requires] == ["numpy"]
    assert thinned.tags == thinned.declared == Wheel.read(stock).tags
    folder = tmp_path / "content"
    unpack(thin, folder)
    assert record_problems(folder) == []
    assert (folder / "sample-1.0+sm70.thin.dist-info/METADATA").read_text().endswith("\n\nVersion: of the text\n")
    assert (folder / "sample/version.py").read_text() == "__version__ = '1.0+sm70.thin'\ncuda = '12.8'\n"
    assert (folder / "sample/__init__.py").read_text() == 'libraries = {\n    "even": "libeven.so",\n}\n'
    assert not (folder / "sample/bin").exists()
    assert {image.name for image in fatbin.images(folder / "sample/lib/libcode.so")} == {"sm_70"}
    assert Elf.read(folder / "sample/lib/libcode.so").stripped
    assert called(folder / "sample/lib/libuser.so", "used").stderr == (
        "odd_one was called, a function of libodd.so.3, which is left out.\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).archs; f.restype = ctypes.c_char_p;"
         "print(f().split())", folder / "sample/lib/libtold.so"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed == "[b'sm_70']\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [thin.name]


def test_nvidia_libraries_are_unchanged_and_nvidia_wheels_refused(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], settings=SETTINGS)
    with zipfile.ZipFile(stock) as before, zipfile.ZipFile(thin) as after:
        name = "sample/lib/libcublas.so.12"
        assert after.read(name) == before.read(name)
    own = wheel(tmp_path / "own", {"nvidia/a.py": ""}, name="nvidia_cublas_cu12")
    with pytest.raises(ThinError, match="licence does not allow"):
        thin_wheel(own, tmp_path / "out", ["7.0"])


@pytest.mark.parametrize("name", ["libcudart-218eec4c.so.12", "libcuda.so.1", "libnccl.so.2", "libcudnn_ops.so.9"])
def test_bundled_nvidia_libraries_match_by_name(name):
    assert any(Path(name).match(pattern) for pattern in NVIDIA)
    assert not any(Path(other).match(pattern) for pattern in NVIDIA for other in ("libcudf.so", "libtorch_cuda.so"))


def test_equal_wheels_give_equal_bytes(tmp_path, monkeypatch):
    stock = sample_wheel(tmp_path / "stock")
    one = thin_wheel(stock, tmp_path / "one", ["7.0"], settings=SETTINGS)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    two = thin_wheel(Path(shutil.copy(stock, tmp_path)), tmp_path / "two", ["7.0"], settings=SETTINGS)
    assert one.read_bytes() == two.read_bytes()


def test_version_has_every_arch_and_keeps_its_local_part(tmp_path):
    content = {"sample/lib.so": two_units(tmp_path / "lib.so")}
    stock = wheel(tmp_path / "stock", content, version="1.0+cu128", tag="py3-none-linux_x86_64")
    thin = thin_wheel(stock, tmp_path, ["7.0", "9.0", "9.0a+PTX"])
    assert Wheel.read(thin).version.local == "cu128.sm70.sm90.sm90a.compute90a.thin"


def test_binaries_without_the_arch_are_all_reported_or_removed_with_drop_foreign(tmp_path):
    foreign = {name: registered(tmp_path / name, container(image(90))) for name in ("fa3.so", "mla.so")}
    mixed = registered(tmp_path / "mixed.so", container(image(70)), container(image(80)))
    content = {**{f"sample/{name}": path for name, path in foreign.items()}, "sample/mixed.so": mixed}
    stock = wheel(tmp_path / "stock", content, tag="py3-none-linux_x86_64")
    with pytest.raises(ThinError) as caught:
        thin_wheel(stock, tmp_path / "out", ["7.0"])
    for words in ("sample/fa3.so has device code only for sm_90", "sample/mla.so", "sample/mixed.so", "container 1"):
        assert words in caught.value.what
    assert list((tmp_path / "out").iterdir()) == []
    thin = thin_wheel(stock, tmp_path / "out", ["7.0"], drop_foreign=True)
    unpack(thin, tmp_path / "content")
    assert [path.name for path in (tmp_path / "content/sample").iterdir()] == ["mixed.so"]
    assert [image.name for image in fatbin.images(tmp_path / "content/sample/mixed.so")] == ["sm_70"]


@pytest.mark.parametrize(
    ("why", "content"),
    [
        ("has no file that matches sample/bin/tool-*", {"drop": ("sample/bin/tool-*",)}),
        ("sets __version__ 0 times", {"version": "sample/__init__.py"}),
        ("has no sample/version.py", {"version": "sample/version.py"}),
        ("has 0 lists of archs", {"arch_list": "sample/lib.so"}),
        (
            "imports nothing from libodd.so",
            {"stubs": {"libodd.so": Stub(folder="sample", why="which is left out", prefix="odd")}},
        ),
    ],
)
def test_recipe_rule_that_matches_nothing_is_refused(tmp_path, why, content):
    stock = wheel(
        tmp_path / "stock", {"sample/__init__.py": "", "sample/lib.so": compiled(tmp_path / "lib.so", "")},
        tag="py3-none-linux_x86_64",
    )  # fmt: skip
    with pytest.raises(ThinError, match=re.escape(why)):
        thin_wheel(stock, tmp_path / "out", ["7.0"], settings=Thin(**content))


@pytest.mark.parametrize(
    ("why", "more"),
    [
        ("does not require another-lib", {"requirement": "another-lib"}),
        ("has the line nowhere 0 times in sample/__init__.py", {"lines": {"sample/__init__.py": "nowhere"}}),
    ],
)
def test_stub_whose_requirement_or_line_is_missing_is_refused(tmp_path, why, more):
    stock = sample_wheel(tmp_path / "stock")
    stub = Stub(folder="sample/lib", prefix="odd", why="which is left out", **more)
    with pytest.raises(ThinError, match=why):
        thin_wheel(stock, tmp_path / "out", ["7.0"], settings=Thin(stubs={"libodd.so.3": stub}))


def test_library_with_code_for_a_wanted_arch_is_not_replaced(tmp_path):
    stock = sample_wheel(tmp_path / "stock")
    thin = thin_wheel(stock, tmp_path / "out", ["7.0", "8.0"], settings=SETTINGS)
    assert len(Wheel.read(thin).requires) == 2
    with zipfile.ZipFile(thin) as archive:
        assert "sample/lib/libodd.so.3" not in archive.namelist()
        assert b'"odd"' in archive.read("sample/__init__.py")


def test_binary_damaged_by_strip_is_refused(tmp_path, monkeypatch):
    content = {"sample/lib.so": two_units(tmp_path / "lib.so")}
    stock = wheel(tmp_path / "stock", content, tag="py3-none-linux_x86_64")

    def harmful(path):  # the real strip damages only some files that patchelf has changed
        section = next(section for section in Elf.read(path).sections if section.name == ".rodata")
        with path.open("r+b") as file:
            file.seek(section.offset)
            file.write(b"!")

    monkeypatch.setattr(elf, "strip", harmful)
    with pytest.raises(ThinError, match="it is damaged by strip"):
        thin_wheel(stock, tmp_path / "out", ["7.0"])


def test_bundled_library_is_replaced_by_a_stub_of_the_imported_functions(tmp_path):
    odd = compiled(
        tmp_path / "libodd.so", "int one(void) { return 1; } int two(void) { return 2; }", "-Wl,-soname,libodd.so"
    )
    user = compiled(tmp_path / "libuser.so", "int one(void); int used(void) { return one(); }", str(odd))
    stock = wheel(tmp_path / "stock", {"sample/libodd.so": odd, "sample/libuser.so": user}, tag="py3-none-linux_x86_64")
    stubs = {"libodd.so": Stub(folder="sample", why="which is left out", answers={"one": 11})}
    unpack(thin_wheel(stock, tmp_path / "out", ["7.0"], settings=Thin(stubs=stubs)), tmp_path / "content")
    assert Elf.read(tmp_path / "content/sample/libodd.so").names == {"one"}
