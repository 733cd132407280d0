"""Measure the longest objects of vLLM's last build: their time by phase, and other ways to compile them.

By phase (nvcc --time), by where the lines come from that the compiler reads, and with --split-compile, which has nvcc
optimise one object in several threads; with ``--together``, the sources of one object one by one. As it was compiled,
in the sandbox. Build first: ``./doit wheels:vllm``.
"""

import argparse
import csv
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.compile import sandbox
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import run

PHASES = {"g++ (compiling)": "g++", "g++ (preprocessing 1)": "preprocessing", "g++ (preprocessing 4)": "preprocessing",
          "cudafe++": "cudafe++", "cicc": "cicc", "ptxas": "ptxas"}  # fmt: skip
LINES = {"PyTorch": "/torch/include/", "CUDA": "/toolchain/", "C++": "/usr/", "vLLM": "/build/tree/"}
"""Whose a header is, by what its path holds."""


class LastBuild:
    """The last build's folders, and its commands without what stood before them."""

    def __init__(self, pipeline):
        self.build = pipeline.source_build("vllm").build_in(sandbox.choose("auto"))
        logs = sorted(self.build.folders["tree"].glob("build/**/.ninja_log"))
        if not logs:
            sys.exit("x nothing was built here\n  try: ./doit wheels:vllm")
        self.real = logs[0].parent
        self.seen = self.build.places["tree"] / self.real.relative_to(self.build.folders["tree"])
        ninja = self.build.environment.path / "bin" / "ninja"
        listed = json.loads(run([ninja, "-C", self.real, "--quiet", "-t", "compdb"]).output)
        self.commands = {command["output"]: re.sub(r"^.*?launch\.py ", "", command["command"]) for command in listed}

    def longest(self, count):
        """The CUDA objects that took longest, by ninja's log."""
        took = {}
        for line in (self.real / ".ninja_log").read_text().splitlines()[1:]:
            start, end, _, name, _ = line.split("\t")
            took[name] = int(end) - int(start)
        known = self.build.scheduler.estimates["vllm"].measured() if self.build.scheduler else {}
        seconds = {name: known[name].seconds if name in known else ms / 1000 for name, ms in took.items()}
        return sorted((name for name in seconds if name.endswith(".cu.o")), key=lambda name: -seconds[name])[:count]

    def run(self, command):
        """Seconds and output of a command, where the build ran it."""
        words = self.build.effective_sandbox.command(
            ["sh", "-c", command], writable=self.build.writable, readable=self.build.readable, cwd=self.seen
        )
        begin = time.monotonic()
        done = run(words, cwd="/")
        return time.monotonic() - begin, done.output

    def compiled(self, name, *more):
        """Seconds to compile an object, its digest and the table of phases."""
        table, out = self.build.folders["home"] / "time.csv", self.build.folders["home"] / "object.o"
        files.remove(table)
        home = self.build.places["home"]
        command = re.sub(r" -o \S+", f" -o {home}/object.o", re.sub(r" -MD .*? -MF \S+", "", self.commands[name]))
        seconds, _ = self.run(" ".join([command, *more, "--time", f"{home}/time.csv"]))
        return seconds, files.sha256(out), phases(table)

    def alone(self, name):
        """Seconds to compile each of the sources that an object's own includes whole, by their paths."""
        whole = next(word for word in self.commands[name].split() if word.endswith(".cu"))
        real = self.build.folders["tree"] / Path(whole).relative_to(self.build.places["tree"])
        found = {}
        for source in re.findall(r'^#include "(.+\.cu)"', real.read_text(), re.MULTILINE):
            path = str(self.build.places["tree"] / os.path.relpath(real.parent / source, self.build.folders["tree"]))
            self.commands["alone"] = self.commands[name].replace(whole, path)
            if path.endswith("moe_permute_unpermute_op.cu"):  # which counts on PyTorch's own torch/all.h
                self.commands["alone"] += " -include=torch/library.h"
            found[source] = self.compiled("alone")[0]
        return found

    def lines(self, name):
        """Return the number of lines that the device compiler reads, by the owner of the header."""
        command = re.sub(r" -(x cu -)?c ", " -x cu -E ", re.sub(r" -o \S+", "", self.commands[name]))
        command = re.sub(r" -MD .*? -MF \S+", "", command)
        counts, whose = Counter(), "others"
        for line in self.run(command)[1].splitlines():
            if marked := re.match(r'# \d+ "([^"]+)"', line):
                whose = next((who for who, part in LINES.items() if part in marked[1]), "others")
            elif line.strip():
                counts[whose] += 1
        return counts


def phases(table):
    found = Counter()
    with table.open() as rows:
        for row in csv.reader(rows, skipinitialspace=True):
            if len(row) > 6 and row[1].strip() in PHASES:
                found[PHASES[row[1].strip()]] += float(row[6]) / 1000
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=4, help="how many of the longest (default: %(default)s)")
    parser.add_argument("--threads", default="2", help="of --split-compile (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "costs.json", help="where figures go")
    parser.add_argument("--together", metavar="NAME", help="one of csrc/together, as entries: whole and in parts")
    words = parser.parse_args()
    build, rows = LastBuild(Pipeline.load(ROOT, Settings())), []
    if words.together:
        name = next(name for name in build.commands if name.endswith(f"/together/{words.together}.cu.o"))
        whole, parts = build.compiled(name)[0], build.alone(name)
        shown = [*parts.items(), ("one by one", sum(parts.values())), ("together", whole)]
        console.table("seconds", ("source", ""), [(title, f"{seconds:.1f}") for title, seconds in shown])
        return
    for name in build.longest(words.objects):
        console.step(Path(name).name)
        plain, digest, parts = build.compiled(name)
        split, other, _ = build.compiled(name, "--split-compile", words.threads)
        rows.append({"object": Path(name).name, "plain": plain, "split": split, "same": digest == other,
                     "phases": parts, "lines": build.lines(name)})  # fmt: skip
        files.write_json(words.json, json.loads(json.dumps(rows)))
    whole, read = sorted(set(PHASES.values())), [*LINES, "others"]
    console.table("seconds, one at a time", ("object", *whole, "whole", f"{words.threads} threads", "bytes"), [
        (row["object"], *(f"{row['phases'][phase]:.1f}" for phase in whole), f"{row['plain']:.1f}",
         f"{row['split']:.1f}", "the same" if row["same"] else "others") for row in rows
    ])  # fmt: skip
    console.table("lines read", ("object", *read), [
        (row["object"], *(f"{row['lines'][who]:,}" for who in read)) for row in rows
    ])  # fmt: skip


if __name__ == "__main__":
    main()
