"""Measure how PyTorch's stock wheel is thinned, and compare the installed sizes of the stock and the thin packages.

The wheel is thinned in a separate process, whose time and memory are measured. An installed size is the uncompressed
size in the directory of the wheel's zip file, which is read from the package index by a range request. "Stock" is what
uv resolves for stock PyTorch and vLLM. "Thin" is the runtime lock with the thin PyTorch and the wheelhouse's vLLM.
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
"""Packages that the thin PyTorch requires, and a PyTorch from source with cudnn=0 does not."""
SHOWN = 24
"""Packages with their own row; the rest is one row."""
END = 200_000
"""Bytes of the first range request: the directories of most wheels are shorter."""

PROGRAM = """
import sys
from pathlib import Path
from voltforge.sources.recipe import load
from voltforge.wheel.thin import thin_wheel
recipe, wheel, folder = map(Path, sys.argv[1:])
thin_wheel(wheel, folder, load(recipe).arch, settings=load(recipe).thin)
"""
"""Thins a wheel, in its own process."""


class RemoteFile(io.RawIOBase):
    """A file on a server, readable by zipfile through range requests."""

    def __init__(self, url, session):
        self.url, self.session, self.position = url, session, 0
        head = session.get(url, headers={"Range": f"bytes=-{END}"})
        head.raise_for_status()
        self.tail = head.content
        self.size = int(head.headers["Content-Range"].rpartition("/")[2]) if head.status_code == 206 else len(self.tail)

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer):
        end = min(self.position + len(buffer), self.size)
        if self.position >= end:
            return 0
        tail_start = self.size - len(self.tail)
        if self.position < tail_start:
            response = self.session.get(self.url, headers={"Range": f"bytes={self.position}-{self.size - 1}"})
            response.raise_for_status()
            self.tail, tail_start = response.content, self.size - len(response.content)
        buffer[: end - self.position] = self.tail[self.position - tail_start : end - tail_start]
        count, self.position = end - self.position, end
        return count


class InstalledSizes:
    """The installed sizes of projects, from their wheels on the package indexes."""

    def __init__(self):
        self.indexes = index.configured()
        self.session = self.indexes.session()
        self.order = {tag: number for number, tag in enumerate(sys_tags())}

    @cache  # noqa: B019 - the program has one object of this class
    def __call__(self, project, version):
        """Return the installed bytes of a project, or None if it has no wheel for this machine."""
        candidates = []
        for place in self.indexes.places:
            with contextlib.suppress(*index.UNREADABLE):
                if "://" not in place or place.startswith("file:"):
                    continue
                for package in PyPISimple(place, session=self.session).get_project_page(project).packages:
                    with contextlib.suppress(InvalidWheelFilename):
                        name, release, _, tags = parse_wheel_filename(package.filename)
                        ranks = [self.order[tag] for tag in tags if tag in self.order]
                        if ranks and (name, str(release)) == (project, version):
                            candidates.append((min(ranks), package.url))
        return unpacked_size(RemoteFile(min(candidates)[1], self.session)) if candidates else None


def unpacked_size(file):
    """Return the bytes of a wheel's files, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def pins(text):
    """Yield project and version of each pin whose marker is true here."""
    for line in text.splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            requirement = Requirement(line.removesuffix("\\"))
            if requirement.marker is None or requirement.marker.evaluate():
                yield canonicalize_name(requirement.name), next(iter(requirement.specifier)).version


def resolve(requirements, folder):
    """Return the versions that uv resolves for requirements, by project."""
    source, lock = folder / "stock.in", folder / "stock.txt"
    files.write(source, "\n".join(requirements) + "\n")
    indexes = index.configured()
    options = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    command = ["pip", "compile", *options, "--python", sys.executable, *indexes.uv_arguments(), source, "-o", lock]
    environment.run_uv(source, command, indexes)
    return dict(pins(lock.read_text()))


