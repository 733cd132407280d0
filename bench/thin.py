"""Thin the stock torch wheel, and weigh what an installed environment holds: stock torch and vLLM against ours.

The thinning runs in a process of its own, whose time and memory are measured. The weights are the uncompressed sizes
that the wheels' own directories give (the end of a zip file, read from the package index by range): what an installer
writes. Ours is the lock of vLLM's runtime with the thin torch, and the vLLM wheel of the wheelhouse.
"""

import argparse
import contextlib
import io
import sys
import zipfile
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from pypi_simple import PyPISimple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment, index
from voltforge.sources.recipe import load
from voltforge.system import console, files
from voltforge.system.process import run

STOCK = ("torch==2.9.0", "vllm==0.12.0")
RECIPE = ROOT / "recipes" / "torch-thin.toml"
RUNTIME = ROOT / "recipes" / "locks" / "vllm-runtime.txt"
NOT_FROM_SOURCE = ("nvidia-cudnn-cu12", "nvidia-cufile-cu12", "nvidia-nvtx-cu12")
"""What a torch from source does not require with cudnn=0, and the thin one does."""
SHOWN = 24
"""Packages with a line of their own; the others share one."""
END = 200_000
"""Bytes at the end of a wheel that are asked for at first: most directories are shorter."""


class Remote(io.RawIOBase):
    """A file on a server, read by range, so that zipfile can read its directory."""

    def __init__(self, url, session):
        self.url, self.session, self.at = url, session, 0
        head = session.get(url, headers={"Range": f"bytes=-{END}"})
        head.raise_for_status()
        self.tail = head.content
        self.size = int(head.headers["Content-Range"].rpartition("/")[2]) if head.status_code == 206 else len(self.tail)

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        end = min(self.at + len(buffer), self.size)
        if self.at >= end:
            return 0
        known = self.size - len(self.tail)
        if self.at < known:
            answer = self.session.get(self.url, headers={"Range": f"bytes={self.at}-{self.size - 1}"})
            answer.raise_for_status()
            self.tail, known = answer.content, self.size - len(answer.content)
        buffer[: end - self.at] = self.tail[self.at - known : end - known]
        count, self.at = end - self.at, end
        return count


class Weights:
    """The installed sizes of projects' wheels."""

    def __init__(self):
        self.indexes = index.configured()
        self.session = self.indexes.session()
        self.order = {tag: number for number, tag in enumerate(sys_tags())}

    @cache  # noqa: B019 - one object, for as long as the program runs
    def of(self, project, version):
        """The bytes that the wheel of a project unpacks to here, or None where it has none for this machine."""
        found = []
        for place in self.indexes.places:
            with contextlib.suppress(*index.UNREADABLE):
                if "://" not in place or place.startswith("file:"):
                    continue
                for package in PyPISimple(place, session=self.session).get_project_page(project).packages:
                    with contextlib.suppress(InvalidWheelFilename):
                        name, release, _, tags = parse_wheel_filename(package.filename)
                        ranks = [self.order[tag] for tag in tags if tag in self.order]
                        if ranks and (name, str(release)) == (project, version):
                            found.append((min(ranks), package.url))
        return weight(Remote(min(found)[1], self.session)) if found else None


def weight(file):
    """The bytes that a wheel unpacks to."""
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def pins(text):
    """Project and version of each pin that holds here."""
    for line in text.splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            wanted = Requirement(line.removesuffix("\\"))
            if wanted.marker is None or wanted.marker.evaluate():
                yield canonicalize_name(wanted.name), next(iter(wanted.specifier)).version


def resolved(requirements, folder):
    """What uv would install for these requirements, as pins."""
    wanted = folder / "stock.in"
    files.write(wanted, "\n".join(requirements) + "\n")
    indexes = index.configured()
    words = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    words += [
        "--no-emit-index-url",
        "--no-emit-find-links",
        *indexes.uv_arguments(),
        wanted,
        "-o",
        folder / "stock.txt",
    ]
    environment.run_uv(wanted, words, indexes)
    return dict(pins((folder / "stock.txt").read_text()))


