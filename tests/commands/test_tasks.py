"""`./doit` as a person types it, in a copy of this checkout with one small recipe: what it prints and how it exits."""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from doit.task import Task

from tests.support import samples
from tests.support.checkouts import ROOT, pack
from tests.support.command_checkout import CommandCheckout
from tests.support.servers import Fault, Server, serving
from tests.support.terminal import seen
from voltforge.commands import tasks
from voltforge.commands.reporter import ANNOUNCED, Reporter
from voltforge.commands.reproduce import NotReproducible
from voltforge.sources.recipe import load
from voltforge.system import files

RED = "\x1b[1;31m"
FAILED, MISUSED, INTERRUPTED = 1, 3, 130


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture
def checkout(bare, server, tmp_path) -> CommandCheckout:
    """One that has its environment, and a recipe whose sdist a server on loopback has."""
    bare.settle()
    source = samples.tree(tmp_path / "thing", {"setup.py": "", "thing.py": "1\n"})
    sdist = pack(source, tmp_path / "thing-1.0.tar.gz").read_bytes()
    server.files["/thing-1.0.tar.gz"] = sdist
    bare.recipe(f"{server.url}/thing-1.0.tar.gz", files.sha256_bytes(sdist))
    return bare


def problem(done: subprocess.CompletedProcess[str]) -> str:
    """The one red message of a run that failed."""
    assert done.returncode == FAILED
    assert "Traceback" not in done.stdout + done.stderr
    [_, after] = done.stdout.split(f"{RED}x ")
    return re.sub(r"\x1b\[[\d;]*m", "", after)


# --- doing ---


def test_stages_run_once_and_in_order(checkout, server):
    del checkout.env["FORCE_COLOR"]
    first = checkout.doit("tree:thing")
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.findall(r"^\* (\w+)", first.stdout, re.MULTILINE) == ["fetch", "unpack"]
    assert (checkout.root / "build" / "trees" / "thing" / "thing.py").read_text() == "1\n"
    second = checkout.doit("tree:thing")
    assert (second.returncode, second.stdout) == (0, "")
    assert server.paths() == ["/thing-1.0.tar.gz"]


def test_a_new_patch_rebuilds_the_tree_without_a_download(checkout, server):
    checkout.doit("tree:thing")
    folder = checkout.root / "patches" / "thing"
    folder.mkdir(parents=True)
    (folder / "0001-two.patch").write_text("Subject: two\n---\n--- a/thing.py\n+++ b/thing.py\n@@ -1 +1 @@\n-1\n+2\n")
    assert checkout.doit("tree:thing").returncode == 0
    assert (checkout.root / "build" / "trees" / "thing" / "thing.py").read_text() == "2\n"
    assert len(server.asked) == 1


def test_list_is_a_table_of_contents_in_the_order_of_the_graph(checkout):
    done = checkout.doit("list")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    names = [name for name in names if ":" not in name]  # image:base and its like stand below image
    functions = re.findall(r"^def task_(\w+)", (checkout.root / "dodo.py").read_text(), re.MULTILINE)
    assert names == [function.replace("_", "-") for function in functions]
    assert all(len(line.split()) > 2 for line in done.stdout.splitlines())


def test_a_fresh_clone_needs_no_folder_made_by_hand(checkout):
    """doit keeps its notes in build/, which git does not know."""
    assert not (checkout.root / "build").exists()
    done = checkout.doit("fetch:thing")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_arguments_the_tasks_are_listed(checkout):
    done = checkout.doit()
    assert done.returncode == 0, done.stderr
    assert "wheels" in done.stdout


# --- what a person gets wrong ---


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == MISUSED
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_unknown_variable_is_refused_with_the_nearest_and_all_variables(checkout):
    said = complaint(checkout.doit("jbos=3", "tree:thing"))
    assert "jbos= is not a variable; did you mean jobs=?" in said
    assert "try: one of cuda=, jobs=, memory=, ccache=, sandbox=, file=" in said
    assert not (checkout.root / "build" / "trees").exists()


@pytest.mark.parametrize(("word", "nearest"), [("weels", "wheels"), ("wheel:thing", "wheels:thing")])
def test_unknown_task_is_refused_with_the_nearest_names(checkout, word, nearest):
    said = complaint(checkout.doit(word))
    assert said.startswith(f"x {word} is not a task; did you mean {nearest}")
    assert said.endswith("\n  try: ./doit help lists the tasks\n")
    assert "Type" not in said


def test_unknown_task_unlike_any_other_is_refused_without_a_suggestion(checkout):
    assert complaint(checkout.doit("qqq")).startswith("x qqq is not a task\n  try: ")


