"""Measure a running OpenAI-compatible server: text for 40 and 60 parallel requests, one request, and short decisions.

The table has the figures of the earlier project on a CMP 100-210 for comparison. For a server that requires a key, set
VOLTFORGE_API_KEY or OPENAI_API_KEY.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.commands import server_benchmark
from voltforge.errors import VoltforgeError
from voltforge.system import console

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


def count(text):
    """Parse a number of requests for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one")
    return number


def with_requests(load, requests):
    """Change the number of requests of a measurement. Of one request at a time it can only be lowered."""
    return replace(load, requests=min(requests, load.requests) if load.concurrency == 1 else requests)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="address of the server, like http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="name of the model (default: the first in /v1/models)")
    parser.add_argument(
        "--requests", type=count, help="requests of each measurement, at most 10 alone (default: 400, 480, 10, 2000)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "bench" / "serve", help="folder for the JSON and the PNG file"
    )
    parser.add_argument("--quick", action="store_true", help="one round of each measurement: a test, no figures")
    options = parser.parse_args()
    loads = [load.quick() if options.quick else load for load in server_benchmark.LOADS]
    if options.requests:
        loads = [with_requests(load, options.requests) for load in loads]
    try:
        server_benchmark.check(options.url, options.out, model=options.model, loads=loads)
    except VoltforgeError as error:
        console.error(error)
        return 1
    except KeyboardInterrupt:
        console.warn("interrupted; finished measurements are above")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
