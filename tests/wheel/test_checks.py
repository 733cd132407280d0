"""The checks of a wheel: a good wheel passes, and each fault is reported."""

import json
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.samples import EPOCH, compiled, container, image, wheel, with_device_code
from voltforge.binary import elf
from voltforge.errors import VoltforgeError
from voltforge.system import console
from voltforge.wheel import checks, file_checks
from voltforge.wheel.examined_wheel import Expectation, InstalledPython
from voltforge.wheel.findings import Finding, failed, report
from voltforge.wheel.wheelfile import finish, unpack

TAG = "cp38-abi3-linux_x86_64"
MODULE = """
#define Py_LIMITED_API 0x03080000
#include <Python.h>
static struct PyModuleDef module = { PyModuleDef_HEAD_INIT, "_C", 0, -1, 0 };
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
"""


def found(findings: list[Finding], check: str) -> list[tuple[str, str]]:
    return [(finding.severity, finding.detail) for finding in findings if finding.check == check]


def only(findings: list[Finding], check: str) -> tuple[str, str]:
    (one,) = found(findings, check)
    return one


def examined(folder: Path, content: dict, expect: Expectation | None = None, *, metadata: str = "", **given):
    """The findings about a wheel of this content."""
    tag = TAG if any(".so" in name for name in content) else "py3-none-any"
    return checks.verify(wheel(folder, content, tag=tag, metadata=metadata), expect or Expectation(), **given)


def stripped(path: Path) -> Path:
    elf.strip(path)
    return path


@pytest.fixture
def extension(tmp_path):
    """A real extension module of the stable ABI with made-up device code for 7.0: two units."""
    flags = (f"-I{sysconfig.get_path('include')}", "-O1")
    code = tmp_path / "code.fatbin"
    code.write_bytes(container(image(70)) + container(image(70)))
    assembly = f'__asm__(".pushsection .nv_fatbin,\\"a\\"\\n.incbin \\"{code}\\"\\n.popsection");'
    return stripped(compiled(tmp_path / "_C.abi3.so", MODULE + assembly, *flags))


