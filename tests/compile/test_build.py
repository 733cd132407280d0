"""A build sees declared inputs only, shows progress and its first error, and resumes."""

from __future__ import annotations

import contextlib
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
from tests.support.rights import ordinary_user
from tests.support.tally import Tally
from voltforge.compile import build_variables, fixed_paths, sandbox, work_folder
from voltforge.compile.build import Build, BuildError, DiskError
from voltforge.compile.build_log import BuildProgress, first_error
from voltforge.compile.costs import Estimates
from voltforge.compile.jobs import Memory
from voltforge.compile.sandbox import Sandbox, available
from voltforge.compile.scheduler import Scheduler, Status
from voltforge.compile.toolchain import HostCompiler, Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.package import Package
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.sources.tree import Tree
from voltforge.system import files
from voltforge.system.process import Usage
from voltforge.system.progress import ProgressState
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


def test_progress_shows_step_object_and_memory() -> None:
    progress = BuildProgress("saxpy")
    assert progress.see("-- Detecting CXX", Usage()) == ProgressState("configuring", memory=0)
    line = "[3/41] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o"
    assert progress.see(line, Usage(now=1_500_000_000)) == ProgressState(
        "cache_kernels.cu.o", 3, 41, memory=1_500_000_000
    )
    assert progress.see("", Usage(now=1)) == ProgressState("cache_kernels.cu.o", 3, 41, memory=1)


def test_progress_of_scheduled_builds_shows_jobs_memory_and_remaining_time(tmp_path: Path) -> None:
    (tmp_path / "saxpy.json").write_text('{"a.cu.o": [10, 500000000, 1], "b.cu.o": [30, 500000000, 1]}')
    scheduler = Scheduler(
        tmp_path / "gate", 2, {"saxpy": Estimates(tmp_path / "saxpy.json", 1)}, lambda: Memory(1, 12_000_000_000)
    )
    progress = BuildProgress("saxpy", scheduler)
    line = "[2/8] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o"
    scheduler.status = Status(running=1, waiting=2, remote=1)  # a place is free: the two wait for memory
    beyond, mean = 8 - 2 - 1 - 2 - 1, 20
    assert progress.see(line, Usage(now=5)) == ProgressState(
        "cache_kernels.cu.o", 2, 8, jobs=1, waiting=2, elsewhere=1, memory=5, limit=12_000_000_000,
        left=beyond * mean / 2,
    )  # fmt: skip
    scheduler.status = Status(running=2, waiting=2)  # no place is free
    assert (progress.see("", Usage()).jobs, progress.see("", Usage()).waiting) == (2, 0)
    scheduler.memory = lambda: None
    assert progress.see("", Usage()).limit is None


def test_progress_shows_cache_hits(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path / "gate", 2, {"saxpy": Estimates(tmp_path / "saxpy.json", 1)})
    progress = BuildProgress("saxpy", scheduler, tmp_path / "log")
    assert progress.see("", Usage()).hits is None
    (tmp_path / "log").write_text("# a.cu\ndirect_cache_hit\n# b.cu\ncache_miss\n")
    assert progress.see("[1/2] Building CUDA object a.cu.o", Usage()).hits is None  # it is looked for twice a second
    seen = progress.see("", Usage())
    assert (seen.hits, seen.misses) == (1, 1)


def test_only_the_first_error_of_a_long_log_is_printed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = ["[1/2] Building CUDA object a.cu.o", "a.h(3): warning #177-D: declared but never referenced"]
    lines += ["FAILED: a.cu.o", "nvcc -c a.cu", 'a.cu(7): error: identifier "foo" is undefined', "  foo();"]
    lines += ["b.cu(9): error: a later one"] + [f"noise {number}" for number in range(10_000)] + ["Error: exit 1"]
    log.write_text("\n".join(lines))
    shown = first_error(log).splitlines()
    assert shown[:2] == ["FAILED: a.cu.o", 'a.cu(7): error: identifier "foo" is undefined']
    assert len(shown) < 20


def test_the_last_lines_are_printed_if_no_line_looks_like_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(100)))
    assert first_error(tmp_path / "log").endswith("line 99")
    assert first_error(tmp_path / "absent") == "(there is no log)"


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
        compilers = [one for one in child.children(recursive=True) if one.name() in ("cicc", "cudafe++", "cc1plus")]
    assert compilers, "the build never came to compile"
    family = child.children(recursive=True)
    child.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    child.wait(60)  # without a sandbox it brings the folders back
    assert not package(saxpy).build.path.exists()
    assert built(saxpy).is_file()


# --- the same bytes wherever, and whatever keeps the build in ---


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def hermetic(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> str:
    """The digest of the wheel that a build in bubblewrap gives."""
    if not available().hermetic:  # the README promises builds there too; CI has bubblewrap
        pytest.skip("bubblewrap cannot make a namespace on this machine")
    return files.sha256(built(small_checkout(tmp_path_factory.mktemp("hermetic") / "checkout")))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["one", "another/deeper"])
