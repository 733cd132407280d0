"""Compile vLLM twice, stock sources and ours, with one toolchain, one environment and as many jobs, in one run.

Stock means: the sdist with its downloads cut out, which is what the first patches of the series do, and nothing else.
Both are built from clean trees, in turn. Prints a table, and lists the kernels that only one of them holds.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.binary import fatbin
from voltforge.compile import jobs, sandbox
from voltforge.compile.build import Build
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches, tree
from voltforge.system import console, files
from voltforge.system.process import run
from voltforge.wheel import wheelfile

STOCK = ("0001-cut-downloads.patch", "0002-cutlass-stand-in.patch")


@dataclass(frozen=True)
class Result:
    wall: float
    cpu: float
    steps: int
    peak: int
    peak_one: int
    wheel: int
    extensions: dict[str, int]
    kernels: dict[str, frozenset[str]]


def measured(pipeline, name, patches, count, folder, scheduled, cache=None):
    recipe = pipeline.recipes["vllm"]
    package = pipeline.package(recipe)
    archive = pipeline.store.get(recipe.source.artifact)
    patched = tree.create(archive, patches, folder / "tree")
    log = pipeline.scratch / "logs" / f"bench-{name}.log"
    console.step(f"{name}: {len(patches)} patches, {count} jobs, log {log.relative_to(ROOT)}")
    build = Build(
        recipe,
        patched,
        package.stages["environment"].result(),
        pipeline.toolchain.result(),
        sandbox=sandbox.choose("auto"),
        jobs=count,
        work=folder / "work",
        scheduler=pipeline.scheduler if scheduled else None,
        cache=cache,
    )
    built = build.compile(log)
    console.note(f"{built.usage}; {built.cache_stats}")
    finished = wheelfile.finish(built.wheel, folder / "out", runpath=recipe.finish.runpath, epoch=patched.epoch)
    wheelfile.unpack(finished, folder / "content")
    extensions = {path: folder / "content" / path for path in recipe.expect.extensions}
    return Result(
        built.usage.wall,
        built.usage.cpu,
        sum(line.startswith("[") and "] Building" in line for line in log.read_text(errors="replace").splitlines()),
        built.usage.peak,
        built.usage.peak_one,
        finished.stat().st_size,
        {path: file.stat().st_size for path, file in extensions.items()},
        {path: fatbin.kernels(file) for path, file in extensions.items()},
    )


def families(names):
    """Return the number of names of each kernel, over all template arguments."""
    plain = run(["c++filt", *sorted(names)]).output.splitlines() if names else []
    headers = re.compile(r"\b(thrust|cub|cuda::std)::")
    kernels = [re.sub(r"^void |[<(].*", "", name) for name in plain]
    return Counter(
        "thrust, CUB and libcu++" if headers.search(full) else name for full, name in zip(plain, kernels, strict=True)
    )


def show(stock, ours, count):
    rows = [
        ("objects compiled", f"{stock.steps}", f"{ours.steps}", ""),
        ("CPU time", f"{stock.cpu:.0f} s", f"{ours.cpu:.0f} s", f"{stock.cpu / ours.cpu:.2f} times less"),
        ("wall time", f"{stock.wall:.0f} s", f"{ours.wall:.0f} s", f"{stock.wall / ours.wall:.2f} times less"),
        ("peak memory, whole build", files.size(stock.peak), files.size(ours.peak), ""),
        ("peak memory, one process", files.size(stock.peak_one), files.size(ours.peak_one), ""),
        ("wheel", files.size(stock.wheel), files.size(ours.wheel), ""),
    ]
    for path in ours.extensions:
        rows.append((path, files.size(stock.extensions[path]), files.size(ours.extensions[path]), ""))
        rows.append((f"device names in {path}", str(len(stock.kernels[path])), str(len(ours.kernels[path])), ""))
    console.table(f"vLLM, {count} jobs, {platform.machine()}", ("", "stock sources", "ours", "ratio"), rows)
    for path in ours.kernels:
        for title, names in (
            ("only in stock", stock.kernels[path] - ours.kernels[path]),
            ("only in ours", ours.kernels[path] - stock.kernels[path]),
        ):
            counts = [f"{family} ({count})" for family, count in families(names).most_common()]
            console.note(f"{path}: {len(names)} names {title}: {', '.join(counts) or 'none'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="", help="compile jobs at once (default: as a build would choose)")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "build" / "bench" / "build_vllm.json", help="where figures go"
    )
    words = parser.parse_args()
    pipeline = Pipeline.load(ROOT, Settings(jobs=words.jobs))
    recipe = pipeline.recipes["vllm"]
    count, _ = jobs.count(words.jobs, recipe.build.memory_per_job)
    pipeline.toolchain.run()
    pipeline.package(recipe).stages["environment"].required()
    series = patches.series(ROOT / "patches" / "vllm")
    stock_patches = tuple(patch for patch in series if patch.path.name in STOCK)
    with tempfile.TemporaryDirectory(dir=pipeline.scratch) as scratch:
        stock = measured(pipeline, "stock", stock_patches, count, Path(scratch, "stock"), scheduled=False)
        ours = measured(pipeline, "ours", series, count, Path(scratch, "ours"), scheduled=True)
    show(stock, ours, count)
    figures = {name: asdict(result) for name, result in (("stock", stock), ("ours", ours))}
    files.write_json(words.json, json.loads(json.dumps(figures, default=sorted)))


if __name__ == "__main__":
    main()
