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
    """'7.0' as (7, 0)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> None:
    """Answer to all cases, as JSON lines or as tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=capability, default=(7, 0), metavar="7.0", help="which card is pretended")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the cases that have these words in them")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of docs/volta.md there, too")
    words = parser.parse_args()
    if words.only and words.markdown:
        parser.error("--markdown needs all cases: leave out --only")
    pretended(words.capability)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        answers = table(case for case in cases() if words.only in ", ".join(asdict(case).values()))
    for case, choice in answers.items():
        print(json.dumps({**asdict(case), **asdict(choice)}))
    if words.markdown:
        words.markdown.write_text(markdown(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
