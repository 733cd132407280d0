"""Where a build's time went: ninja's log is read, the critical path found, more cores computed, a chart drawn."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tests.commands.test_tasks import Checkout, problem
from voltforge.compile import profile
from voltforge.compile.profile import Build, Job, LogError, Plan
from voltforge.errors import VoltforgeError
from voltforge.system.programs import tool

HEADER = "# ninja log v7\n"
NINJA = """\
rule sleep
  command = sleep $seconds && cat $in /dev/null > $out
rule two
  command = touch one.h two.h
build one.h two.h: two
build headers: phony one.h two.h
build CMakeFiles/t.dir/src/long.cu.o: sleep long.cu || headers
  seconds = 0.3
build CMakeFiles/t.dir/src/short.cpp.o: sleep short.cpp || headers
  seconds = 0.01
build libt.so: sleep CMakeFiles/t.dir/src/long.cu.o | CMakeFiles/t.dir/src/short.cpp.o
  seconds = 0.05
build alone.cpp.o: sleep short.cpp
  seconds = 0.01
build all: phony libt.so alone.cpp.o
default all
"""


def line(output: str, start: int, end: int, command: str = "") -> str:
    return f"{start}\t{end}\t1795693666233793947\t{output}\t{command or f'{crc32(output.encode()):x}'}\n"


def log(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / ".ninja_log"
    path.write_text(header + "".join(lines))
    return path


def outputs(build: Build) -> list[str]:
    return [output for job in build.jobs for output in job.outputs]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder that the real ninja built in, on two jobs."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "build.ninja").write_text(NINJA)
    for source in ("long.cu", "short.cpp"):
        (folder / source).touch()
    subprocess.run([tool("ninja", ""), "-C", folder, "-j2"], check=True, capture_output=True)
    return folder


# --- the log ---

names = st.text(st.characters(blacklist_characters="\t\n", blacklist_categories=["Cs"]), min_size=1, max_size=12)
times = st.tuples(st.integers(0, 10**7), st.integers(0, 10**6))


@st.composite
def runs_of_ninja(draw: st.DrawFn) -> list[list[Job]]:
    """Each makes the same thing again, among others: else nobody could tell where one ends."""
    same, runs = draw(names), []
    for _ in range(draw(st.integers(1, 4))):
        others = draw(st.lists(names.filter(lambda name: name != same), unique=True, max_size=8))
        took = sorted(draw(st.tuples(*[times] * (1 + len(others)))), key=sum)
        made = zip([same, *others], took, strict=True)
        runs.append([Job((name,), start, start + long, f"{n:x}") for n, (name, (start, long)) in enumerate(made)])
    return runs


@given(runs=runs_of_ninja(), version=st.sampled_from(profile.VERSIONS))
def test_what_ninja_wrote_is_read_run_by_run(tmp_path_factory, runs, version):
    folder = tmp_path_factory.getbasetemp()
    lines = [line(job.outputs[0], job.start, job.end, job.command) for jobs in runs for job in jobs]
    assert profile.read(log(folder, *lines, header=f"# ninja log v{version}\n")) == runs


@given(content=st.binary(max_size=80), good=st.booleans())
def test_any_bytes_are_jobs_or_a_sentence(tmp_path_factory, content, good):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes((HEADER.encode() if good else b"") + content)
    said = ""
    try:
        assert profile.last_build(path).jobs
    except LogError as error:
        said = error.what
    assert said.startswith(f"{path}: " if said else "")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("", "first line"),
        ("# ninja log v4\n", "first line is '# ninja log v4'"),
        (HEADER, "no job has ended"),
        (HEADER + line("a.o", 0, 5) + "0\t5\ta.o\n", "line 3 is not as ninja writes it: '0"),
        (HEADER + line("a.o", 6, 5), "line 2"),
        (HEADER + line("a.o", 0, 5).replace("\t5\t", "\tfive\t"), "line 2"),
    ],
)
def test_a_broken_log_is_a_sentence(tmp_path, broken, says):
    path = tmp_path / ".ninja_log"
    path.write_text(broken)
    with pytest.raises(LogError, match=says):
        profile.last_build(path)


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    assert outputs(profile.last_build(log(tmp_path, line("a.o", 0, 5), line("b.o", 1, 7)[:9]))) == ["a.o"]


def test_the_last_run_that_made_all_is_taken_and_not_a_small_one_after_it(tmp_path):
    lines = [line("a.o", 0, 50), line("t.so", 50, 60), line("a.o", 0, 40), line("t.so", 40, 55), line("a.o", 1, 2)]
    build = profile.last_build(log(tmp_path, *lines))
    assert [(job.name, job.end) for job in build.jobs] == [("a", 40), ("t.so", 55)]
    assert build.missing == 0


def test_where_no_run_made_all_the_fullest_is_taken_and_what_it_lacks_is_counted(tmp_path):
    lines = [line("a.o", 0, 50), line("b.o", 0, 60), line("c.o", 0, 40)]
    build = profile.last_build(log(tmp_path, *lines))
    assert (outputs(build), build.missing) == (["a.o", "b.o"], 1)


def test_a_job_is_called_by_its_source_and_known_by_what_it_does():
    def job(output: str) -> tuple[str, str, str]:
        one = Job((output,), 0, 1, "0")
        return one.name, one.label, one.kind

    assert job("CMakeFiles/_C.dir/csrc/sampler.cu.o") == ("csrc/sampler.cu", "sampler", profile.CUDA)
    assert job("c10/CMakeFiles/c10.dir/core/Device.cpp.o") == ("core/Device.cpp", "Device", profile.CPP)
    assert job("lib/libc10.so") == ("lib/libc10.so", "libc10.so", profile.LINK)
    assert job("lib/libz.so.1.2") == ("lib/libz.so.1.2", "libz.so.1.2", profile.LINK)
    assert job("bin/protoc") == ("bin/protoc", "protoc", profile.LINK)
    assert job("aten/Functions.h")[2] == job("CMakeFiles/install.util")[2] == profile.OTHER


# --- what waits for what, as the real ninja tells it ---


def test_dependencies_are_ninjas_own_and_phony_targets_are_seen_through(built):
    build = profile.last_build(built / ".ninja_log")
    needs = profile.dependencies(built, build.jobs)
    waits = {job.label: {build.jobs[one].label for one in needs[number]} for number, job in enumerate(build.jobs)}
    assert waits == {"one": set(), "alone": set(), "long": {"one"}, "short": {"one"}, "libt.so": {"long", "short"}}
    assert [job.outputs for job in build.jobs if job.label == "one"] == [("one.h", "two.h")]  # one command
    assert [build.jobs[one].label for one in build.plan(needs).critical] == ["one", "long", "libt.so"]
    assert build.wall >= build.plan(needs).makespan(64) >= 350


def test_without_ninjas_files_nothing_is_known_to_wait_and_that_is_told(tmp_path, capsys):
    assert profile.dependencies(tmp_path, [Job(("a.o",), 0, 1, "0")]) == [frozenset()]
    assert "what waits for what is not known" in capsys.readouterr().out


# --- the schedule ---


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    took = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
    earlier = [st.frozensets(st.integers(0, number - 1), max_size=3) if number else st.just(frozenset()) for number in
               range(len(took))]  # fmt: skip
    return Plan(tuple(took), draw(st.tuples(*earlier)))


@given(plan=plans(), count=st.integers(1, 70))
def test_a_schedule_is_never_shorter_than_can_be_nor_longer_than_one_after_the_other(plan, count):
    longest, work, span = plan.chains[plan.critical[0]], sum(plan.took), plan.makespan(count)
    assert max(*plan.took, longest, work / count) <= span <= work
    assert span * count <= work + (count - 1) * longest  # Graham's bound: nothing idles while something is ready


@given(plan=plans())
def test_one_job_takes_the_sum_and_enough_of_them_the_critical_path(plan):
    assert plan.makespan(1) == sum(plan.took)
    assert plan.makespan(len(plan.took)) == sum(plan.took[job] for job in plan.critical) == max(plan.chains)
    assert all(before in plan.needs[after] for before, after in pairwise(plan.critical))


def test_the_longest_starts_first():
    alone = frozenset[int]()
    assert Plan((1, 1, 1, 1, 4), (alone,) * 5).makespan(2) == 4
    assert Plan((3, 3, 2, 2, 2), (alone,) * 5).makespan(2) == 7  # longest first, which is not always the shortest


@given(runs=runs_of_ninja())
def test_no_two_jobs_stand_in_one_lane_at_one_time(runs):
    jobs = sorted(runs[0], key=lambda job: (job.start, job.end))
    build = Build(tuple(jobs), 0)
    for lane in range(build.width):
        row = [job for job, place in zip(jobs, build.lanes, strict=True) if place == lane]
        assert all(one.end <= other.start for one, other in pairwise(row))
    assume(all(job.took for job in jobs))
    assert build.width == max(sum(job.start <= at.start < job.end for job in jobs) for at in jobs)


# --- the chart ---


@pytest.fixture(scope="module")
def chart(tmp_path_factory, built) -> Path:
    """The folder with both charts of the real build."""
    folder = tmp_path_factory.mktemp("chart")
    build = profile.last_build(built / ".ninja_log")
    plan = build.plan(profile.dependencies(built, build.jobs))
    for name in ("a.png", "a.svg", "again.svg"):
        profile.draw("thing", build, plan, folder / name)
    return folder


def test_the_picture_shows_every_kind_and_the_critical_path(chart):
    pixels = (imread(chart / "a.png")[:, :, :3] * 255).round().astype(int)
    for colour in (*(profile.COLOURS[kind] for kind in (profile.CUDA, profile.CPP, profile.LINK)), profile.CRITICAL):
        wanted = [round(part * 255) for part in to_rgb(colour)]
        assert (abs(pixels - wanted).max(axis=2) <= 1).sum() > 100, colour
    # The long object has most of the time, so most of the picture is of its colour.
    cuda = [round(part * 255) for part in to_rgb(profile.COLOURS[profile.CUDA])]
    assert (abs(pixels - cuda).max(axis=2) <= 1).mean() > 0.2


def test_the_drawing_has_its_words_as_words_and_equal_builds_give_equal_bytes(chart):
    drawing = (chart / "a.svg").read_text()
    assert all(word in drawing for word in ("thing: 5 jobs", "long", "libt.so", "critical path"))
    assert drawing.count(f"stroke: {profile.CRITICAL}") == 3 + 1  # one, long, libt.so, and the legend
    assert drawing == (chart / "again.svg").read_text()


# --- as a person asks for it ---


def put(log: Path, scratch: Path, work: str) -> Path:
    folder = scratch / "work" / work / "tree" / "build" / "temp"
    folder.mkdir(parents=True)
    for file in (log, log.parent / "build.ninja"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_every_package_has_its_newest_log(tmp_path, built):
    one, two, other = (put(built / ".ninja_log", tmp_path, name) for name in ("a-b-0f", "a-b-0e", "c-1f"))
    for newer, older in ((one, two), (two, one)):
        os.utime(older / ".ninja_log", (1, 1))
        os.utime(newer / ".ninja_log", (2, 2))
        assert profile.newest(tmp_path / "work") == {"a-b": newer / ".ninja_log", "c": other / ".ninja_log"}


def test_the_tables_say_what_takes_longest_and_what_more_cores_would_give(tmp_path, capsys):
    lines = [line("b.cpp.o", 0, 4000), line("CMakeFiles/t.dir/a.cu.o", 0, 6000), line("t.so", 6000, 7000)]
    folder = tmp_path / "work" / "t-0f" / "tree"
    folder.mkdir(parents=True)
    log(folder, *lines)
    (folder / "build.ninja").write_text(
        "rule r\n  command = false\nbuild t.so: r CMakeFiles/t.dir/a.cu.o b.cpp.o\n"
        "build CMakeFiles/t.dir/a.cu.o: r\nbuild b.cpp.o: r\n"
    )
    profile.show(tmp_path, tmp_path, {})
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    for row in (
        ["a.cu", "6.0 s", "54.5%"], ["wall time", "7.0 s"], ["all jobs together", "11.0 s"],
        ["jobs busy, on average", "1.57 of 2"], ["all of it", "7.0 s"],
        ["1", "11.0 s", "1.00", "100%"], ["2", "7.0 s", "1.57", "79%"], ["64", "7.0 s", "1.57", "2%"],
    ):  # fmt: skip
        assert row in cells
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"t.svg", "t.png"}


def test_where_nothing_was_built_it_says_so(tmp_path):
    with pytest.raises(VoltforgeError, match="no build has left a log") as caught:
        profile.show(tmp_path, tmp_path, {})
    assert "./doit wheels" in caught.value.hint


def test_doit_draws_what_was_built_and_says_in_a_sentence_what_stands_in_the_way(tmp_path, repository, built):
    checkout = Checkout(tmp_path / "a checkout", repository)
    checkout.settle()
    assert "no build has left a log" in problem(checkout.doit("bench:profile"))
    folder = put(built / ".ninja_log", checkout.root / "build", "thing-0123456789ab")
    done = checkout.doit("bench:profile")
    assert (done.returncode, done.stderr) == (0, "")
    assert (checkout.root / "build" / "profile" / "thing.svg").read_text().startswith("<?xml")
    (folder / ".ninja_log").write_text(HEADER + "what is this\n")
    assert "line 2 is not as ninja writes it" in problem(checkout.doit("bench:profile"))


def test_the_time_that_a_command_waited_at_the_gate_is_not_its_own():
    jobs = [Job(("a.o",), 0, 9000, "1"), Job(("b.o",), 0, 5000, "2"), Job(("lib.so",), 9000, 9500, "3")]
    made = Build(tuple(jobs), 0).without_waiting({"a.o": 4.0, "b.o": 5.5})
    assert [(job.outputs[0], job.start, job.end) for job in made.jobs] == [
        ("b.o", 0, 5000),  # not known to be shorter than it stands in the log
        ("a.o", 5000, 9000),
        ("lib.so", 9000, 9500),
    ]
    assert made.work == 9500
    assert made.width == 1


def test_what_the_gate_let_through_a_moment_before_ninja_noted_anothers_end_stands_behind_it():
    jobs = [Job(("a.o",), 0, 5000, "1"), Job(("b.o",), 0, 9000, "2"), Job(("c.o",), 0, 9500, "3")]
    made = Build(tuple(jobs), 0).without_waiting({"b.o": 4.004, "c.o": 4.6})
    assert [(job.outputs[0], job.start) for job in made.jobs] == [("a.o", 0), ("c.o", 4900), ("b.o", 5000)]
    assert made.width == 2