@pytest.fixture
def environment(tmp_path):
    """A real, empty environment of the interpreter that runs the tests."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


def install(path: Path, python: Path) -> None:
    unpack(path, InstalledPython.of(python).site)


def test_good_wheel_passes_every_check(tmp_path, extension, environment):
    raw = wheel(
        tmp_path / "raw", {"sample/__init__.py": "", "sample/_C.abi3.so": extension}, tag=TAG,
        metadata="Requires-Dist: torch==2.9.0\nRequires-Dist: ray; extra == 'ray'\n",
    )  # fmt: skip
    path = finish(raw, tmp_path, runpath={"sample/*.so": ["$ORIGIN/../torch/lib"]}, epoch=EPOCH)
    install(path, environment)
    expect = Expectation(
        extensions=("sample/_C.abi3.so",),
        arch=("7.0",),
        absent=("*marlin*",),
        max_size=20_000_000,
        requires=("torch==2.9.0",),
        requires_not=("ray",),
        imports=("sample", "sample._C"),
    )
    findings = checks.verify(
        path, expect, linked={"sample/_C.abi3.so": 2}, forbidden_paths=[str(tmp_path)], environment=environment
    )  # fmt: skip
    assert failed(findings) == []
    assert {finding.check for finding in findings if finding.severity == "pass"} == {
        "wheel", "tag", "requirements", "size", "extensions", "device code", "absent", "build paths", "RUNPATH",
        "stripped", "symbols", "imports",
    }  # fmt: skip
    assert ("pass", "sample/_C.abi3.so sm_70 (2)") in found(findings, "device code")


def test_malformed_wheel_is_a_single_failure(tmp_path):
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    path.write_bytes(b"nothing")
    (finding,) = checks.verify(path, Expectation())
    assert (finding.check, finding.severity) == ("wheel", "fail")


def test_file_missing_from_record_is_reported(tmp_path):
    path = wheel(tmp_path, {"a.py": ""})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("late.py", "")
    assert only(checks.verify(path, Expectation()), "wheel") == ("fail", "late.py is missing from RECORD")


def test_malformed_binary_is_reported(tmp_path, extension):
    broken = tmp_path / "broken.so"
    broken.write_bytes(extension.read_bytes()[:100])
    severity, detail = only(examined(tmp_path, {"sample/_C.so": broken}), "wheel")
    assert severity == "fail"
    assert detail.startswith("sample/_C.so is not a well-formed ELF file")


def test_tags_that_differ_between_file_name_and_wheel_file_are_reported(tmp_path, extension):
    path = wheel(tmp_path, {"sample/_C.so": extension}, tag=TAG)
    renamed = path.rename(tmp_path / path.name.replace("linux", "manylinux_2_31"))
    assert found(checks.verify(renamed, Expectation()), "tag")[0] == (
        "fail", "the file name has the tags cp38-abi3-manylinux_2_31_x86_64, but WHEEL has cp38-abi3-linux_x86_64",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "holds"),
    [
        ("linux_x86_64", True),
        ("manylinux_2_34_x86_64", True),
        ("manylinux_2_36_x86_64", True),
        ("manylinux_2_31_x86_64", False),
        ("manylinux2014_x86_64", False),
        ("manylinux1_x86_64", False),
        ("manylinux_2_36_aarch64", False),
        ("any", False),
    ],
)
def test_tag_must_not_allow_older_platforms_than_the_binaries(tag, holds):
    assert file_checks._covers(tag, "manylinux_2_34_x86_64") == holds


def test_wheel_with_an_unlisted_library_must_not_be_tagged_manylinux(tmp_path):
    base = compiled(tmp_path / "libodd.so.3", "int odd(void) { return 1; }", "-Wl,-soname,libodd.so.3")
    user = compiled(tmp_path / "user.so", "int odd(void); int f(void) { return odd(); }", str(base))
    path = wheel(tmp_path, {"sample/_C.so": stripped(user)}, tag="py3-none-manylinux_2_34_x86_64")
    severity, detail = found(checks.verify(path, Expectation()), "tag")[0]
    assert severity == "fail"
    assert "allows older platforms than linux_x86_64" in detail
    assert "it needs libodd.so.3" in detail
    assert found(checks.verify(path, Expectation(provided=("libodd.so.3",))), "tag")[0][0] == "pass"


def test_missing_different_and_forbidden_requirements_are_reported(tmp_path):
    metadata = "Requires-Dist: triton>=3\nRequires-Dist: Flash_Infer==1\nRequires-Dist: ray; extra == 'x'\n"
    expect = Expectation(requires=("torch", "triton==3.5.0", "ray"), requires_not=("flash-infer", "ray"))
    assert found(examined(tmp_path, {"a.py": ""}, expect, metadata=metadata), "requirements") == [
        ("fail", "METADATA does not require torch"),
        ("fail", "METADATA requires triton>=3 instead of triton==3.5.0"),
        ("fail", "METADATA does not require ray"),
        ("fail", "METADATA requires Flash_Infer==1, which is not allowed"),
    ]


def test_wheel_over_its_size_limit_is_reported(tmp_path):
    severity, detail = only(examined(tmp_path, {"a.py": ""}, Expectation(max_size=10)), "size")
    assert severity == "fail"
    assert detail.endswith("more than the allowed 10 B")


def test_extensions_that_are_missing_or_not_shared_objects_are_reported(tmp_path):
    expect = Expectation(extensions=("a/_C.abi3.so", "a/text.so"))
    assert found(examined(tmp_path, {"a/text.so": "text"}, expect), "extensions") == [
        ("fail", "a/_C.abi3.so is missing"),
        ("fail", "a/text.so is not a shared object"),
    ]


@pytest.mark.parametrize(
    ("code", "arch", "linked", "problems"),
    [
        ([image(70)], ("7.0",), 1, []),
        ([image(70)], ("7.0",), None, []),
        ([image(70)], ("7.0",), 2, ["holds 1 images of sm_70, but 2 CUDA objects were linked into it"]),
        ([image(70), image(80)], ("7.0",), None, ["holds sm_80 (1), which the recipe does not list"]),
        ([image(80)], ("7.0",), None, ["holds sm_80 (1), which the recipe does not list", "holds no sm_70"]),
        ([image(70), image(70, kind=1)], ("7.0",), None, ["holds compute_70 (1), which the recipe does not list"]),
        ([image(70), image(70, kind=1)], ("7.0+PTX",), None, []),
        ([image(70)], ("7.0+PTX",), None, ["holds no compute_70"]),
        ([image(90)], ("9.0a",), None, ["holds sm_90 (1), which the recipe does not list", "holds no sm_90a"]),
        ([image(90, flags=0x100011)], ("9.0a",), None, []),
        ([image(70), image(120)], ("7.0", "12.0"), 1, []),
        ([], ("7.0",), 1, ["holds 0 images of sm_70, but 1 CUDA objects were linked into it"]),
        ([], ("7.0",), None, []),
        ([image(70, kind=9)], ("7.0",), None, ["is an image of kind 9, which is not supported"]),
    ],
)
def test_device_code_must_match_the_recipe(tmp_path, code, arch, linked, problems):
    path = stripped(with_device_code(tmp_path / "_C.so", container(*code)))
    given = {"linked": {"a/_C.so": linked}} if linked is not None else {}
    findings = failed(examined(tmp_path, {"a/_C.so": path}, Expectation(arch=arch), **given))
    assert len(findings) == len(problems)
    for finding, problem in zip(findings, problems, strict=True):
        assert finding.check == "device code"
        assert problem in finding.detail


def test_device_code_that_was_never_linked_is_reported(tmp_path):
    path = with_device_code(tmp_path / "_C.so", container(image(70)), section="__nv_relfatbin")
    findings = examined(tmp_path, {"a/_C.so": path}, Expectation(arch=("7.0",)))
    assert only(findings, "device code")[0] == "fail"
    assert "which nvlink has not linked" in only(findings, "device code")[1]


def test_missing_extension_with_device_code_is_reported(tmp_path):
    findings = examined(tmp_path, {"a.py": ""}, Expectation(arch=("7.0",)), linked={"a/_C.so": 3})
    assert only(findings, "device code") == ("fail", "a/_C.so should contain device code, but is missing")


def test_architectures_are_written_as_in_torch_cuda_arch_list(tmp_path):
    with pytest.raises(VoltforgeError, match="'sm_70' is not an architecture"):
        examined(tmp_path, {"a.py": ""}, Expectation(arch=("sm_70",)))


def test_forbidden_kernels_and_binaries_are_reported_but_not_python_files(tmp_path):
    source = (
        'const char *names[] = {"_ZN6marlin6MarlinILi4EEEvPKf", "_Z3addPi", "gptq_marlin_gemm(Tensor a) -> Tensor"};'
    )
    path = stripped(compiled(tmp_path / "_C.so", source))
    content = {"a/_C.so": path, "a/_vllm_fa2_C.so": path, "a/gptq_marlin.py": ""}
    assert found(examined(tmp_path, content, Expectation(absent=("*_vllm_fa*", "*marlin*"))), "absent") == [
        ("fail", "a/_C.so has 1 kernels or device variables that match *marlin*, such as _ZN6marlin6MarlinILi4EEEvPKf"),
        ("fail", "a/_vllm_fa2_C.so matches the forbidden pattern *_vllm_fa*"),
        ("fail", "a/_vllm_fa2_C.so has 1 kernels or device variables that match *marlin*, "
                 "such as _ZN6marlin6MarlinILi4EEEvPKf"),
    ]  # fmt: skip


def test_path_of_the_build_machine_is_reported_in_any_file(tmp_path):
    path = stripped(compiled(tmp_path / "_C.so", 'const char *file = "-I/srv/build/include";'))
    content = {"a/_C.so": path, "a/config.py": "CC = '/srv/build/bin/gcc'\n", "a/other.py": "'/srv/builder'\n"}
    assert found(examined(tmp_path, content, forbidden_paths=["/srv/build/"]), "build paths") == [
        ("fail", "a/_C.so names /srv/build"),
        ("fail", "a/config.py names /srv/build"),
    ]


def test_source_path_in_a_home_folder_is_reported_but_not_a_run_time_folder(tmp_path):
    at_run_time = '"/tmp/nccl-XXXXXX", "/tmp/fuserXXXXXX.cpp", "/home/you/.cache/vllm", "/usr/include/stdio.h"'
    strings = f'"/home/me/vllm/csrc/cache.cu", {at_run_time}'
    path = stripped(compiled(tmp_path / "_C.so", f"const char *files[] = {{ {strings} }};"))
    content = {"a/_C.so": path, "a/docs.md": "see /home/you/vllm/csrc/cache.cu\n"}
    findings = examined(tmp_path, content)
    assert found(findings, "build paths") == [("fail", "a/_C.so names /home/me/vllm/csrc/cache.cu")]


@pytest.mark.parametrize(
    ("entry", "allowed", "problem"),
    [
        ("$ORIGIN/../torch/lib", (), None),
        ("${ORIGIN}", (), None),
        ("$ORIGIN/../..", (), "leads out of site-packages"),
        ("/usr/local/cuda/lib64", (), "leads out of site-packages"),
        ("lib", (), "leads out of site-packages"),
        ("$ORIGIN/../torch/lib", ("$ORIGIN/../torch/*",), None),
        ("$ORIGIN", ("$ORIGIN/../torch/*",), "which matches none of $ORIGIN/../torch/*"),
    ],
)
def test_runpath_must_stay_inside_site_packages(tmp_path, entry, allowed, problem):
    path = stripped(compiled(tmp_path / "_C.so", "", f"-Wl,-rpath,{entry}"))
    severity, detail = only(examined(tmp_path, {"a/_C.so": path}, Expectation(runpath=allowed)), "RUNPATH")
    assert severity == ("fail" if problem else "pass")
    assert (problem or "1 entries") in detail


def test_unstripped_binary_is_reported(tmp_path):
    severity, detail = only(examined(tmp_path, {"a/_C.so": compiled(tmp_path / "_C.so", "", "-g")}), "stripped")
    assert severity == "fail"
    assert detail.startswith("a/_C.so is not stripped: ")


def test_checks_without_an_environment_are_noted_as_not_checked(tmp_path, extension):
    findings = examined(tmp_path, {"sample/_C.abi3.so": extension}, Expectation(imports=("sample._C",)))
    for check in ("symbols", "imports"):
        severity, detail = only(findings, check)
        assert (severity, detail[:11]) == ("note", "not checked")


def test_missing_libraries_and_symbols_are_reported(tmp_path, environment):
    base = compiled(tmp_path / "libgone.so.1", "int gone(void) { return 1; }", "-Wl,-soname,libgone.so.1")
    source = "int gone(void); int typo(void); int f(void) { return gone() + typo(); }"
    path = stripped(compiled(tmp_path / "_C.so", source, str(base)))
    findings = examined(tmp_path, {"a/_C.so": path}, environment=environment)
    assert found(findings, "symbols") == [
        ("fail", "a/_C.so needs libgone.so.1, which no folder of the search path contains"),
        ("fail", "a/_C.so finds 2 of its 2 symbols nowhere: gone, typo"),
    ]


def test_driver_stub_replaces_a_missing_driver(tmp_path, environment):
    stub = compiled(
        tmp_path / "stubs" / "libcuda.so.1", "int cuInit(int f) { return 100; }", "-Wl,-soname,libcuda.so.1"
    )
    path = stripped(compiled(tmp_path / "_C.so", "int cuInit(int); int f(void) { return cuInit(0); }", str(stub)))
    findings = examined(tmp_path, {"a/_C.so": path}, environment=environment, driver_stub=stub.parent)
    assert only(findings, "symbols")[0] == "pass"


def test_libraries_that_need_torch_imported_first_are_noted(tmp_path, environment):
    site = InstalledPython.of(environment).site
    torch = compiled(site / "torch" / "lib" / "libtorch.so", "int at(void) { return 1; }", "-Wl,-soname,libtorch.so")
    path = stripped(compiled(tmp_path / "_C.so", "int at(void); int f(void) { return at(); }", str(torch)))
    findings = examined(tmp_path, {"a/_C.so": path}, environment=environment)
    assert found(findings, "symbols") == [
        ("pass", "all 1 that 1 binaries ask for are found"),
        ("note", "a/_C.so find libtorch.so only after torch was imported"),
    ]


def test_failing_import_is_reported_with_its_reason(tmp_path, extension, environment):
    content = {
        "sample/__init__.py": "print('noise')",
        "sample/_C.abi3.so": extension,
        "sample/bad.py": "raise RuntimeError('first line\\nsecond')",
        "sample/crash.py": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "sample/leaves.py": "import sys; sys.exit('gone')",
    }
    path = wheel(tmp_path, content, tag=TAG)
    install(path, environment)
    modules = ("sample._C", "sample.bad", "sample.crash", "sample.leaves", "sample.none")
    findings = checks.verify(path, Expectation(imports=modules), environment=environment)
    assert found(findings, "imports") == [
        ("fail", "import sample.bad: RuntimeError: first line"),
        ("fail", "import sample.crash: python was ended by SIGSEGV"),
        ("fail", "import sample.leaves: SystemExit: gone"),
        ("fail", "import sample.none: ModuleNotFoundError: No module named 'sample.none'"),
    ]


def test_import_finds_a_user_name_when_the_user_id_has_none(tmp_path, environment, monkeypatch):
    """torch asks for the user name on import, and containers run with ids that passwd(5) lacks."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    content = {"sample/__init__.py": "import getpass, os\nos.getuid = lambda: 123456789\ngetpass.getuser()"}
    path = wheel(tmp_path, content)
    install(path, environment)
    findings = checks.verify(path, Expectation(imports=("sample",)), environment=environment)
    assert [severity for severity, _ in found(findings, "imports")] == ["pass"]


