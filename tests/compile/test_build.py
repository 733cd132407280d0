"""A build sees declared inputs only, shows progress and its first error, and resumes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.checkouts import ROOT, edited, small_checkout
from tests.support.processes import family
from tests.support.rights import ordinary_user
from tests.support.tally import Tally
from voltforge.compile import build_variables, fixed_paths, sandbox
from voltforge.compile.build import Build, BuildError, DiskError
from voltforge.compile.sandbox import Sandbox, available
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.package import Package
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.system import files
from voltforge.wheel import wheelfile

KINDS = ("fetch", "tree", "environment", "build")


def package(pipeline: Pipeline) -> Package:
    return pipeline.package(pipeline.recipes["saxpy"])


def built(pipeline: Pipeline) -> Path:
    """Run the stages up to the built wheel and return its path."""
    for kind in KINDS:
        package(pipeline).stages[kind].run()
    return Path(package(pipeline).stages["build"].result().path)


def objects(pipeline: Pipeline) -> dict[str, int]:
    """Return the time of each object."""
    return {path.name: path.stat().st_mtime_ns for path in (pipeline.scratch / "work").rglob("*.cu.o")}


@pytest.mark.slow
def test_a_package_is_compiled_for_sm_70_and_names_no_folder_of_the_build(saxpy: Pipeline) -> None:
    made = wheelfile.Wheel.read(built(saxpy))
    assert (made.name, str(made.version)) == ("saxpy", "1.0")
    assert package(saxpy).stages["build"].result().linked == {"saxpy/_C.abi3.so": 2}
    content = saxpy.root / "content"
    wheelfile.unpack(made.path, content)
    binary = (content / "saxpy/_C.abi3.so").read_bytes()
    assert b"csrc/saxpy.cu" in binary, "__FILE__ is in it, as the path inside the tree"
    for folder in (str(saxpy.root), str(Sandbox("bubblewrap").place("tree", Path()))):
        assert folder.encode() not in binary


@pytest.mark.slow
def test_a_build_reports_its_cpu_time_and_memory(saxpy: Pipeline) -> None:
    built(saxpy)
    usage = package(saxpy).stages["build"].result().usage
    assert usage.cpu > 1
    assert usage.peak >= usage.peak_one > 10_000_000


@pytest.mark.slow
def test_a_changed_source_recompiles_its_object_and_gives_the_bytes_of_a_clean_build(saxpy: Pipeline) -> None:
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
def test_a_compile_error_is_printed_with_the_log_and_the_next_run_resumes(saxpy: Pipeline) -> None:
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
    key = package(saxpy).stages["build"].key()
    files.remove(saxpy.scratch / "work")
    files.remove(package(saxpy).build.path)
    two = Pipeline.load(saxpy.root, Settings(jobs="3"))
    assert package(two).stages["build"].key() == key
    assert built(two).read_bytes() == one


@pytest.mark.slow
def test_an_invalid_number_of_jobs_fails_with_a_sentence(saxpy: Pipeline) -> None:
    with pytest.raises(VoltforgeError, match="jobs=many is not a number"):
        built(Pipeline.load(saxpy.root, Settings(jobs="many")))


@pytest.mark.slow
def test_every_compiler_is_scheduled_and_its_costs_are_recorded(saxpy: Pipeline) -> None:
    built(saxpy)
    again = Pipeline.load(saxpy.root, saxpy.settings).scheduler.estimates["saxpy"].measured()
    assert {Path(name).name for name in again} >= {"saxpy.cu.o", "scale.cu.o"}
    assert all(need.memory > 20_000_000 for need in again.values())
    assert not any(Path(saxpy.root / "build/work").rglob("history")), "it is no part of what is built"


@pytest.mark.parametrize("text", ["much", "6", "-1 GiB", "0 GB"])
def test_an_invalid_memory_limit_fails_with_a_sentence(saxpy: Pipeline, text: str) -> None:
    with pytest.raises(VoltforgeError, match="memory=") as caught:
        _ = Pipeline.load(saxpy.root, Settings(memory=text)).scheduler
    assert caught.value.what == f"memory={text}: not a size such as '20 MB' or '1.5 GiB'"
    assert caught.value.hint == "memory=6GiB, or omit it"


def test_a_memory_limit_reaches_the_scheduler(saxpy: Pipeline) -> None:
    assert Pipeline.load(saxpy.root, Settings(memory="6GiB", jobs="3")).scheduler.limit == 6 << 30
    assert Pipeline.load(saxpy.root, Settings(jobs="3")).scheduler.jobs == 3


@pytest.mark.slow
def test_only_declared_variables_reach_the_build(saxpy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-DSECRET_OF_THE_SHELL")
    monkeypatch.setenv("CMAKE_ARGS", "-DSECRET_OF_THE_SHELL=1")
    built(saxpy)
    tree, chosen = (package(saxpy).stages[kind].result() for kind in ("tree", "toolchain"))
    places = dict.fromkeys(build_variables.FOLDERS, Path("/place"))
    assert "SECRET" not in str(build_variables.variables(saxpy.recipes["saxpy"], tree, chosen, places))
    caches = list((saxpy.scratch / "work").rglob("CMakeCache.txt"))
    assert caches
    assert all("SECRET" not in cache.read_text() for cache in caches)


SCRIPT = """
import sys
from pathlib import Path
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
pipeline = Pipeline.load(Path(sys.argv[1]), Settings(jobs="2", sandbox=sys.argv[2]))
package = pipeline.package(pipeline.recipes["saxpy"])
for kind in ("fetch", "tree", "environment", "build"):
    package.stages[kind].run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "off"])
