"""Run `./doit wheels:vllm` again when nothing changed, and after one patch was touched; the wheel must be there.

The patch is one that changes Python files only, so nothing is compiled again, and one that changes one CUDA source:
both are put back afterwards, and the wheelhouse with them.
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

PROBE = ROOT / "patches" / "vllm" / "9999-probe.patch"
PATCHES = {
    "a Python file": ("vllm/version.py", "+# probe\n"),
    "one CUDA source": ("csrc/activation_kernels.cu", "+// probe\n"),
}


def run():
    start = time.monotonic()
    done = subprocess.run(["./doit", "wheels:vllm"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - start


def compiled():
    log = (ROOT / "build" / "logs" / "vllm.log").read_text(errors="replace")
    return len(re.findall(r"^\[\d+/\d+\] Building", log, re.MULTILINE))


def probe(file, line):
    """A patch that puts one comment at the top of a file of the patched tree."""
    first = (ROOT / "build" / "trees" / "vllm" / file).read_text().splitlines()[0]
    header = f"Subject: bench probe\n---\n--- a/{file}\n+++ b/{file}\n"
    PROBE.write_text(f"{header}@@ -1 +1,2 @@\n{line} {first}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, help="runs with nothing changed (default: 5)")
    count = parser.parse_args().n
    run()
    times = [run() for _ in range(count)]
    rows = [("nothing changed", f"{statistics.median(times):.2f} s (median of {count})", "0")]
    try:
        for name, (file, line) in PATCHES.items():
            probe(file, line)
            rows.append((f"a patch to {name} added", f"{run():.0f} s", str(compiled())))
            PROBE.unlink()
            rows.append(("and taken away", f"{run():.0f} s", str(compiled())))
    finally:
        PROBE.unlink(missing_ok=True)
    console.table("./doit wheels:vllm", ("", "wall", "objects compiled"), rows)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    console.note(f"largest process: {peak:.0f} MB")


if __name__ == "__main__":
    main()
