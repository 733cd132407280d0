"""Measure a running OpenAI-compatible server: text for 40 and 60 at once, one request alone, decisions of one token.

Beside each figure stands that of the earlier project on a CMP 100-210. A server that wants a key is shown the one in
VOLTFORGE_API_KEY, or else OPENAI_API_KEY.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.commands import serve
from voltforge.errors import VoltforgeError
from voltforge.system import console

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended, as shells give it."""


def count(text):
    """A number of requests, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one")
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the server's address: http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="the model's name; otherwise the first that /v1/models lists")
    parser.add_argument(
        "--requests", type=count, help="of each measurement, at most 10 of the one alone; otherwise 400, 480, 10, 2000"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "serve", help="folder for JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="one round of each: whether it works, not how fast")
    words = parser.parse_args()
    loads = [load.quick() if words.quick else load for load in serve.LOADS]
    if words.requests:
        loads = [replace(load, requests=min(words.requests, load.requests) if load.concurrency == 1 else words.requests)
                 for load in loads]  # fmt: skip
    try:
        serve.check(words.url, words.out, model=words.model, loads=loads)
    except VoltforgeError as error:
        console.error(error)
        return 1
    except KeyboardInterrupt:
        console.warn("interrupted: what was measured before is told above")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
