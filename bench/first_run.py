"""Time a new user's first commands: a fresh clone, an empty HOME, then `./doit list` and `./doit wheels`, twice each.

    python bench/first_run.py                    # this commit
    python bench/first_run.py OLD NEW --quick    # two commits side by side, without the wheels

The index, and the files in --downloads, are as warm as they are. Each figure is wall time and processor time; the
latter is summed over all processes. Stages of `./doit wheels` that took more than a second are listed below.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.system import console, files

LISTS = {"first ./doit list": ["list"], "second ./doit list": ["list"]}
WHEELS = {"first ./doit wheels": ["wheels"], "./doit wheels, nothing to do": ["wheels"]}


def clone(commit, folder):
    """Clone a commit of this checkout; return its short hash."""
    run = ["git", "-c", "advice.detachedHead=false"]
    subprocess.run([*run, "clone", "--quiet", ROOT, folder], check=True)
    name = subprocess.run(["git", "-C", ROOT, "rev-parse", commit], check=True, capture_output=True, text=True)
    subprocess.run([*run, "-C", folder, "checkout", "--quiet", name.stdout.strip()], check=True)
    return name.stdout.strip()[:7]


def measured(words, folder, environ):
    """Run `./doit`; return wall seconds, processor seconds and the megabytes of its largest process."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(["./doit", *words], cwd=folder, env=environ, stdout=output, stderr=output)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace") + f"x ./doit {' '.join(words)} failed")
    return time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def first_run(commit, phases, mirrors, scratch):
    """Return the commit, its phases, and the seconds of its stages."""
    home, folder = scratch / f"home-{commit}", scratch / f"clone-{commit}"
    home.mkdir()
    name = clone(commit, folder)
    left_out = ("VOLTFORGE_", "XDG_", "UV_CACHE", "PYTHONDONTWRITEBYTECODE")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    environ |= {"HOME": str(home), **({"VOLTFORGE_MIRRORS": mirrors} if mirrors else {})}
    rows = {}
    for phase, words in phases.items():
        rows[phase] = measured(words, folder, environ)
        wall, cpu, _ = rows[phase]
        console.note(f"{name}: {phase}: {wall:.1f} s, {cpu:.1f} s of CPU")
    return {"commit": name, "phases": rows, "stages": files.read_json(folder / "build/stages/history.json") or {}}


def report(runs):
    """Print the phases of all commits side by side, and the stages of the last one."""
    heads = ["", *(f"{run['commit']} {what}" for run in runs for what in ("wall", "CPU", "largest process"))]
    rows = [(phase, *(text for run in runs for text in shown(*run["phases"][phase]))) for phase in runs[0]["phases"]]
    console.table("the first commands, fresh clone, empty HOME", heads, rows)
    if stages := runs[-1]["stages"]:
        longest = sorted(stages.items(), key=lambda stage: -stage[1])
        console.table(
            f"stages of {runs[-1]['commit']}", ("stage", "wall"), [(name, f"{s:.1f} s") for name, s in longest]
        )


def shown(wall, cpu, peak):
    """Return one measurement as text."""
    return f"{wall:.1f} s", f"{cpu:.1f} s", f"{peak:.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", default=["HEAD"], help="commits to compare (default: HEAD)")
    parser.add_argument("--quick", action="store_true", help="without the wheels")
    parser.add_argument("--downloads", default="", help="a folder or server with the sources (VOLTFORGE_MIRRORS)")
    options = parser.parse_args()
    phases = LISTS if options.quick else {**LISTS, **WHEELS}
    with tempfile.TemporaryDirectory(prefix="voltforge-first-run-") as name:
        runs = [first_run(commit, phases, options.downloads, Path(name)) for commit in options.commits]
    report(runs)
    out = ROOT / "build" / "bench" / "first_run.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
