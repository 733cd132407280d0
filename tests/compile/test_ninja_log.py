"""ninja's log and dependency graph are read as ninja writes them."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.ninja_logs import HEADER, line, run_ninja, write_log
from voltforge.compile import ninja_log
from voltforge.compile.command_graph import graph_of
from voltforge.compile.ninja_log import CPP, CUDA, LINK, OTHER, Command, NinjaLogError, NinjaRun


def outputs(build: NinjaRun) -> list[str]:
    return [output for command in build.commands for output in command.outputs]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder that the real ninja built in."""
    folder = tmp_path_factory.mktemp("built")
    run_ninja(folder)
    return folder


# --- the log ---

names = st.text(st.characters(blacklist_characters="\t\n", blacklist_categories=["Cs"]), min_size=1, max_size=12)
times = st.tuples(st.integers(0, 10**7), st.integers(0, 10**6))


@st.composite
def runs_of_ninja(draw: st.DrawFn) -> list[list[Command]]:
    """Runs that share an output: without that, the log does not show where a run ends."""
    shared, runs = draw(names), []
    for _ in range(draw(st.integers(1, 4))):
        others = draw(st.lists(names.filter(lambda name: name != shared), unique=True, max_size=8))
        spans = sorted(draw(st.tuples(*[times] * (1 + len(others)))), key=sum)
        rows = enumerate(zip([shared, *others], spans, strict=True))
        runs.append([Command((name,), start, start + length, f"{n:x}") for n, (name, (start, length)) in rows])
    return runs


@given(runs=runs_of_ninja(), version=st.sampled_from(ninja_log.VERSIONS))
def test_log_is_read_run_by_run(tmp_path_factory, runs, version):
    folder = tmp_path_factory.getbasetemp()
    lines = [line(command.outputs[0], command.start, command.end, command.hash) for run in runs for command in run]
    assert ninja_log.read_log(write_log(folder, *lines, header=f"# ninja log v{version}\n")) == runs


@given(content=st.binary(max_size=80), valid_header=st.booleans())
def test_any_bytes_are_read_or_are_an_error_of_one_line(tmp_path_factory, content, valid_header):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes((HEADER.encode() if valid_header else b"") + content)
    message = ""
    try:
        assert ninja_log.last_run(path).commands
    except NinjaLogError as error:
        message = error.what
    assert message.startswith(f"{path}: " if message else "")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line"),
        ("# ninja log v4\n", "first line is '# ninja log v4'"),
        (HEADER, "no command has ended"),
        (HEADER + line("a.o", 0, 5) + "0\t5\ta.o\n", "line 3 is not a line of a ninja log: '0"),
        (HEADER + line("a.o", 6, 5), "line 2"),
        (HEADER + line("a.o", 0, 5).replace("\t5\t", "\tfive\t"), "line 2"),
    ],
)
def test_invalid_log_is_an_error(tmp_path, content, message):
    path = tmp_path / ".ninja_log"
    path.write_text(content)
    with pytest.raises(NinjaLogError, match=message):
        ninja_log.last_run(path)


def test_incomplete_last_line_is_ignored(tmp_path):
    assert outputs(ninja_log.last_run(write_log(tmp_path, line("a.o", 0, 5), line("b.o", 1, 7)[:9]))) == ["a.o"]


def test_last_run_is_the_last_complete_run(tmp_path):
    lines = [line("a.o", 0, 50), line("t.so", 50, 60), line("a.o", 0, 40), line("t.so", 40, 55), line("a.o", 1, 2)]
    build = ninja_log.last_run(write_log(tmp_path, *lines))
    assert [(command.name, command.end) for command in build.commands] == [("a", 40), ("t.so", 55)]
    assert build.missing == 0


def test_without_a_complete_run_the_largest_is_taken_and_missing_outputs_are_counted(tmp_path):
    lines = [line("a.o", 0, 50), line("b.o", 0, 60), line("c.o", 0, 40)]
    build = ninja_log.last_run(write_log(tmp_path, *lines))
    assert (outputs(build), build.missing) == (["a.o", "b.o"], 1)