@pytest.mark.parametrize("words", [("--foo",), ("tree:thing", "--foo")])
def test_unknown_option_is_refused(checkout, words):
    assert complaint(checkout.doit(*words)) == "x unknown option or missing value: --foo\n  try: ./doit help\n"


def test_python_m_doit_still_runs_the_tasks(checkout):
    done = checkout.doit("-m", "doit", "fetch:thing", script=".venv/bin/python")
    assert done.returncode == 0, done.stderr
    assert "fetch thing-1.0.tar.gz" in done.stdout


def test_a_broken_recipe_is_one_message_with_all_its_problems(checkout):
    path = checkout.recipe("ftp://example.org", "short")
    said = complaint(checkout.doit("list"))
    assert said.startswith(f"x {path} cannot be used:\n  - source.sha256: ")
    assert "\n  - source.url: " in said
    assert said.endswith("docs/recipes.md describes all keys\n")


# --- what goes wrong ---


def test_a_stage_that_fails_is_one_red_line_and_a_hint(checkout, server):
    del server.files["/thing-1.0.tar.gz"]
    said = problem(checkout.doit("tree:thing"))
    assert "answered 404" in said
    assert said.splitlines()[-1].startswith("  try: ")


def test_a_failed_stage_runs_again(checkout, server):
    sdist = server.files.pop("/thing-1.0.tar.gz")
    assert checkout.doit("tree:thing").returncode == FAILED
    server.files["/thing-1.0.tar.gz"] = sdist
    assert checkout.doit("tree:thing").returncode == 0


def test_a_patch_that_does_not_apply_names_file_and_hunk(checkout):
    folder = checkout.root / "patches" / "thing"
    folder.mkdir(parents=True)
    (folder / "0001-two.patch").write_text("Subject: two\n---\n--- a/thing.py\n+++ b/thing.py\n@@ -1 +1 @@\n-7\n+2\n")
    said = problem(checkout.doit("tree:thing"))
    assert said.startswith("thing/0001-two.patch does not apply:\n  - thing.py: Hunk #1 FAILED at 1.\n")


def test_an_error_of_the_machine_is_one_sentence(checkout):
    """The full disk is a fake: it would take a file system of its own."""
    (checkout.root / "sitecustomize.py").write_text(
        "import errno, os, tempfile\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/the/disk')\n"
        "tempfile.mkdtemp = full\n"
    )
    checkout.env["PYTHONPATH"] = str(checkout.root)
    said = problem(checkout.doit("tree:thing"))
    assert said.startswith("/the/disk: No space left on device\n  try: ")


def test_an_error_with_its_own_exit_status_ends_the_program_with_it(checkout):
    """./doit reproduce:thing does this if the bytes differ."""
    graph = checkout.root / "dodo.py"
    graph.write_text(
        f"{graph.read_text()}\n\nfrom voltforge.errors import VoltforgeError\n\n\n"
        "class OtherBytesError(VoltforgeError):\n    exit_status = 4\n\n\n"
        "def differs():\n    raise OtherBytesError('the second build is another')\n\n\n"
        "def task_differs():\n    return tasks.action(differs)\n"
    )
    done = checkout.doit("differs")
    assert done.returncode == NotReproducible.exit_status == 4
    assert "the second build is another" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_exits_130_and_the_next_resumes(checkout, server, number):
    server.faults["/thing-1.0.tar.gz"] = [Fault(cut=100, stall=True)]
    child = subprocess.Popen(
        ["./doit", "tree:thing"], cwd=checkout.root, env=checkout.env, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not server.sent and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, number)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == INTERRUPTED
    assert "interrupted: finished stages are kept" in output
    assert "Traceback" not in output
    assert checkout.doit("tree:thing").returncode == 0


# --- what several packages need ---


@pytest.fixture
def two(checkout, server, tmp_path) -> CommandCheckout:
    """A checkout with another recipe beside the thing's."""
    sdist = pack(samples.tree(tmp_path / "other", {"other.py": "2\n"}), tmp_path / "other-1.0.tar.gz").read_bytes()
    server.files["/other-1.0.tar.gz"] = sdist
    path = checkout.recipe(f"{server.url}/other-1.0.tar.gz", files.sha256_bytes(sdist), "other")
    path.write_text(path.read_text().replace('name = "thing"', 'name = "other"').replace('"thing-1', '"other-1'))
    del checkout.env["FORCE_COLOR"]
    return checkout


