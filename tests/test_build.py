"""A build sees what was declared, says how far it is, shows its first error, and goes on where it was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.checkouts import ROOT, edited
from voltforge import build, files, wheel
from voltforge.build import BuildError, Progress, first_error
from voltforge.checkout import Settings
from voltforge.errors import VoltforgeError
from voltforge.package import Package
from voltforge.pipeline import Pipeline
from voltforge.process import Usage
from voltforge.sandbox import Sandbox

KINDS = ("fetch", "tree", "environment", "build")


def package(pipeline: Pipeline) -> Package:
    return pipeline.package(pipeline.recipes["saxpy"])


def built(pipeline: Pipeline) -> Path:
    """Run the stages as far as the wheel, and give it."""
    for kind in KINDS:
        package(pipeline).stage(kind).run()
    return Path(package(pipeline).stage("build").results()["path"])


def objects(pipeline: Pipeline) -> dict[str, int]:
    """When each object was compiled."""
    return {path.name: path.stat().st_mtime_ns for path in (pipeline.scratch / "work").rglob("*.cu.o")}


def test_the_live_line_tells_step_object_time_and_memory() -> None:
    progress = Progress()
    assert progress.see("-- Detecting CXX", Usage()).startswith("configuring, 0:00")
    line = progress.see(
        "[3/41] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o", Usage(now=1_500_000_000)
    )
    assert line == "[3/41] cache_kernels.cu.o, 0:00, 1.50 GB"
    assert progress.see("", Usage(now=1)).startswith("[3/41] cache_kernels.cu.o")


def test_the_first_error_is_shown_and_not_the_ten_thousand_lines_after_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = ["[1/2] Building CUDA object a.cu.o", "a.h(3): warning #177-D: declared but never referenced"]
    lines += ["FAILED: a.cu.o", "nvcc -c a.cu", 'a.cu(7): error: identifier "foo" is undefined', "  foo();"]
    lines += ["b.cu(9): error: a later one"] + [f"noise {number}" for number in range(10_000)] + ["Error: exit 1"]
    log.write_text("\n".join(lines))
    shown = first_error(log).splitlines()
    assert shown[:2] == ["FAILED: a.cu.o", 'a.cu(7): error: identifier "foo" is undefined']
    assert len(shown) < 20


def test_without_a_line_that_stands_out_the_last_ones_are_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(100)))
    assert first_error(tmp_path / "log").endswith("line 99")
    assert first_error(tmp_path / "absent") == "(there is no log)"


@pytest.mark.slow
def test_a_package_is_compiled_for_sm_70_and_names_no_folder_of_the_build(saxpy: Pipeline) -> None:
    made = wheel.Wheel.read(built(saxpy))
    assert (made.name, str(made.version)) == ("saxpy", "1.0")
    assert package(saxpy).stage("build").results()["linked"] == {"saxpy/_C.abi3.so": 2}
    content = saxpy.root / "content"
    wheel.unpack(made.path, content)
    binary = (content / "saxpy/_C.abi3.so").read_bytes()
    assert b"csrc/saxpy.cu" in binary, "__FILE__ is in it, as the path inside the tree"
    for folder in (str(saxpy.root), str(Sandbox("bubblewrap").place("tree", Path()))):
        assert folder.encode() not in binary


@pytest.mark.slow
def test_a_build_used_processor_time_and_memory_that_are_told(saxpy: Pipeline) -> None:
    built(saxpy)
    usage = package(saxpy).stage("build").results()["usage"]
    assert usage["cpu"] > 1
    assert usage["peak"] >= usage["peak_one"] > 10_000_000


@pytest.mark.slow
def test_a_changed_source_compiles_its_own_object_again_and_gives_what_a_clean_build_gives(saxpy: Pipeline) -> None:
    built(saxpy)
    before = objects(saxpy)
    changed = edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] *= a + 1")
    incremental = built(changed).read_bytes()
    after = objects(changed)
    assert after["saxpy.cu.o"] == before["saxpy.cu.o"]
    assert after["scale.cu.o"] != before["scale.cu.o"]
    for folder in ("work", "wheels", "trees"):
        files.remove(changed.scratch / folder)
    assert built(changed).read_bytes() == incremental


@pytest.mark.slow
def test_a_compile_error_is_shown_with_the_log_and_the_next_run_goes_on(saxpy: Pipeline) -> None:
    broken = edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] *= nonsense")
    with pytest.raises(BuildError) as caught:
        built(broken)
    assert 'identifier "nonsense" is undefined' in caught.value.excerpt
    assert caught.value.log.is_file()
    assert str(caught.value.log) in caught.value.hint
    assert len(str(caught.value).splitlines()) < 20
    before = objects(broken)
    assert built(edited(broken, "csrc/scale.cu", "nonsense", "a")).is_file()
    assert before.items() <= objects(broken).items(), "what had compiled is not compiled again"


@pytest.mark.slow
def test_the_number_of_jobs_changes_nothing_but_the_time(saxpy: Pipeline) -> None:
    one = built(Pipeline.load(saxpy.root, replace(saxpy.settings, jobs="1"))).read_bytes()
    key = package(saxpy).stage("build").key()
    files.remove(saxpy.scratch / "work")
    files.remove(package(saxpy).stage("build").record)
    two = Pipeline.load(saxpy.root, Settings(jobs="3"))
    assert package(two).stage("build").key() == key
    assert built(two).read_bytes() == one


@pytest.mark.slow
def test_a_wrong_number_of_jobs_is_a_sentence(saxpy: Pipeline) -> None:
    with pytest.raises(VoltforgeError, match="jobs=many is no number of jobs"):
        built(Pipeline.load(saxpy.root, Settings(jobs="many")))


@pytest.mark.slow
def test_nothing_but_the_declared_variables_reaches_the_build(saxpy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-DSECRET_OF_THE_SHELL")
    monkeypatch.setenv("CMAKE_ARGS", "-DSECRET_OF_THE_SHELL=1")
    built(saxpy)
    tree, chosen = package(saxpy).tree(), package(saxpy).toolchain()
    places = dict.fromkeys(build.FOLDERS, Path("/place"))
    assert "SECRET" not in str(build.variables(saxpy.recipes["saxpy"], tree, chosen, places))
    caches = list((saxpy.scratch / "work").rglob("CMakeCache.txt"))
    assert caches
    assert all("SECRET" not in cache.read_text() for cache in caches)


SCRIPT = """
import sys
from pathlib import Path
from voltforge.checkout import Settings
from voltforge.pipeline import Pipeline
pipeline = Pipeline.load(Path(sys.argv[1]), Settings(jobs="2", sandbox=sys.argv[2]))
package = pipeline.package(pipeline.recipes["saxpy"])
for kind in ("fetch", "tree", "environment", "build"):
    package.stage(kind).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "off"])
def test_ctrl_c_ends_every_compiler_within_two_seconds_and_the_next_run_resumes(saxpy: Pipeline, kind: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(saxpy.root), kind]
    child = psutil.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    compilers: list[psutil.Process] = []
    while not compilers and time.monotonic() < deadline:
        time.sleep(0.05)
        compilers = [one for one in child.children(recursive=True) if one.name() in ("cicc", "cudafe++", "cc1plus")]
    assert compilers, "the build never came to compile"
    family = child.children(recursive=True)
    child.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs([child, *family], timeout=2)
    assert not alive
    assert not package(saxpy).stage("build").record.exists()
    assert built(saxpy).is_file()
