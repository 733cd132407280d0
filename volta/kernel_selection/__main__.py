"""Print which kernels vLLM selects on a card of one compute capability, or the message with which it refuses.

Run ``python -m volta.kernel_selection`` with the Python of an environment that has the vLLM wheel. It prints one JSON
line for each case; ``--markdown FILE`` writes the tables of docs/volta.md. It needs no GPU and runs no kernel.

vLLM's own code decides: its engine arguments make the configuration, its loader builds the model's layers (without
storage), its worker joins the cards. Three answers are pretended: the platform (CUDA, this capability), NVLink between
the cards or not, and a P2P check that passes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from volta.kernel_selection.case import cases
from volta.kernel_selection.select import table
from volta.kernel_selection.startup import pretended, quiet
from volta.kernel_selection.tables import markdown


def capability(text: str) -> tuple[int, int]:
    """Parse a compute capability: '7.0' is (7, 0)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> None:
    """Print the answers to all cases as JSON lines, or also write them as tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--capability", type=capability, default=(7, 0), metavar="7.0", help="compute capability of the pretended cards"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases whose names contain this text")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the tables of docs/volta.md to this file"
    )
    options = parser.parse_args()
    if options.only and options.markdown:
        parser.error("--markdown needs all cases: leave out --only")
    pretended(options.capability)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        answers = table(case for case in cases() if options.only in ", ".join(asdict(case).values()))
    for case, choice in answers.items():
        print(json.dumps({**asdict(case), **asdict(choice)}))
    if options.markdown:
        options.markdown.write_text(markdown(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