def test_sources_of_all_packages_are_downloaded_together(two, server):
    hold, together = threading.Event(), []
    server.faults = {f"/{name}-1.0.tar.gz": [Fault(hold=hold)] for name in ("thing", "other")}

    def watch() -> None:
        deadline = time.monotonic() + 25
        while len(server.asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        together.extend(server.paths())
        hold.set()

    watching = threading.Thread(target=watch)
    watching.start()
    done = two.doit("tree")
    watching.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(together) == ["/other-1.0.tar.gz", "/thing-1.0.tar.gz"]
    assert len(server.asked) == 2
    assert sorted(re.findall(r"^\* (\w+ [\w.-]+)", done.stdout, re.MULTILINE)) == [
        "fetch other-1.0.tar.gz", "fetch thing-1.0.tar.gz", "unpack other-1.0.tar.gz", "unpack thing-1.0.tar.gz",
    ]  # fmt: skip


def test_a_run_fetches_no_source_that_it_does_not_need(two, server):
    assert two.doit("tree:thing").returncode == 0
    assert server.paths() == ["/thing-1.0.tar.gz"]


def test_missing_source_is_reported_early_and_stops_only_its_own_package(two, server):
    del server.files["/thing-1.0.tar.gz"]
    done = two.doit("downloads", "tree:other", "tree:thing")
    assert done.returncode == FAILED
    assert "! not downloaded yet: thing-1.0.tar.gz\n" in done.stdout
    before, after = done.stdout.split("* unpack other-1.0.tar.gz")
    assert "not downloaded yet" in before
    assert "x 1 file could not be downloaded:" in after


# --- the variants of a package ---


def test_variant_sentence_names_what_is_made_and_how_to_get_the_other():
    source, thin = (load(ROOT / "recipes" / name) for name in ("torch.toml", "torch-thin.toml"))
    assert tasks.variant_sentence(thin) == (f"{thin.summary}; to compile it from source: ./doit torch=source wheels")
    assert tasks.variant_sentence(source) == f"{source.summary}; to make the thin variant: ./doit torch=thin wheels"


@pytest.fixture
def announcing() -> tuple[Reporter, dict[str, Task]]:
    """A reporter, and tasks of which two make wheels and one of these has variants."""
    tasks = {
        "wheels:torch": Task("wheels:torch", ["true"], meta={ANNOUNCED: lambda: "torch is thinned"}),
        "wheels:vllm": Task("wheels:vllm", ["true"]),
        "wheels": Task("wheels", [], task_dep=["wheels:torch", "wheels:vllm"]),
        "image": Task("image", ["true"], task_dep=["wheels"]),
    }
    return Reporter(sys.stdout, {}), tasks


@pytest.mark.parametrize(("selected", "count"), [("image", 1), ("wheels", 1), ("wheels:torch", 1), ("wheels:vllm", 0)])
def test_variant_is_announced_once_by_a_run_that_makes_the_package(announcing, capsys, selected, count):
    reporter, made = announcing
    reporter.initialize(made, [selected])
    assert capsys.readouterr().out == "", "a run that finds everything current announces nothing"
    for _ in range(2):
        reporter.execute_task(made["wheels:vllm"])
    assert capsys.readouterr().out.count("torch is thinned") == count


def test_image_makes_the_wheels_first_and_image_of_wheelhouse_does_not(checkout):
    done = checkout.doit("info", "--no-status", "image")
    assert re.search(r"^ - wheels$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    done = checkout.doit("info", "--no-status", "image:of-wheelhouse")
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^ - wheels$", done.stdout, re.MULTILINE)


# --- what a person sees of it ---


def test_durations_are_stored_and_a_damaged_file_is_ignored(checkout):
    graph = checkout.root / "dodo.py"
    graph.write_text(f"{graph.read_text()}\n\nfrom voltforge.pipeline import durations\n\ndurations.SHORTEST = 0.0\n")
    kept = checkout.root / "build" / "stages" / "history.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("[")
    assert checkout.doit("tree:thing").returncode == 0
    assert set(files.read_json(kept)) == {"fetch:thing", "tree:thing"}


def test_a_download_has_a_row_on_a_terminal_that_ctrl_c_removes(checkout, server):
    server.faults["/thing-1.0.tar.gz"] = [Fault(cut=100, stall=True)] * 20  # each time that it is tried again
    interrupted, row, last = False, re.compile(r"thing-1\.0\.tar\.gz +\d"), None
    for last in seen(["./doit", "tree:thing"], 80, checkout.root, checkout.env, INTERRUPTED):
        if not interrupted and any(map(row.match, last.rows)):
            assert last.screen.cursor.hidden
            last.child.send_signal(signal.SIGINT)
            interrupted = True
    assert interrupted
    assert last.transcript[0] == "* fetch thing-1.0.tar.gz"
    assert last.transcript[-1].startswith("! interrupted: finished stages are kept")
    assert not any(map(row.match, last.transcript))
    assert not last.screen.cursor.hidden


def test_the_run_log_holds_all_output_and_the_failure(checkout):
    log = checkout.root / "build" / "logs" / "run.log"
    assert checkout.doit("tree:thing", "jobs=1").returncode == 0
    lines = log.read_text().splitlines()
    assert [line[9:] for line in lines if line[9] in "$*"] == [
        "$ doit tree:thing jobs=1", "* fetch thing-1.0.tar.gz", "* unpack thing-1.0.tar.gz and apply 0 patches",
    ]  # fmt: skip
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert checkout.doit("tree:thing").returncode == 0
    assert log.read_text().splitlines() == lines, "a run that has nothing to do says nothing"
    folder = checkout.root / "patches" / "thing"
    folder.mkdir(parents=True)
    (folder / "0001-two.patch").write_text("Subject: two\n---\n--- a/thing.py\n+++ b/thing.py\n@@ -1 +1 @@\n-7\n+2\n")
    for _ in seen(["./doit", "tree:thing"], 20, checkout.root, checkout.env, FAILED):
        pass
    text = log.read_text()
    assert "* fetch" not in text
    assert " x thing/0001-two.patch does not apply:\n" in text
    assert "Hunk #1 FAILED at 1." in text


COLOURS = re.compile(r"\x1b\[(?:\d+;)*[349]\d(?:;\d+)*m")


@pytest.mark.parametrize("words", [("--no-color", "tree:thing"), ("tree:thing", "--no-color")])
def test_no_color_works_anywhere_on_the_command_line(checkout, words):
    done = checkout.doit(*words)
    assert done.returncode == 0, done.stderr
    assert "fetch thing-1.0.tar.gz" in done.stdout
    assert not COLOURS.search(done.stdout)
    shutil.rmtree(checkout.root / "build")
    assert COLOURS.search(checkout.doit("tree:thing").stdout)
    assert "--no-color" in checkout.doit().stdout


def test_lines_have_times_in_ci_except_in_lists(checkout):
    del checkout.env["FORCE_COLOR"]
    checkout.env["CI"] = "true"
    lines = checkout.doit("tree:thing").stdout.splitlines()
    assert len(lines) >= 2
    assert all(re.match(r"\d\d:\d\d:\d\d [*! x] ?", line) for line in lines)
    assert not re.search(r"\d\d:\d\d:\d\d", checkout.doit("list").stdout)


@pytest.mark.parametrize("setting", ["ccache=ftp://host", "memory=lots", "jobs=many"])
def test_an_invalid_setting_is_refused_before_any_download(checkout, server, setting):
    done = checkout.doit("tree:thing", setting)
    assert done.returncode == MISUSED
    assert setting in done.stderr
    assert "Traceback" not in done.stderr
    assert server.asked == []


# --- the graph ---


def test_offline_every_missing_file_is_listed_in_one_run(checkout, server):
    checkout.env |= {"VOLTFORGE_OFFLINE": "1", "CUDA_HOME": "", "PATH": "/usr/bin:/bin"}
    del checkout.env["FORCE_COLOR"]
    (checkout.root / "recipes" / "locks" / "thing.txt").write_text(f"nobody-has-this==1 --hash=sha256:{'0' * 64}\n")
    done = checkout.doit("wheels:thing")
    assert done.returncode != 0
    for absent in ("thing-1.0.tar.gz", "nobody-has-this==1", "nvidia-cuda-toolkit_12.4.131"):
        assert absent in done.stdout
    assert done.stdout.count("\nx ") == 3, "what could not run because of these is not another problem"
    assert server.asked == []


def test_loading_the_graph_imports_no_optional_library():
    look = (
        "import sys\n"
        "import dodo\n"
        "slow = {'pypi_simple', 'bs4', 'auditwheel', 'elftools', 'redis', 'cyclonedx', 'cryptography', 'matplotlib'}\n"
        "print(sorted(slow & {name.split('.')[0] for name in sys.modules}))"
    )
    printed = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout == "[]\n"


def test_every_command_of_the_graph_exists():
    names = re.findall(r'tasks\.(?:action|locked)\("([\w.]+:\w+)"', (ROOT / "dodo.py").read_text())
    assert len(names) > 15
    assert all(callable(pkgutil.resolve_name(f"voltforge.{name}")) for name in names)


def test_loading_the_graph_imports_no_command_that_does_not_run():
    look = "import sys, dodo; print(*(name for name in sys.modules if name.startswith('voltforge.commands.')))"
    loaded = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    idle = {"doctor", "farm", "gc", "reproduce", "server_benchmark", "thin", "verify", "why"}
    assert not {name.rpartition(".")[2] for name in loaded.split()} & idle
