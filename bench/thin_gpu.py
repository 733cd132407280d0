"""Thin the PyTorch of this Python to this machine's GPU, and compare the results of operations bit by bit.

The program needs a GPU and no network, and the packages torch, numpy, pyelftools and psutil. It prints tables in
Markdown. The exit status is 0 if all operations agree, 1 if not, and 5 if torch cannot use a GPU.

    python3 bench/thin_gpu.py FOLDER

FOLDER gets a copy of torch whose libraries have code for this GPU alone. Unchanged files are hard links if the file
system allows it. The stock torch is not modified.
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

from voltforge.binary import fatbin
from voltforge.binary.thinning import thin_binary
from voltforge.errors import VoltforgeError

OWN = ("libtorch*.so*", "libc10*.so*")
"""PyTorch's own libraries. NVIDIA's libraries are not changed."""
NEIGHBOURS = ("nvidia*", "cusparselt*")
"""Packages that torch's libraries load by a path relative to their own."""
NO_GPU = 5


class ThinTestError(Exception):
    """The program cannot continue. The arguments are the exit status and a message."""


def torch_folder():
    """Return the folder that this Python imports torch from."""
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.submodule_search_locations:
        raise ThinTestError(NO_GPU, "This Python has no torch. Run the program with a Python that has it.")
    return Path(spec.submodule_search_locations[0]).resolve()