def test_imports_are_not_tried_with_a_different_build_installed(tmp_path, extension, environment):
    path = wheel(tmp_path, {"sample/__init__.py": "", "sample/_C.abi3.so": extension}, tag=TAG)
    install(path, environment)
    with (InstalledPython.of(environment).site / "sample" / "_C.abi3.so").open("ab") as file:
        file.write(b"\0")
    findings = checks.verify(path, Expectation(imports=("sample._C",)), environment=environment)
    severity, detail = only(findings, "imports")
    assert severity == "fail"
    assert detail.endswith("has a different build of sample/_C.abi3.so, or lacks it")


def test_unregistered_operators_are_named(tmp_path, environment):
    # A fake: the real torch is 2.8 GB. This one answers the one call that is made, as torch 2.9.0 does.
    names = json.dumps(["_C::rms_norm", "_C::gelu.out", "_C::extra", "aten::add.Tensor"])
    site = InstalledPython.of(environment).site
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("from torch import _C\n")
    (site / "torch" / "_C.py").write_text(f"def _dispatch_get_all_op_names():\n    return {names}\n")
    path = wheel(tmp_path, {"sample/__init__.py": ""})
    install(path, environment)
    expect = Expectation(imports=("sample",), ops=("_C::rms_norm", "_C::gelu", "_C::silu"))
    findings = checks.verify(path, expect, environment=environment)
    assert found(findings, "operators") == [
        ("fail", "_C::silu is not registered"),
        ("note", "1 more are registered: _C::extra"),
    ]


