"""PyTorch's operations on this machine's GPU, each held against the CPU in float64; torch and numpy are all it needs.

`python -m volta.torch_operations` prints one row for each operation: how far off it is, how far it may be, how long it
takes. An operation that fails is a row too, with what it said, and the others still run. The exit status is 0 if all
are right, 1 if not, 5 if there is no GPU that torch can use.
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
    """Run all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m volta.torch_operations", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in the same types, on the CPU")
    parser.add_argument("--only", default="", metavar="WORDS", help="only operations that have these words in the name")
    parser.add_argument("--json", action="store_true", help="one JSON value a line: what it runs on, then each row")
    said = parser.parse_args(words)
    if said.device == "cuda" and (why := absent()):
        print(why, file=sys.stderr)
        return NO_GPU
    strict()
    about = machine(said.device)
    print(json.dumps(about) if said.json else ", ".join(f"{name} {what}" for name, what in about.items()), flush=True)
    if not said.json:
        print(f"{'operation':<42} {'error':>8} {'bound':>8} {'us':>10}  verdict")
    rows = []
    for operation in operations():
        if said.only in operation.name:
            rows.append(run(operation, said.device))
            print(json.dumps(asdict(rows[-1])) if said.json else line(rows[-1]), flush=True)
    if not rows:
        parser.error(f"no operation has {said.only} in its name")
    bad = sum(not row.fine for row in rows)
    if not said.json:
        print(f"{len(rows) - bad} of {len(rows)} are right or left out" if bad else f"all {len(rows)} are right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