@pytest.mark.parametrize(
    ("output", "name", "label", "kind"),
    [
        ("CMakeFiles/_C.dir/csrc/sampler.cu.o", "csrc/sampler.cu", "sampler", CUDA),
        ("c10/CMakeFiles/c10.dir/core/Device.cpp.o", "core/Device.cpp", "Device", CPP),
        ("lib/libc10.so", "lib/libc10.so", "libc10.so", LINK),
        ("lib/libz.so.1.2", "lib/libz.so.1.2", "libz.so.1.2", LINK),
        ("bin/protoc", "bin/protoc", "protoc", LINK),
        ("aten/Functions.h", "aten/Functions.h", "Functions", OTHER),
        ("CMakeFiles/install.util", "CMakeFiles/install.util", "install", OTHER),
    ],
)
def test_name_label_and_kind_come_from_the_output(output, name, label, kind):
    command = Command((output,), 0, 1, "0")
    assert (command.name, command.label, command.kind) == (name, label, kind)


def test_newest_log_of_each_package_is_found(tmp_path):
    logs = {}
    for work in ("a-b-0f", "a-b-0e", "c-1f"):
        folder = tmp_path / "work" / work / "tree" / "build" / "temp"
        folder.mkdir(parents=True)
        logs[work] = write_log(folder, line("a.o", 0, 5))
    for newer, older in (("a-b-0f", "a-b-0e"), ("a-b-0e", "a-b-0f")):
        os.utime(logs[older], (1, 1))
        os.utime(logs[newer], (2, 2))
        assert ninja_log.newest_logs(tmp_path / "work") == {"a-b": logs[newer], "c": logs["c-1f"]}


# --- the dependency graph of the real ninja ---


def test_dependencies_come_from_ninja_without_phony_targets(built):
    build = ninja_log.last_run(built / ".ninja_log")
    graph = graph_of(build, built)
    labels = [command.label for command in build.commands]
    found = dict(zip(labels, [{labels[number] for number in before} for before in graph.dependencies], strict=True))
    assert found == {"one": set(), "alone": set(), "long": {"one"}, "short": {"one"}, "libt.so": {"long", "short"}}
    assert [command.outputs for command in build.commands if command.label == "one"] == [("one.h", "two.h")]
    assert [labels[number] for number in graph.critical_path] == ["one", "long", "libt.so"]
    assert build.wall >= graph.makespan(64) >= 350


def test_missing_ninja_files_give_no_dependencies_and_a_warning(tmp_path, capsys):
    assert ninja_log.dependencies(tmp_path, [Command(("a.o",), 0, 1, "0")]) == [frozenset()]
    assert "no dependency graph: `ninja -t graph` failed" in capsys.readouterr().out


# --- lanes and queue time ---


@given(runs=runs_of_ninja())
def test_commands_in_one_lane_do_not_overlap(runs):
    commands = sorted(runs[0], key=lambda command: (command.start, command.end))
    build = NinjaRun(tuple(commands), 0)
    for lane in range(build.width):
        row = [command for command, number in zip(commands, build.lanes, strict=True) if number == lane]
        assert all(before.end <= after.start for before, after in pairwise(row))
    assume(all(command.duration for command in commands))
    assert build.width == max(sum(other.start <= at.start < other.end for other in commands) for at in commands)


def test_queue_time_is_subtracted():
    commands = Command(("a.o",), 0, 9000, "1"), Command(("b.o",), 0, 5000, "2"), Command(("lib.so",), 9000, 9500, "3")
    build = NinjaRun(commands, 0).without_queue_time({"a.o": 4.0, "b.o": 5.5})
    assert [(command.outputs[0], command.start, command.end) for command in build.commands] == [
        ("b.o", 0, 5000),  # the measured time is longer than in the log
        ("a.o", 5000, 9000),
        ("lib.so", 9000, 9500),
    ]
    assert build.work == 9500
    assert build.width == 1


def test_command_granted_at_the_end_of_another_starts_when_ninja_records_that_end():
    commands = Command(("a.o",), 0, 5000, "1"), Command(("b.o",), 0, 9000, "2"), Command(("c.o",), 0, 9500, "3")
    build = NinjaRun(commands, 0).without_queue_time({"b.o": 4.004, "c.o": 4.6})
    starts = [(command.outputs[0], command.start) for command in build.commands]
    assert starts == [("a.o", 0), ("c.o", 4900), ("b.o", 5000)]
    assert build.width == 2