CONFIGURED = """
def show():
    return "Build settings: BUILD_TYPE=Release, USE_CUDNN=ON, USE_NNPACK=0, USE_NCCL=1, USE_MPI=OFF, BLAS_INFO=mkl"

def broken():
    raise RuntimeError("no config")
"""


@pytest.mark.parametrize(
    ("variables", "finding"),
    [
        (
            {"USE_CUDNN": "1", "USE_MPI": "0", "USE_XPU": "0"},
            ("pass", "2 variables as in the recipe: USE_CUDNN, USE_MPI"),
        ),
        ({"USE_CUDNN": "0"}, ("fail", "it reports USE_CUDNN=ON, but was built with 0")),
        ({"BUILD_TYPE": "Debug"}, ("fail", "it reports BUILD_TYPE=Release, but was built with Debug")),
        ({"USE_XPU": "0"}, ("fail", "sample.show() reports none of the variables of its build")),
    ],
)
def test_configuration_that_differs_from_the_recipe_is_reported(tmp_path, environment, variables, finding):
    path = wheel(tmp_path, {"sample/__init__.py": CONFIGURED})
    install(path, environment)
    expect = Expectation(imports=("sample",), config="sample.show()", variables=variables)
    assert found(checks.verify(path, expect, environment=environment), "configuration") == [finding]


