"""Estimate the compile time of PyTorch from a sample of its objects, for any number of jobs and hosts.

The source is Debian's PyTorch 2.6.0 (tests/support/debian.py says why), built with the options, environment, toolkit
and sandbox of this checkout's recipe. The program configures it, generates its code, and compiles a random sample of
each kind of object. The scheduler measures time and memory. An object outside the sample gets the time of a random
object of its kind. Dependencies come from ninja. Nothing is linked.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import debian
from voltforge.compile import jobs
from voltforge.compile.command_graph import CommandGraph
from voltforge.compile.costs import Estimates
from voltforge.compile.ninja_log import LOG_NAME, Command, dependencies, read_log
from voltforge.compile.scheduler import Scheduler
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

ATTENTION, CUDA, CPU, OTHER = "CUDA with CUTLASS", "other CUDA", "C++ of libtorch_cpu", "other C++"
KINDS = (ATTENTION, CUDA, CPU, OTHER)
DRAWS = 20
"""Random assignments of times to the objects outside the sample; the median is reported."""
COUNTS = (1, 2, 8, 32, 128, 320, 640, 1000, 3200)
"""Parallel jobs on all hosts together."""


def kind(output):
    """Return the kind of an object by its path; empty for other outputs."""
    if not output.endswith(".o"):
        return ""
    if output.endswith(".cu.o"):
        return ATTENTION if "mem_eff_attention" in output else CUDA
    return CPU if "/torch_cpu.dir/" in output else OTHER


def configure(pipeline, scratch):
    """Run CMake in a new build with its own scheduler, and return the build."""
    console.step("unpack and patch PyTorch 2.6.0")
    toolchain = pipeline.toolchain.result()
    tree = debian.patched(pipeline, debian.upstream(pipeline, scratch / "upstream"))
    build = debian.build_of(pipeline, tree, toolchain, scratch / "work")
    # The recorded memory is at least half of the estimate: with an estimate of 1 byte it is what was measured.
    estimates = {build.recipe.name: Estimates(scratch / "estimates.json", 1)}
    build = replace(build, scheduler=Scheduler(scratch / "gate", jobs.cores(), estimates))
    build.prepare()
    console.step("configure")
    debian.configured(build)
    return build


def compile_objects(build, targets):
    """Compile objects and everything that they depend on. Failures are ignored."""
    ninja = build.places["environment"] / "bin" / "ninja"
    with console.progress("pytorch") as show:
        command = [ninja, "-C", "build", f"-j{build.scheduler.ninja_jobs}", "-k", "0", *targets]
        try:
            build.run(command, log=build.work / "ninja.log", watch=lambda line, _: show(line) if line else None)
        except ProgramFailed as error:
            console.warn(error.what.splitlines()[0])
    while build.scheduler.status.running:  # ninja can see the last end before the scheduler does
        time.sleep(0.1)


def statistics_of(measurements):
    """Return the statistics of one kind's sample."""
    seconds = [measurement.seconds for measurement in measurements]
    memory = [measurement.memory for measurement in measurements]
    return {
        "compiled": len(seconds), "mean": statistics.mean(seconds),
        "error": statistics.stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0,
        "longest": max(seconds), "memory": statistics.mean(memory), "most": max(memory),
    }  # fmt: skip


def duration(output, measured, ended, sample, chance):
    """Return the seconds of a command: measured, or those of a random object of its kind."""
    name = kind(output)
    if name and output in ended and output in measured:
        return measured[output].seconds
    if name:
        return chance.choice(sample[name]).seconds
    return ended[output].duration / 1000 if output in ended else 0.0


def simulate(folder, outputs, measured, ended, sample, chance):
    """Return the median critical path and the median build time for each number of jobs, in seconds."""
    # Commands that make no object and did not run here are links and copies of files: they count as 0 seconds.
    commands = [Command(ended[output].outputs if output in ended else (output,), 0, 0, "") for output in outputs]
    before = tuple(dependencies(folder, commands))
    spans, critical = {count: [] for count in COUNTS}, []
    for _ in range(DRAWS):
        durations = [round(1000 * duration(output, measured, ended, sample, chance)) for output in outputs]
        graph = CommandGraph(tuple(durations), before)
        critical.append(graph.critical_time / 1000)
        for count in COUNTS:
            spans[count].append(graph.makespan(count) / 1000)
    medians = {count: statistics.median(seconds) for count, seconds in spans.items()}
    return {"critical": statistics.median(critical), "spans": medians}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sample", type=int, default=25, metavar="N", help="objects of each kind (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "pytorch.json", help="output file")
    options = parser.parse_args()
    pipeline, scratch = Pipeline.load(ROOT, Settings()), ROOT / "build" / "bench" / "pytorch"
    files.remove(scratch)
    scratch.mkdir(parents=True)
    chance, begin = random.Random(options.seed), time.monotonic()
    build = configure(pipeline, scratch)
    configuring = time.monotonic() - begin

    folder = build.folders["tree"] / "build"
    ninja = build.environment.path / "bin" / "ninja"
    rules = json.loads(run([ninja, "-C", folder, "--quiet", "-t", "compdb"]).output)
    outputs = sorted({rule["output"] for rule in rules})
    objects = {name: [output for output in outputs if kind(output) == name] for name in KINDS}
    drawn = {name: sorted(chance.sample(paths, min(options.sample, len(paths)))) for name, paths in objects.items()}
    console.step(f"compile {sum(map(len, drawn.values()))} of {sum(map(len, objects.values()))} objects")
    compile_objects(build, [path for paths in drawn.values() for path in paths])

    log = read_log(folder / LOG_NAME)
    ended = {output: command for commands in log for command in commands for output in command.outputs}
    measured = build.scheduler.estimates[build.recipe.name].measured()
    sample = {
        name: [measured[path] for path in paths if path in ended and path in measured] for name, paths in drawn.items()
    }
    kinds = {
        name: {"objects": len(objects[name]), "drawn": len(drawn[name]), **statistics_of(measurements)}
        for name, measurements in sample.items()
    }
    figures = {"configuring": round(configuring), "jobs": build.scheduler.jobs, "kinds": kinds}
    figures |= simulate(folder, outputs, measured, ended, sample, chance)
    files.write_json(options.json, json.loads(json.dumps(figures)))
    report(figures)


def report(figures):
    """Print the tables."""
    rows = []
    for name, row in figures["kinds"].items():
        total, error = row["objects"] * row["mean"] / 3600, row["objects"] * row["error"] / 3600
        rows.append((name, str(row["objects"]), f"{row['compiled']} of {row['drawn']}", f"{row['mean']:.0f} s",
                     f"{row['longest']:.0f} s", f"{total:.1f} ± {error:.1f} h", files.size(round(row["memory"])),
                     files.size(row["most"])))  # fmt: skip
    headings = ("", "objects", "compiled", "mean time", "longest", "all objects", "mean memory", "most memory")
    console.table("objects of PyTorch 2.6.0, one arch", headings, rows)
    single = figures["spans"][1]
    spans = [(str(count), _clock(span), f"{single / span:.1f}", f"{single / span / count:.0%}")
             for count, span in figures["spans"].items()]  # fmt: skip
    console.table("computed compile time, longest chain first", ("jobs", "wall time", "speedup", "busy"), spans)
    console.note(f"the critical path, {figures['critical']:.0f} s, is the lower bound for any number of jobs")
    console.note(f"unpacking and configuring took {figures['configuring']} s")


def _clock(seconds):
    hours, minutes = f"{seconds / 3600:.1f} h", f"{seconds / 60:.0f} min"
    return hours if seconds >= 3600 else minutes if seconds >= 600 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
