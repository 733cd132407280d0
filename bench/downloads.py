"""Fetch archives from a server that gives each connection so much and no more, one after another and a few at once.

The server is on loopback, so that the figures are those of the pipeline and not of a line; real servers and the paths
to them bound a connection in the same way. Both sides fetch the same bytes into an empty store, in processes of their
own, in turn: eight archives of one size, and five with the sizes of NVIDIA's in recipes/cuda.toml.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.sources.fetch import AT_ONCE, Artifact, Store
from voltforge.sources.index import Indexes
from voltforge.sources.recipe import load_cuda
from voltforge.system import console, files
from voltforge.system.process import run

BLOCK = 1 << 16


def archive(size, seed):
    """About that many bytes of a .tar.gz, of which half compress well, as compilers and headers do."""
    source = random.Random(seed)
    content = b"".join(source.randbytes(BLOCK) + bytes(BLOCK) for _ in range(max(1, size // BLOCK)))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as packed:
        entry = tarfile.TarInfo(f"archive-{seed}/data")
        entry.size = len(content)
        packed.addfile(entry, io.BytesIO(content))
    return made.getvalue()


@contextlib.contextmanager
def serving(contents, rate):
    """A server of files by name that sends ``rate`` bytes a second on each connection; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            data = contents[self.path.strip("/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            start = time.monotonic()
            for at in range(0, len(data), BLOCK):
                self.wfile.write(data[at : at + BLOCK])
                time.sleep(max(0.0, start + (at + BLOCK) / rate - time.monotonic()))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def fetch(folder, at_once, unpack):
    """Fetch what ``wanted.json`` in the folder names, and print the seconds that it took."""
    wanted = [Artifact(**artifact) for artifact in json.loads((folder / "wanted.json").read_text())]
    store = Store(folder / "store", ask_indexes=lambda: Indexes(None), ask_archives=lambda: (), at_once=at_once)
    start = time.monotonic()
    arriving = store.arriving(wanted) if at_once > 1 else zip(wanted, store.get_all(wanted), strict=True)
    for artifact, path in arriving:
        if unpack:
            (folder / "unpacked" / artifact.file).mkdir(parents=True)
            unpack(path, folder / "unpacked" / artifact.file)
    print(time.monotonic() - start)


def measured(wanted, at_once, unpack):
    """Seconds and the largest memory of a process that fetches all that is wanted."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        files.write_json(Path(scratch, "wanted.json"), wanted)
        words = [sys.executable, __file__, "--child", scratch, "--at-once", str(at_once)]
        done = run([*words, *(["--unpack"] if unpack else [])])
    return float(done.output.split()[-1]), done.usage.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=8.0, help="MB a second on each connection (default: 8)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--unpack", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        fetch(words.child, words.at_once, words.unpack)
        return
    (ROOT / "build").mkdir(exist_ok=True)
    sizes = {
        "eight of 8 MB": [8_000_000] * 8,
        "NVIDIA's five": [archive.size for archive in load_cuda(ROOT / "recipes" / "cuda.toml").redist.archives],
    }
    rows = []
    for name, each in sizes.items():
        contents = {f"{number}.tar.gz": archive(size, number) for number, size in enumerate(each)}
        with serving(contents, words.rate * 1e6) as url:
            wanted = [
                {"file": file, "sha256": files.sha256_bytes(data), "size": len(data), "url": f"{url}/{file}"}
                for file, data in contents.items()
            ]
            for unpack in (False, True):
                (slow, before), (quick, after) = (measured(wanted, at_once, unpack) for at_once in (1, AT_ONCE))
                what = f"{name}, {files.size(sum(map(len, contents.values())))}" + (", and unpacked" if unpack else "")
                rows.append(
                    (
                        what,
                        f"{slow:.1f} s",
                        f"{quick:.1f} s",
                        f"{slow / quick:.1f}",
                        files.size(before),
                        files.size(after),
                    )
                )
    title = f"{words.rate:g} MB/s a connection"
    console.table(title, ("archives", "in turn", f"{AT_ONCE} at once", "ratio", "memory", f"memory, {AT_ONCE}"), rows)


if __name__ == "__main__":
    main()