def run_operations(device, first=None):
    """Run volta.torch_operations; return the machine, a row for each operation, and the seconds.

    Python imports torch from ``first``, if given.
    """
    path = [str(folder) for folder in (first, ROOT, os.environ.get("PYTHONPATH")) if folder]
    command = [sys.executable, "-m", "volta.torch_operations", "--json", "--device", device]
    start = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == NO_GPU:
        raise ThinTestError(NO_GPU, done.stderr.strip())
    if done.returncode not in {0, 1} or not lines:
        raise ThinTestError(1, f"The operations ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    machine, *rows = map(json.loads, lines)
    return machine, {row["operation"]: row for row in rows}, time.monotonic() - start


def copy_torch(torch, folder):
    """Copy torch into ``folder``, with links to the packages that its libraries load. Return the copy."""
    if (folder / "torch").exists():
        shutil.rmtree(folder / "torch")
    folder.mkdir(parents=True, exist_ok=True)

    def link(source, target):
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(
        torch, folder / "torch", copy_function=link, ignore=shutil.ignore_patterns("__pycache__", "include")
    )
    for pattern in NEIGHBOURS:
        for package in torch.parent.glob(pattern):
            neighbour = folder / package.name
            if package.suffix != ".dist-info" and not neighbour.is_symlink():
                neighbour.symlink_to(package)
    return folder / "torch"


def archs_to_keep(images, arch):
    """Return the newest architectures of a library's cubins that run on compute capability ``arch``, as ``9.0a``."""
    own = int(arch.replace(".", ""))
    usable = [
        image for image in images if image.kind == "cubin" and image.arch // 10 == own // 10 and image.arch <= own
    ]
    newest = max((image.arch for image in usable), default=0)
    return sorted({f"{image.arch // 10}.{image.arch % 10}{image.variant}" for image in usable if image.arch == newest})


def thin_libraries(torch, arch):
    """Thin the libraries of a copy in place. Return the rows of a table."""
    rows = []
    libraries = {path.resolve() for pattern in OWN for path in (torch / "lib").glob(pattern)}
    for path in sorted(libraries, key=lambda library: -library.stat().st_size):
        before = path.stat().st_size
        try:
            images = fatbin.images(path)
            if not images:
                continue
            keep = archs_to_keep(images, arch)
            if not keep:
                rows.append((path.name, mega(before), mega(before), f"unchanged: no code for {arch}", ""))
                continue
            start = time.monotonic()
            result = thin_binary(path, path, keep, drop_foreign=True)
            kept = f"{result.kept} of {result.kept + result.removed}, for {', '.join(keep)}"
            seconds = f"{time.monotonic() - start:.0f} s"
            rows.append((path.name, mega(result.before), mega(result.after), kept, seconds))
        except VoltforgeError as error:
            reason = error.what.replace(str(path), path.name)
            rows.append((path.name, mega(before), mega(path.stat().st_size), f"unchanged: {reason}", ""))
    return rows


def mega(count):
    """Format bytes as a number of MB."""
    return f"{count / 1e6:.1f}"


def compare(stock, thin):
    """Compare the rows of both torches by operation.

    Returns:
        The operations with the same bits, those whose bits vary between calls of one torch, and those that differ.
    """
    same, varying, different = [], [], []
    for name, before in stock.items():
        after = thin.get(name, {"verdict": "failed", "reason": "not run", "bits": ""})
        fine = {before["verdict"], after["verdict"]} <= {"right", "left out"}
        if before["verdict"] == after["verdict"] == "left out":
            continue
        if fine and before["bits"] == after["bits"]:
            same.append(name)
        elif fine and not (before["repeats"] and after["repeats"]):
            varying.append(name)
        else:
            different.append((name, f"stock: {describe(before)}; thin: {describe(after)}"))
    return same, varying, different


def describe(row):
    """Describe the result of an operation."""
    return row["reason"] if row.get("error") is None else f"{row['verdict']}, error {row['error']:.1e}, {row['bits']}"


def table(headings, rows):
    """Print a table in Markdown."""
    for row in (headings, ["---"] * len(headings), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print()


def report(machine, rows, stock, thin, seconds):
    """Print the tables and return the exit status."""
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name != "place"), end="\n\n")
    table(("library", "MB before", "MB after", "device images kept", "thinned in"), rows)
    same, varying, different = compare(stock, thin)
    ratios = [
        thin[name]["microseconds"] / stock[name]["microseconds"]
        for name in (*same, *varying)
        if stock[name]["microseconds"] and thin[name]["microseconds"]
    ]
    count = len(same) + len(varying) + len(different)
    table(("operations", ""), [
        ("run with both", count),
        ("same bits, within the bound against float64", len(same)),
        ("within the bound; bits differ from call to call", f"{len(varying)} {' '.join(varying)}".strip()),
        ("left out on this device", len(stock) - count),
        ("differ, or wrong, or failed", len(different)),
        ("time of a call, thin / stock, median", f"{statistics.median(ratios or [0]):.2f}"),
        ("seconds of the whole run, stock and thin", f"{seconds[0]:.0f} and {seconds[1]:.0f}"),
    ])  # fmt: skip
    if different:
        table(("operation", "difference"), different)
    table(("operation", "error", "bound", "us, stock", "us, thin", "bits"), [
        (name, f"{row['error']:.1e}", f"{row['bound']:.1e}", f"{row['microseconds']:.1f}",
         f"{thin[name]['microseconds']:.1f}", "same" if name in same else "vary")
        for name, row in stock.items() if name in same or name in varying
    ])  # fmt: skip
    smaller = any(float(after) < float(before) for _, before, after, _, _ in rows)
    return 0 if same and not different and smaller else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the thin copy, up to 5 GB")
    parser.add_argument("--arch", metavar="9.0", help="compute capability to keep (default: that of this GPU)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the program without a GPU")
    options = parser.parse_args()
    try:
        torch = torch_folder()
        machine, stock, stock_seconds = run_operations(options.device)
        arch = options.arch or machine.get("capability")
        if not arch:
            raise ThinTestError(2, "Without a GPU the option --arch is required.")
        copy = copy_torch(torch, options.folder.resolve())
        rows = thin_libraries(copy, arch)
        thin_machine, thin, thin_seconds = run_operations(options.device, options.folder.resolve())
        if Path(thin_machine["place"]).resolve() != copy.resolve():
            raise ThinTestError(1, f"Python imported torch from {thin_machine['place']}, not from the thin copy.")
        return report(machine, rows, stock, thin, (stock_seconds, thin_seconds))
    except ThinTestError as error:
        status, message = error.args
        print(message, file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