def test_ctrl_c_ends_every_compiler_and_the_next_run_resumes(saxpy: Pipeline, kind: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(saxpy.root), kind]
    child = psutil.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    compilers: list[psutil.Process] = []
    while not compilers and time.monotonic() < deadline:
        time.sleep(0.05)
        compilers = [process for process, name in family(child).items() if name in ("cicc", "cudafe++", "cc1plus")]
    assert compilers, "the build never came to compile"
    members = child.children(recursive=True)
    child.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(members, timeout=5)
    assert not alive
    child.wait(60)  # without a sandbox it brings the folders back
    assert not package(saxpy).build.path.exists()
    assert built(saxpy).is_file()


# --- the same bytes in every checkout and sandbox ---


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def hermetic(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> str:
    """The digest of the wheel that a build in bubblewrap gives."""
    if not available().hermetic:  # many containers forbid namespaces; CI installs bubblewrap and allows them
        pytest.skip("bubblewrap cannot make a namespace on this machine")
    return files.sha256(built(small_checkout(tmp_path_factory.mktemp("hermetic") / "checkout")))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["one", "another/deeper"])
def test_without_a_sandbox_the_bytes_are_the_same_in_any_checkout(
    tmp_path: Path, hermetic: str, folder: str, counted: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    """nvcc's module ids are equal too: --objdir-as-tempdir keeps its PID out of them."""
    pipeline = small_checkout(tmp_path / folder, Settings(sandbox="off"))
    if why := fixed_paths.obstacle(pipeline.scratch / "work", {}):  # only root can create /build, and CI runs as root
        pytest.skip(f"nothing can be moved to {fixed_paths.ROOT} here: {why}")
    assert files.sha256(built(pipeline)) == hermetic
    assert "this build is not isolated from the network" in said(capsys)
    assert not fixed_paths.ROOT.exists()
    counted("rebuilds with the same bytes")


@pytest.mark.slow
def test_a_build_without_sandbox_is_announced_and_marked_in_the_receipt(
    saxpy: Pipeline, hermetic: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box = Sandbox("no network")
    if subprocess.run(box.command(["true"], writable={}, readable={}, cwd=Path("/")), check=False).returncode:
        # Many containers forbid namespaces; CI's machine allows them.
        pytest.skip("unshare(1) cannot make namespaces on this machine")
    monkeypatch.setattr(sandbox, "available", lambda: box)
    built(saxpy)
    for kind in ("check", "wheels"):
        package(saxpy).stages[kind].run()
    results = files.read_json(saxpy.wheelhouse.receipt("saxpy", environment.python_tag()))["results"]
    assert (results["sandbox"], results["hermetic"], results["sha256"]) == ("no network", False, hermetic)
    told = said(capsys)
    assert 0 < told.index("sandbox: no network") < told.index("saxpy-1.0-cp310")


@pytest.mark.slow
def test_a_required_sandbox_that_is_missing_stops_the_build_before_it_starts(
    saxpy: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: Sandbox("no network"))
    with pytest.raises(VoltforgeError, match="sandbox=require: bubblewrap cannot create a namespace here"):
        built(Pipeline.load(saxpy.root, Settings(sandbox="require")))
    assert not (saxpy.scratch / "work").exists()


def test_a_toolkit_of_the_machine_is_not_linked_file_by_file(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """The toolkit can be all of /usr/local."""
    outside = replace(build, sandbox=Sandbox("none"), toolchain=replace(build.toolchain, origin="system"))
    assert outside.places == outside.folders
    assert "(the CUDA toolkit belongs to the machine)" in said(capsys)


# --- full and read-only disks ---

MOUNTED = 'mount -t tmpfs -o "$1" build "$2" && shift 2 && exec "$@"'
BUILD = """
import sys
from pathlib import Path
from voltforge.pipeline.checkout import Settings
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
pipeline = Pipeline.load(Path(sys.argv[1]), Settings(jobs="2"))
try:
    pipeline.package(pipeline.recipes["saxpy"]).stages["build"].run()
except VoltforgeError as error:
    print(type(error).__name__, error.what, "TRY", error.hint)
"""
ROOM = "make room on the disk"


@pytest.mark.slow
def test_a_full_or_read_only_disk_is_reported_with_a_remedy(saxpy: Pipeline) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "--"]
    if subprocess.run([*namespace, "true"], check=False).returncode:  # many containers forbid it; CI's machine does not
        pytest.skip("unshare(1) cannot make namespaces on this machine")
    for kind in KINDS[:-1]:
        package(saxpy).stages[kind].run()
    for folder, options, error, words, remedy in (
        ("work", "size=16k", "DiskError", "No space left on device", ROOM),  # the sources do not go in
        ("work", "size=400k", "BuildError", "No space left on device", ROOM),  # CMake's notes and the objects do not
        ("logs", "size=4k", "DiskError", "logs/saxpy.log: No space left on device", ROOM),
        ("work", "size=1m,ro", "DiskError", "Read-only file system", "a disk that is mounted read-only"),
    ):
        (saxpy.scratch / folder).mkdir(exist_ok=True)
        command = [*namespace, "sh", "-c", MOUNTED, "sh", options, saxpy.scratch / folder]
        command += [sys.executable, "-c", BUILD, saxpy.root]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
        )
        what, _, hint = done.stdout.partition(" TRY ")
        assert error in what.split(), done.stdout
        assert words in what
        assert remedy in hint
        assert done.stderr == ""


def test_a_folder_of_another_user_is_reported(build: Build) -> None:
    build.work.mkdir(parents=True)
    build.work.chmod(0o555)
    with ordinary_user(), pytest.raises(DiskError) as caught:
        build.compile(build.work.parent / "log")
    assert re.fullmatch(rf"vllm was not built: {build.work}.*: Permission denied", caught.value.what)
    assert caught.value.hint == "check who owns it; the next run resumes"


def test_an_interrupted_copy_is_reported() -> None:
    error = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    told = DiskError("saxpy", Path("log"), error)
    assert told.what == "saxpy was not built: log: [Errno 28] No space left on device: 'b'"
    assert ROOM in told.hint