def test_configuration_that_cannot_be_evaluated_is_reported(tmp_path, environment):
    path = wheel(tmp_path, {"sample/__init__.py": CONFIGURED})
    install(path, environment)
    expect = Expectation(imports=("sample",), config="sample.broken()", variables={"USE_CUDNN": "1"})
    [(severity, detail)] = found(checks.verify(path, expect, environment=environment), "configuration")
    assert (severity, detail) == ("fail", "sample.broken(): RuntimeError: no config")


def test_values_that_differ_from_the_recipe_are_reported(tmp_path, environment):
    path = wheel(tmp_path, {"sample/__init__.py": CONFIGURED, "sample/more.py": "CUDA = '12.8'"})
    install(path, environment)
    says = {"sample.more.CUDA": "12.*", "sample.show()": "*mkl", "len(sample.none)": "1", "' sm_70   '": "sm_80"}
    expect = Expectation(imports=("sample.more",), says=says)
    assert found(checks.verify(path, expect, environment=environment), "answers") == [
        ("pass", "sample.more.CUDA is 12.8"),
        ("pass", f"sample.show() is {CONFIGURED.split(chr(34))[1]}"),
        ("fail", "len(sample.none) is \"AttributeError: module 'sample' has no attribute 'none'\", not '1'"),
        ("fail", "' sm_70   ' is 'sm_70', not 'sm_80'"),
    ]
    assert only(checks.verify(path, expect), "answers")[0] == "note"


def test_report_shows_every_finding(monkeypatch):
    shown = []
    monkeypatch.setattr(console, "table", lambda title, columns, rows: shown.extend(rows))
    report([Finding("size", "pass", "1 MB"), Finding("tag", "fail", "wrong"), Finding("tag", "note", "glibc")])
    assert shown == [("ok", "size", "1 MB"), ("FAIL", "tag", "wrong"), ("note", "tag", "glibc")]