def test_without_a_sandbox_the_bytes_are_the_same_in_any_checkout(
    tmp_path: Path, hermetic: str, folder: str, counted: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    """nvcc's module ids are equal too: --objdir-as-tempdir keeps its PID out of them."""
    pipeline = small_checkout(tmp_path / folder, Settings(sandbox="off"))
    if why := fixed_paths.obstacle(pipeline.scratch / "work", {}):  # an ordinary user cannot make /build; CI is root
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
        # Many containers forbid it; CI's machine does not.
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


# --- a work folder that cannot be trusted ---


@pytest.fixture
def build(tmp_path: Path, repository: Path) -> Build:
    """A build of one source without compilers."""
    tree, home = tmp_path / "source", tmp_path / "toolkit"
    for folder in (tree, home):
        folder.mkdir()
    (tree / "a.c").write_text("int a;")
    gcc = HostCompiler(Path("/usr/bin/g++"), Path("/usr/bin/gcc"), "12.2.0")
    toolkit = Toolchain(home, "distro", "12.4.131", gcc, {})
    recipe = Pipeline.load(repository, Settings()).recipes["vllm"]
    work = tmp_path / "build" / "work"
    return Build(recipe, Tree(tree, 0), Environment(home), toolkit, Sandbox("bubblewrap"), 1, work)


def prepared(build: Build) -> list[str]:
    """Prepare the build and return the files of its tree."""
    build.prepare()
    return sorted(path.name for path in build.folders["tree"].iterdir())


def test_compiled_objects_survive_a_failed_build(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(build)
    (build.folders["tree"] / "a.o").write_text("object")
    assert prepared(build) == ["a.c", "a.o"]
    assert said(capsys) == ""


@pytest.mark.parametrize("late", ["a.o", "deeper/below/a.o"])
def test_objects_are_discarded_after_the_clock_was_set_back(
    build: Build, late: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(build)
    ahead = build.folders["tree"] / late
    ahead.parent.mkdir(parents=True, exist_ok=True)
    ahead.write_text("object")
    os.utime(ahead, (time.time() + 3600,) * 2)
    assert prepared(build) == ["a.c"]
    assert f"starting from scratch: tree/{late} is newer than the clock: the clock was set back" in said(capsys)


def begun(build: Build) -> None:
    """A build that wrote an object and was killed."""
    prepared(build)
    files.write_json(build.work / work_folder.UNSYNCED, work_folder.boot_id())
    (build.folders["tree"] / "a.o").write_text("object")


def test_objects_are_discarded_after_the_machine_went_down_in_a_build(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ninja recorded an object as done whose last bytes never reached the disk."""
    begun(build)
    monkeypatch.setattr(work_folder, "BOOT", tmp_path / "boot")
    (tmp_path / "boot").write_text("another boot\n")
    assert prepared(build) == ["a.c"]
    assert "starting from scratch: the machine went down during the last build" in said(capsys)


def test_a_killed_build_resumes(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    begun(build)
    assert prepared(build) == ["a.c", "a.o"]
    assert said(capsys) == ""


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_files_of_a_finished_build_are_synced_to_disk(
    build: Build, end: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared(build)
    synced = []
    monkeypatch.setattr(os, "sync", lambda: synced.append((build.work / work_folder.UNSYNCED).exists()))
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), work_folder.synced(build.work):
        (build.folders["tree"] / "a.o").write_text("object")
        if end:
            raise end
    assert synced == [True], "the note goes when all is on the disk, and not before"
    monkeypatch.setattr(work_folder, "BOOT", tmp_path / "missing")
    assert prepared(build) == ["a.c", "a.o"]


def test_objects_of_a_build_with_another_launcher_are_discarded(
    build: Build, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Some build systems configure once; their compilers would all start at once."""
    prepared(build)
    asking = replace(build, scheduler=Scheduler(tmp_path / "gate", 1, {}))
    (build.folders["tree"] / "a.o").write_text("object")
    assert "a.o" not in prepared(asking)
    assert "starting from scratch: the launcher of the compilers changed" in capsys.readouterr().out
    (asking.folders["tree"] / "a.o").write_text("object")
    assert "a.o" in prepared(asking)


def test_coarse_clocks_and_dangling_links_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    os.utime(tmp_path / "now", (time.time() + 1,) * 2)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "up").symlink_to(tmp_path)
    assert work_folder.from_the_future(tmp_path) is None
    os.utime(tmp_path / "now", (time.time() + 60,) * 2)
    assert work_folder.from_the_future(tmp_path) == tmp_path / "now"
    assert work_folder.from_the_future(tmp_path / "work") is None


def test_objects_of_a_tree_at_another_path_are_discarded(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CMake refuses another folder: its cache names the old one."""
    prepared(build)
    (build.folders["tree"] / "a.o").write_text("object")
    monkeypatch.setattr(fixed_paths, "obstacle", lambda *_: "as in this test")
    outside = replace(build, sandbox=Sandbox("none"))
    assert prepared(outside) == ["a.c"]
    told = said(capsys)
    assert f"building in {outside.folders['tree']}, not /build/tree (as in this test): the bytes can differ" in told
    assert "starting from scratch: the last build ran in /build/tree" in told


def test_a_toolkit_of_the_machine_is_not_linked_file_by_file(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """The toolkit can be all of /usr/local."""
    outside = replace(build, sandbox=Sandbox("none"), toolchain=replace(build.toolchain, origin="system"))
    assert outside.places == outside.folders
    assert "(the CUDA toolkit belongs to the machine)" in said(capsys)


# --- what a disk refuses ---

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
    if subprocess.run([*namespace, "true"], check=False).returncode:  # as in many containers, but not in CI
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