def thin_wheel(wheel, folder):
    """Thin a wheel in a new process. Return the thin wheel and the time and memory of the process."""
    done = run([sys.executable, "-c", PROGRAM, RECIPE, wheel, folder], cwd=ROOT)
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime), done.usage


def libraries(wheel):
    """Return the uncompressed sizes of a wheel's shared libraries, by file name."""
    with zipfile.ZipFile(wheel) as archive:
        return {Path(entry.filename).name: entry.file_size for entry in archive.infolist() if ".so" in entry.filename}


def show_thin(stock, thin, usage):
    """Print the sizes of both wheels, and the cost of the thinning."""
    before, after = libraries(stock), libraries(thin)
    rows = [("wheel", files.size(stock.stat().st_size), files.size(thin.stat().st_size))]
    rows += [
        (name, files.size(size), files.size(after.get(name, 0)))
        for name, size in sorted(before.items(), key=lambda item: -item[1])[:5]
    ]
    rows += [
        ("unpacked", files.size(unpacked_size(stock)), files.size(unpacked_size(thin))),
        ("wall time", "", f"{usage.wall:.0f} s"),
        ("CPU time", "", f"{usage.cpu:.0f} s"),
        ("peak memory, all processes", "", files.size(usage.peak)),
        ("peak memory, one process", "", files.size(usage.peak_one)),
    ]
    console.table(thin.name, ("", "stock", "thin"), rows)


def show_installed_sizes(thin, folder):
    """Print the installed size of each package: stock, thin, and computed for a PyTorch from source."""
    sizes_of = InstalledSizes()
    vllm = next(iter(sorted((ROOT / "wheelhouse").glob("vllm-*.whl"))), None)
    left_out = {stub.requirement for stub in load(RECIPE).thin.stubs.values()}
    stock_pins = resolve(STOCK, folder)
    thin_pins = {name: pin for name, pin in pins(RUNTIME.read_text()) if name not in left_out}
    thin_pins["vllm"] = "none in the wheelhouse" if vllm is None else "in the wheelhouse"
    before = {name: sizes_of(name, version) for name, version in stock_pins.items()}
    local = {"torch": unpacked_size(thin), "vllm": unpacked_size(vllm) if vllm else None}
    after = {name: local[name] if name in local else sizes_of(name, version) for name, version in thin_pins.items()}
    # No wheel from source is measured: its size is taken to be that of the thin wheel.
    source = {name: size for name, size in after.items() if name not in NOT_FROM_SOURCE}
    if unknown := sorted({name for sizes in (before, after) for name, size in sizes.items() if size is None}):
        console.warn(f"no wheel found, counted as 0 bytes: {', '.join(unknown)}")

    def total(sizes, names):
        return sum(sizes.get(name) or 0 for name in names)

    names = sorted({*before, *after}, key=lambda name: -max(before.get(name) or 0, after.get(name) or 0))
    columns = (before, after, source)
    rows = [(name, *(files.size(sizes[name] or 0) if name in sizes else "-" for sizes in columns))
            for name in names[:SHOWN]]  # fmt: skip
    rest = names[SHOWN:]
    rows.append((f"{len(rest)} others", *(files.size(total(sizes, rest)) for sizes in columns)))
    rows.append(("all", *(files.size(total(sizes, names)) for sizes in columns)))
    console.table("installed size", ("", "stock", "torch=thin", "torch=source cudnn=0, computed"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sizes", action="store_true", help="omit the table of installed sizes")
    options = parser.parse_args()
    folder = ROOT / "build" / "bench" / "thin"
    pipeline = Pipeline.load(ROOT, Settings(torch="thin"))
    stock = pipeline.store.get(pipeline.package(pipeline.recipes["torch"]).maker.source.artifact)
    try:
        thin, usage = thin_wheel(stock, folder)
        show_thin(stock, thin, usage)
        if not options.no_sizes:
            show_installed_sizes(thin, folder)
    finally:
        files.remove(folder)


if __name__ == "__main__":
    main()
