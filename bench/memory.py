"""vLLM's build under real limits of memory: ours, let through one by one, and stock sources as they are.

A control group has the limit; what its processes hold is sampled, and the kernel's own count of killed processes read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import build_vllm
from tests.support.cgroup import limited
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches
from voltforge.system import console, files


def build(which, jobs):
    """One build from nothing, in this process."""
    pipeline = Pipeline.load(ROOT, Settings(jobs=jobs))
    series = patches.series(ROOT / "patches" / "vllm")
    if which == "stock":
        series = tuple(patch for patch in series if patch.path.name in build_vllm.STOCK)
    with tempfile.TemporaryDirectory(dir=pipeline.scratch) as scratch:
        try:
            build_vllm.measured(pipeline, f"memory-{which}", series, int(jobs), Path(scratch, which), which == "ours")
        except VoltforgeError as error:
            console.error(error)
            return 1
    return 0


def under(limit, which, jobs):
    """The same in a group with a limit, watched."""
    console.step(f"{which} at {jobs} jobs in {limit} GiB")
    with limited(int(limit) << 30) as group:
        begin, most = time.monotonic(), 0
        child = subprocess.Popen([sys.executable, __file__, "--build", which, jobs], preexec_fn=group.enter)
        while child.poll() is None:
            most = max(most, group.held)
            time.sleep(0.1)
        seconds, killed = time.monotonic() - begin, group.killed
        return {"sources": which, "jobs": int(jobs), "limit": int(limit) << 30, "status": child.returncode,
                "killed": killed, "held": most, "seconds": round(seconds)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rounds = "GiB and compile jobs at once of each build of %s (default: %%(default)s)"
    parser.add_argument("--ours", default="6:8,4:16,6:16,8:16,12:16", help=rounds % "ours")
    parser.add_argument("--stock", default="6:8", help=rounds % "stock sources, empty for none")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "memory.json", help="where figures go")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.build:
        sys.exit(build(*words.build))
    rows = []
    for which in ("ours", "stock"):
        for limit, jobs in (part.split(":") for part in getattr(words, which).split(",") if part):
            rows.append(under(limit, which, jobs))
            files.write_json(words.json, json.loads(json.dumps(rows)))
    columns = "sources", "jobs", "limit", "ended", "killed", "held at most", "wall"
    shown = [
        (row["sources"], str(row["jobs"]), files.size(row["limit"]), "badly" if row["status"] else "well",
         str(row["killed"]), files.size(row["held"]), f"{row['seconds']} s") for row in rows
    ]  # fmt: skip
    console.table("vLLM under limits of memory", columns, shown)


if __name__ == "__main__":
    main()
