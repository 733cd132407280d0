"""Time `./doit wheels:vllm` when nothing has changed, and after a patch to one file. Build the wheel first.

One patch changes a Python file, so that nothing is compiled; the other changes one CUDA source. Both are removed
afterwards, and the wheel is built again without them.
"""

import argparse
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.system import console

PATCH = ROOT / "patches" / "vllm" / "9999-probe.patch"
CHANGES = {
    "a Python file": ("vllm/version.py", "+# probe\n"),
    "one CUDA source": ("csrc/activation_kernels.cu", "+// probe\n"),
}


def seconds_of_run():
    """Run the task and return its seconds."""
    start = time.monotonic()
    done = subprocess.run(["./doit", "wheels:vllm"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - start


def count_compiled():
    """Return the number of objects that the last build compiled."""
    log = (ROOT / "build" / "logs" / "vllm.log").read_text(errors="replace")
    return len(re.findall(r"^\[\d+/\d+\] Building", log, re.MULTILINE))


def write_patch(file, line):
    """Write a patch that adds a comment at the top of a file."""
    first = (ROOT / "build" / "trees" / "vllm" / file).read_text().splitlines()[0]
    header = f"Subject: bench probe\n---\n--- a/{file}\n+++ b/{file}\n"
    PATCH.write_text(f"{header}@@ -1 +1,2 @@\n{line} {first}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, help="runs without a change (default: 5)")
    count = parser.parse_args().n
    seconds_of_run()
    times = [seconds_of_run() for _ in range(count)]
    rows = [("nothing changed", f"{statistics.median(times):.2f} s (median of {count})", "0")]
    try:
        for name, (file, line) in CHANGES.items():
            write_patch(file, line)
            rows.append((f"a patch to {name} added", f"{seconds_of_run():.0f} s", str(count_compiled())))
            PATCH.unlink()
            rows.append(("the patch removed", f"{seconds_of_run():.0f} s", str(count_compiled())))
    finally:
        PATCH.unlink(missing_ok=True)
    console.table("./doit wheels:vllm", ("", "wall time", "objects compiled"), rows)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    console.note(f"largest process: {peak:.0f} MB")


if __name__ == "__main__":
    main()
