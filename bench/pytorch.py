"""What PyTorch takes to compile, from a sample of its objects, and what more cores and more hosts would give.

The source is Debian's 2.6.0 (tests/support/debian.py says why), with our recipe's options, environment, toolkit and
sandbox. It is configured, its code is generated, and a sample of its objects is compiled, drawn at random from each
kind; the gate measures each. An object that was not drawn is taken to be like one of its kind that was, at random;
what waits for what is ninja's own graph. Nothing is linked.
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
from voltforge.compile.costs import Needs
from voltforge.compile.profile import LOG, Job, Plan, dependencies, read
from voltforge.compile.scheduler import Gate
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run

ATTENTION, CUDA, CPU, OTHER = "CUDA with CUTLASS", "other CUDA", "C++ of libtorch_cpu", "other C++"
DRAWS = 20
"""How often the objects that were not drawn are given times; the median counts."""
COUNTS = (1, 2, 8, 32, 128, 320, 640, 1000, 3200)
"""Jobs on however many hosts."""


def kind(output):
    """The kind of an object by its path; "" of what is no object."""
    if not output.endswith(".o"):
        return ""
    if output.endswith(".cu.o"):
        return ATTENTION if "mem_eff_attention" in output else CUDA
    return CPU if "/torch_cpu.dir/" in output else OTHER


def configured(pipeline, scratch):
    """A workshop in which CMake has run, with a gate of its own."""
    console.step("unpack and patch PyTorch 2.6.0")
    toolchain = pipeline.package(pipeline.recipes["vllm"]).toolchain()
    grown = debian.patched(pipeline, debian.upstream(pipeline, scratch / "upstream"))
    shop = debian.workshop(pipeline, grown, toolchain, scratch / "work")
    # Nothing is expected of an object's memory: what is learnt is then what was seen, and no more.
    gate = Gate(scratch / "gate", jobs.cores(), {shop.recipe.name: Needs(scratch / "needs.json", 1)})
    shop = replace(shop, gate=gate)
    shop.prepare()
    console.step("configure")
    debian.configured(shop)
    return shop


def compiled(shop, targets):
    """Compile some objects, and all that they wait for; those that failed are left out of what the gate measured."""
    ninja = shop.places["environment"] / "bin" / "ninja"
    with console.progress("pytorch") as tell:
        words = [ninja, "-C", "build", f"-j{shop.gate.window}", "-k", "0", *targets]
        try:
            shop.run(words, log=shop.work / "ninja.log", watch=lambda line, _: tell(line) if line else None)
        except ProgramFailed as error:
            console.warn(error.what.splitlines()[0])
    while shop.gate.status.running:  # ninja may hear of the last one's end before the gate does
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sample", type=int, default=25, metavar="N", help="objects of each kind (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "pytorch.json", help="where figures go")
    words = parser.parse_args()
    pipeline, scratch = Pipeline.load(ROOT, Settings()), ROOT / "build" / "bench" / "pytorch"
    files.remove(scratch)
    scratch.mkdir(parents=True)
    chance, begin = random.Random(words.seed), time.monotonic()
    shop = configured(pipeline, scratch)
    configuring = time.monotonic() - begin

    folder = shop.folders["tree"] / "build"
    ninja = shop.environment.path / "bin" / "ninja"
    listed = json.loads(run([ninja, "-C", folder, "--quiet", "-t", "compdb"]).output)
    outputs = sorted({one["output"] for one in listed})
    kinds = {name: [one for one in outputs if kind(one) == name] for name in (ATTENTION, CUDA, CPU, OTHER)}
    drawn = {name: sorted(chance.sample(some, min(words.sample, len(some)))) for name, some in kinds.items()}
    console.step(f"compile {sum(map(len, drawn.values()))} of {sum(map(len, kinds.values()))} objects")
    compiled(shop, [one for some in drawn.values() for one in some])

    ended = {output: job for once in read(folder / LOG) for job in once for output in job.outputs}
    needs = shop.gate.needs[shop.recipe.name].measured()
    took = {name: [needs[one] for one in some if one in ended and one in needs] for name, some in drawn.items()}
    figures = {"configuring": round(configuring), "jobs": shop.gate.jobs, "kinds": {}}
    for name, some in took.items():
        seconds = [one.seconds for one in some]
        error = statistics.stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0
        figures["kinds"][name] = {
            "objects": len(kinds[name]), "drawn": len(drawn[name]), "compiled": len(some),
            "mean": statistics.mean(seconds), "error": error, "longest": max(seconds),
            "memory": statistics.mean(one.memory for one in some), "most": max(one.memory for one in some),
        }  # fmt: skip

    # Commands that are no objects, and were not run here, are links and copies of files: they take no time in this.
    edges = [Job(ended[one].outputs if one in ended else (one,), 0, 0, "") for one in outputs]
    waits = dependencies(folder, edges)
    spans = {count: [] for count in COUNTS}
    for _ in range(DRAWS):
        ms = [round(1000 * lasting(one, needs, ended, took, chance)) for one in outputs]
        plan = Plan(tuple(ms), tuple(waits))
        for count in COUNTS:
            spans[count].append(plan.makespan(count))
        figures.setdefault("critical", []).append(plan.chains[plan.critical[0]] / 1000)
    figures["critical"] = statistics.median(figures["critical"])
    figures["spans"] = {count: statistics.median(some) / 1000 for count, some in spans.items()}
    files.write_json(words.json, json.loads(json.dumps(figures)))
    report(figures)


def lasting(output, needs, ended, took, chance):
    """What a command takes: as it was measured, or like another object of its kind."""
    name = kind(output)
    if name and output in ended and output in needs:
        return needs[output].seconds
    if name:
        return chance.choice(took[name]).seconds
    return ended[output].took / 1000 if output in ended else 0.0


def report(figures):
    rows = []
    for name, one in figures["kinds"].items():
        total, error = one["objects"] * one["mean"] / 3600, one["objects"] * one["error"] / 3600
        rows.append((name, str(one["objects"]), f"{one['compiled']} of {one['drawn']}", f"{one['mean']:.0f} s",
                     f"{one['longest']:.0f} s", f"{total:.1f} ± {error:.1f} h", files.size(round(one["memory"])),
                     files.size(one["most"])))  # fmt: skip
    titles = ("", "objects", "compiled", "mean", "longest", "all of them", "memory, mean", "most")
    console.table("objects of PyTorch 2.6.0, one arch", titles, rows)
    one = figures["spans"][1]
    spans = [(str(count), _clock(span), f"{one / span:.1f}", f"{one / span / count:.0%}")
             for count, span in figures["spans"].items()]  # fmt: skip
    console.table("computed, the longest chain first", ("jobs", "compiling", "times faster than one", "busy"), spans)
    console.note(
        f"no number of jobs goes below {figures['critical']:.0f} s; {figures['configuring']} s to unpack and configure"
    )


def _clock(seconds):
    hours, minutes = f"{seconds / 3600:.1f} h", f"{seconds / 60:.0f} min"
    return hours if seconds >= 3600 else minutes if seconds >= 600 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