def thinned(wheel, out):
    """The thin wheel, and what making it used."""
    program = (
        "import sys, pathlib; from voltforge.wheel.thin import thin_wheel; from voltforge.sources.recipe import load; "
    )
    program += "recipe = load(pathlib.Path(sys.argv[1])); "
    program += "thin_wheel(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), recipe.arch, special=recipe.thin)"
    done = run([sys.executable, "-c", program, RECIPE, wheel, out], cwd=ROOT)
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime), done.usage


def largest(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {Path(entry.filename).name: entry.file_size for entry in archive.infolist() if ".so" in entry.filename}


def show_thin(stock, thin, usage):
    before, after = largest(stock), largest(thin)
    rows = [("wheel", files.size(stock.stat().st_size), files.size(thin.stat().st_size))]
    rows += [
        (name, files.size(size), files.size(after.get(name, 0)))
        for name, size in sorted(before.items(), key=lambda item: -item[1])[:5]
    ]
    rows += [
        ("unpacked", files.size(weight(stock)), files.size(weight(thin))),
        ("wall time", "", f"{usage.wall:.0f} s"),
        ("CPU time", "", f"{usage.cpu:.0f} s"),
        ("peak memory, all processes", "", files.size(usage.peak)),
        ("peak memory, one process", "", files.size(usage.peak_one)),
    ]
    console.table(thin.name, ("", "stock", "thin"), rows)


def show_weights(thin, folder):
    weights = Weights()
    vllm = next(iter(sorted((ROOT / "wheelhouse").glob("vllm-*.whl"))), None)
    left_out = {stub.requirement for stub in load(RECIPE).thin.stubs.values()}
    theirs = resolved(STOCK, folder)
    ours = {name: pin for name, pin in pins(RUNTIME.read_text()) if name not in left_out}
    ours["vllm"] = "none in the wheelhouse" if vllm is None else "ours"
    before = {name: weights.of(name, version) for name, version in theirs.items()}
    own = {"torch": weight(thin), "vllm": weight(vllm) if vllm else None}
    after = {name: own[name] if name in own else weights.of(name, version) for name, version in ours.items()}
    # Nobody has weighed a wheel from source here: it is taken to weigh what the thin one does.
    source = {name: size for name, size in after.items() if name not in NOT_FROM_SOURCE}
    if unknown := sorted({name for sizes in (before, after) for name, size in sizes.items() if size is None}):
        console.warn(f"not weighed, for want of a wheel: {', '.join(unknown)}")

    def total(sizes, names):
        return sum(sizes.get(name) or 0 for name in names)

    names = sorted({*before, *after}, key=lambda name: -max(before.get(name) or 0, after.get(name) or 0))
    columns = (before, after, source)
    rows = [(name, *(files.size(sizes[name] or 0) if name in sizes else "-" for sizes in columns))
            for name in names[:SHOWN]]  # fmt: skip
    others = names[SHOWN:]
    rows.append((f"{len(others)} others", *(files.size(total(sizes, others)) for sizes in columns)))
    rows.append(("all", *(files.size(total(sizes, names)) for sizes in columns)))
    console.table("installed", ("", "stock", "torch=thin", "torch=source cudnn=0, calculated"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-weights", action="store_true", help="leave out the table of installed packages")
    words = parser.parse_args()
    folder = ROOT / "build" / "bench" / "thin"
    pipeline = Pipeline.load(ROOT, Settings(torch="thin"))
    stock = pipeline.store.get(pipeline.package(pipeline.recipes["torch"]).maker.source.artifact)
    try:
        thin, usage = thinned(stock, folder)
        show_thin(stock, thin, usage)
        if not words.no_weights:
            show_weights(thin, folder)
    finally:
        files.remove(folder)


if __name__ == "__main__":
    main()
