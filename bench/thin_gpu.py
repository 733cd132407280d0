"""Thin the torch of this Python to this machine's GPU, and run the same operations with both: do the bits agree?

For a machine with a GPU and no network: beside torch and numpy it needs pyelftools and psutil. What it found is a
table in Markdown; the exit status is 0 if all is well, 1 if not, 5 if torch has no GPU to use.

    python3 bench/thin_gpu.py FOLDER

FOLDER gets a copy of torch whose libraries hold code for this GPU alone. Files that stay are hard links where the file
system allows it; nothing of the stock torch is written to.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.binary import cubin
from voltforge.binary.fatbin import thin_binary
from voltforge.errors import VoltforgeError

OWN = ("libtorch*.so*", "libc10*.so*")
"""PyTorch's own libraries; those of NVIDIA's are never changed."""
BESIDE = ("nvidia*", "cusparselt*")
"""Packages that torch's libraries look for at ../.. from where they lie."""
NO_GPU = 5


class Stop(Exception):  # noqa: N818 - it says what happens
    """There is nothing to go on with; the exit status and a sentence."""


def torch_folder():
    """Where this Python would import torch from."""
    found = importlib.util.find_spec("torch")
    if not found or not found.submodule_search_locations:
        raise Stop(NO_GPU, "This Python has no torch: run this with one that has.")
    return Path(found.submodule_search_locations[0]).resolve()


def operations(device, before=None):
    """Run volta.torch_operations with a torch; return the machine, a row for each operation, and the seconds."""
    path = [str(one) for one in (before, ROOT) if one] + [one for one in [os.environ.get("PYTHONPATH")] if one]
    words = [sys.executable, "-m", "volta.torch_operations", "--json", "--device", device]
    begun = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == NO_GPU:
        raise Stop(NO_GPU, done.stderr.strip())
    if done.returncode not in {0, 1} or not lines:
        raise Stop(1, f"The operations ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    about, *rows = map(json.loads, lines)
    return about, {row["operation"]: row for row in rows}, time.monotonic() - begun


def copied(torch, folder):
    """Torch's folder again, and beside it links to what its libraries look for there."""
    if (folder / "torch").exists():
        shutil.rmtree(folder / "torch")
    folder.mkdir(parents=True, exist_ok=True)

    def put(source, target):
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(torch, folder / "torch", copy_function=put, ignore=shutil.ignore_patterns("__pycache__", "include"))
    for pattern in BESIDE:
        for package in torch.parent.glob(pattern):
            link = folder / package.name
            if package.suffix != ".dist-info" and not link.is_symlink():
                link.symlink_to(package)
    return folder / "torch"


def code_for(images, arch):
    """The archs to keep: this capability's code, plain or for it alone, or else the newest that its GPUs can run."""
    own = int(arch.replace(".", ""))
    runs = [one for one in images if one.kind == "cubin" and one.arch // 10 == own // 10 and one.arch <= own]
    newest = max((one.arch for one in runs), default=0)
    return sorted({f"{one.arch // 10}.{one.arch % 10}{one.variant}" for one in runs if one.arch == newest})


def thinned(torch, arch):
    """Thin the libraries of a copy in place; gives rows of a table."""
    rows = []
    libraries = {path.resolve() for pattern in OWN for path in (torch / "lib").glob(pattern)}
    for path in sorted(libraries, key=lambda one: -one.stat().st_size):
        before = path.stat().st_size
        try:
            images = cubin.images(path)
            if not images:
                continue
            keep = code_for(images, arch)
            if not keep:
                rows.append((path.name, mega(before), mega(before), f"left: no code for {arch}", ""))
                continue
            begun = time.monotonic()
            made = thin_binary(path, path, keep, drop_foreign=True)
            kept = f"{made.kept} of {made.kept + made.removed}, for {', '.join(keep)}"
            rows.append((path.name, mega(made.before), mega(made.after), kept, f"{time.monotonic() - begun:.0f} s"))
        except VoltforgeError as error:
            said = error.what.replace(str(path), path.name)
            rows.append((path.name, mega(before), mega(path.stat().st_size), f"left: {said}", ""))
    return rows


def mega(count):
    return f"{count / 1e6:.1f}"


def compared(stock, thin):
    """How each operation of the thin torch stands to the stock one's: rows of a table, and whether all is well."""
    same, loose, off = [], [], []
    for name, before in stock.items():
        after = thin.get(name, {"verdict": "failed", "said": "it was not run", "bits": ""})
        fine = {before["verdict"], after["verdict"]} <= {"right", "left out"}
        if before["verdict"] == after["verdict"] == "left out":
            continue
        if fine and before["bits"] == after["bits"]:
            same.append(name)
        elif fine and not (before["repeats"] and after["repeats"]):
            loose.append(name)
        else:
            off.append((name, f"stock {told(before)}; thin {told(after)}"))
    return same, loose, off


def told(row):
    """A row in some words."""
    return row["said"] if row.get("error") is None else f"{row['verdict']}, error {row['error']:.1e}, {row['bits']}"


def table(heads, lines):
    """A table in Markdown."""
    for line in (heads, ["---"] * len(heads), *lines):
        print(f"| {' | '.join(str(one) for one in line)} |")
    print()


def report(about, rows, stock, thin, took):
    """Print all that was found; gives the exit status."""
    print(", ".join(f"{name} {what}" for name, what in about.items() if name != "place"), end="\n\n")
    table(("library", "MB before", "MB after", "device images kept", "thinned in"), rows)
    same, loose, off = compared(stock, thin)
    ratios = [
        thin[name]["microseconds"] / stock[name]["microseconds"]
        for name in (*same, *loose)
        if stock[name]["microseconds"] and thin[name]["microseconds"]
    ]
    count = len(same) + len(loose) + len(off)
    table(("operations", ""), [
        ("run with both", count),
        ("same bits, within the bound against float64", len(same)),
        ("within the bound; bits differ from call to call", f"{len(loose)} {' '.join(loose)}".strip()),
        ("left out on this device", len(stock) - count),
        ("differ, or wrong, or failed", len(off)),
        ("time of the thin one's calls by the stock one's, median", f"{statistics.median(ratios or [0]):.2f}"),
        ("seconds of the whole run, stock and thin", f"{took[0]:.0f} and {took[1]:.0f}"),
    ])  # fmt: skip
    if off:
        table(("operation", "how they differ"), off)
    table(("operation", "error", "bound", "us, stock", "us, thin", "bits"), [
        (name, f"{row['error']:.1e}", f"{row['bound']:.1e}", f"{row['microseconds']:.1f}",
         f"{thin[name]['microseconds']:.1f}", "same" if name in same else "loose")
        for name, row in stock.items() if name in same or name in loose
    ])  # fmt: skip
    smaller = any(float(after) < float(before) for _, before, after, _, _ in rows)
    return 0 if same and not off and smaller else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the thin copy goes; 5 GB at most")
    parser.add_argument("--arch", metavar="9.0", help="which code stays, if not this GPU's own")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this without a GPU")
    words = parser.parse_args()
    try:
        torch = torch_folder()
        about, stock, first = operations(words.device)
        arch = words.arch or about.get("capability")
        if not arch:
            raise Stop(2, "Without a GPU --arch must say which code stays.")
        copy = copied(torch, words.folder.resolve())
        rows = thinned(copy, arch)
        used, thin, second = operations(words.device, words.folder.resolve())
        if Path(used["place"]).resolve() != copy.resolve():
            raise Stop(1, f"The thin copy was not used, but {used['place']}.")
        return report(about, rows, stock, thin, (first, second))
    except Stop as stop:
        status, said = stop.args
        print(said, file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
