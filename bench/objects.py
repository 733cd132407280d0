"""vLLM built of objects that were compiled before: from this disk, and from a redis-server on loopback.

Each build begins with a clean tree. The first, with an empty cache, gives the server what it compiles; the second has
the cache of the disk, the third an empty one and the server. Wheels are compared byte for byte.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import build_vllm
from voltforge.compile import cache_stats, object_cache
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import patches
from voltforge.system import console, files


@contextlib.contextmanager
def redis(folder):
    """A redis-server that keeps all in memory; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield port
    finally:
        child.kill()
        child.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="", help="compile jobs at once (default: as a build would choose)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "objects.json", help="where figures go")
    words = parser.parse_args()
    pipeline = Pipeline.load(ROOT, Settings(jobs=words.jobs))
    series, rows, wheels = patches.series(ROOT / "patches" / "vllm"), [], set()
    with tempfile.TemporaryDirectory(dir=pipeline.scratch) as scratch, redis(scratch) as port:
        address = f"redis://127.0.0.1:{port}"
        for name, server, folder in (
            ("nothing in the cache", address, "first"),
            ("this disk's cache", "", "first"),
            ("an empty one, and redis", address, "second"),
        ):
            cache = object_cache.open_cache(server, Path(scratch, folder))
            begin = time.monotonic()
            at = Path(scratch, f"build-{len(rows)}")
            result = build_vllm.measured(
                pipeline, f"objects-{len(rows)}", series, pipeline.scheduler.jobs, at, True, cache
            )
            wheels |= {files.sha256(path) for path in (at / "out").glob("*.whl")}
            stats = cache_stats.read(cache.log("vllm"), None)
            rows.append({"cache": name, "wall": result.wall, "cpu": result.cpu, "peak": result.peak,
                         "all": time.monotonic() - begin, **asdict(stats)})  # fmt: skip
            files.write_json(words.json, json.loads(json.dumps(rows)))
    columns = "cache", "found", "wall", "", "CPU", "memory at most"
    console.table("vLLM, from a clean tree", columns, [
        (row["cache"], f"{row['hits']} of {row['hits'] + row['misses']}", f"{row['wall']:.0f} s",
         f"{row['wall'] / rows[0]['wall']:.0%}", f"{row['cpu']:.0f} s", files.size(row["peak"])) for row in rows
    ])  # fmt: skip
    console.note("the wheels are the same, byte for byte" if len(wheels) == 1 else f"{len(wheels)} different wheels")
    sys.exit(len(wheels) != 1)


if __name__ == "__main__":
    main()
