"""Compare PyTorch's operations on this machine's GPU with float64 on the CPU; needs only torch and numpy.

`python -m volta.torch_operations` prints a row for each operation: its error, the bound of the error, its time. If an
operation fails, its row has the error message, and the others still run. The exit status is 0 if all are right, 1 if
not, 5 if there is no GPU that torch can use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from volta.torch_operations.catalogue import operations
from volta.torch_operations.machine import absent, machine
from volta.torch_operations.operation import NO_GPU, run, strict
from volta.torch_operations.table import line


def main(words: Sequence[str] | None = None) -> int:
    """Run all operations; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m volta.torch_operations", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: run the same types on the CPU")
    parser.add_argument("--only", default="", metavar="WORDS", help="only operations whose name contains this text")
    parser.add_argument("--json", action="store_true", help="print JSON lines: the machine, then each row")
    options = parser.parse_args(words)
    if options.device == "cuda" and (why := absent()):
        print(why, file=sys.stderr)
        return NO_GPU
    strict()
    about = machine(options.device)
    print(
        json.dumps(about) if options.json else ", ".join(f"{name} {value}" for name, value in about.items()), flush=True
    )
    if not options.json:
        print(f"{'operation':<42} {'error':>8} {'bound':>8} {'us':>10}  verdict")
    rows = []
    for operation in operations():
        if options.only in operation.name:
            rows.append(run(operation, options.device))
            print(json.dumps(asdict(rows[-1])) if options.json else line(rows[-1]), flush=True)
    if not rows:
        parser.error(f"no operation has {options.only!r} in its name")
    bad = sum(not row.fine for row in rows)
    if not options.json:
        print(
            f"{len(rows) - bad} of {len(rows)} are right or left out"
            if bad
            else f"all {len(rows)} are right or left out"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
