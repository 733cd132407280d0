"""Small checkouts with one small CUDA package, for tests that build."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files

ROOT = Path(__file__).resolve().parents[2]
"""The checkout under test."""
PACKAGES = ROOT / "tests" / "packages"


def doit(*words: str) -> str:
    """Run ./doit in the checkout under test, as a user would, and return its output."""
    done = subprocess.run(["./doit", *words], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


SAXPY = """\
name = "saxpy"
version = "1.0"
arch = ["7.0"]

[source]
index = "saxpy"
file = "saxpy-1.0.tar.gz"
sha256 = "{sha256}"

[build]
lock = "locks/saxpy.txt"
memory_per_job = "500 MiB"
env = {{ TORCH_CUDA_ARCH_LIST = "{{arch}}" }}

[finish.runpath]
"saxpy/*.so" = ["$ORIGIN/../nvidia/cuda_runtime/lib"]

[expect]
lock = "locks/saxpy.txt"
extensions = ["saxpy/_C.abi3.so"]
imports = ["saxpy._C"]
max_size = "100 kB"
"""


def small_checkout(root: Path, settings: Settings | None = None) -> Pipeline:
    """Make a new checkout at ``root`` for the saxpy package, with the toolchain of the checkout under test."""
    locks, downloads = root / "recipes" / "locks", root / "build" / "downloads"
    for folder in (locks, downloads):
        folder.mkdir(parents=True)
    for lock in ("cuda-12.4.txt", "cuda-12.8.txt", "driver.txt"):
        shutil.copy(ROOT / "recipes" / "locks" / lock, locks)
    shutil.copy(ROOT / "recipes" / "cuda.toml", root / "recipes")
    shutil.copy(PACKAGES / "saxpy-build.txt", locks / "saxpy.txt")
    (root / "build" / "stages").mkdir()
    for name in ("toolchains", "driver-stub"):
        (root / "build" / name).symlink_to(ROOT / "build" / name)
    for name in ("toolchain.json", "driver-stub.json"):
        os.link(ROOT / "build" / "stages" / name, root / "build" / "stages" / name)
    sdist = pack(PACKAGES / "saxpy", downloads / "saxpy-1.0.tar.gz")
    (root / "recipes" / "saxpy.toml").write_text(SAXPY.format(sha256=files.sha256(sdist)))
    return Pipeline.load(root, settings or Settings())


def pack(folder: Path, sdist: Path) -> Path:
    """Make an sdist of ``folder``, always with the same bytes."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 1_700_000_000, 0, 0, "", ""
        return member

    with tarfile.open(sdist, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.add(path, f"{folder.name}-1.0/{path.relative_to(folder)}", filter=plain)
    return sdist


def edited(pipeline: Pipeline, file: str, old: str, new: str) -> Pipeline:
    """Change one file of the package's source and return the reloaded checkout."""
    source = pipeline.root / "saxpy"
    if not source.exists():
        files.remove(pipeline.scratch / "downloads")
        shutil.copytree(PACKAGES / "saxpy", source)
    text = (source / file).read_text()
    assert old in text
    (source / file).write_text(text.replace(old, new))
    (pipeline.scratch / "downloads").mkdir(exist_ok=True)
    sdist = pack(source, pipeline.scratch / "downloads" / "saxpy-1.0.tar.gz")
    recipe = pipeline.root / "recipes" / "saxpy.toml"
    before = pipeline.recipes["saxpy"].source.sha256
    recipe.write_text(recipe.read_text().replace(before, files.sha256(sdist)))
    return Pipeline.load(pipeline.root, pipeline.settings)
