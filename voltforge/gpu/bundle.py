"""What a Volta would run, carried to whatever newer card is at hand: one file that launches, compares and tabulates."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltforge.errors import VoltforgeError
from voltforge.gpu import cuda_kernels, triton_kernels
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.system.records import CheckoutPath

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""For which a bundle brings the bindings of the driver."""
LARGEST = 60 * 10**6
"""Bytes of a bundle."""
CODE = ("__init__.py", "gpu/__init__.py", "gpu/rows.py", "gpu/card.py", "gpu/check.py", "gpu/worker.py", "gpu/run.py")
"""The modules of volta/ that travel."""
MAKERS = ("parallel.py", "pretended_gpu.py", "reference.py", "gpu_rows", "numerics")
"""The modules and packages of volta/ that decide what rows a bundle has."""
LEFT_OUT = (".pyx", ".pyx.in", ".pxd", ".pxd.in", ".pxi", ".pyi", "RECORD", "INSTALLER", "REQUESTED", "uv_cache.json")
"""What of the bindings no run needs, or differs from machine to machine."""
MAIN = """\
#!/usr/bin/env python3
import sys


def misused(why):
    print("x this bundle needs " + why, file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 10):
    misused("Python 3.10 or newer, and this is " + sys.version.split()[0])
try:
    import numpy
except ImportError:
    misused("numpy: pip install numpy")

from volta.gpu.run import main

sys.exit(main(path=sys.path[0]))
"""
WRONG, NO_GPU = 1, 5
"""Statuses of a bundle: a row is not right; no GPU can be used."""
ROW, MODELS = 60.0, 4 * 3600.0
"""Seconds after which the runner ends a row, and that all small models may take."""


class NoGpuError(VoltforgeError):
    """There is no GPU that can be used."""

    exit_status = NO_GPU


class GpuError(VoltforgeError):
    """A row that is not right."""


@dataclass(frozen=True)
class GpuBundle:
    """A file with kernels, inputs and references that runs on a machine with a card."""

    path: CheckoutPath
    sha256: str
    rows: int
    launches: int


def bundle(pipeline: Pipeline) -> Stage[GpuBundle]:
    """The stage that makes the bundle of the kept wheel's kernels; its result names the file."""

    def inputs() -> Values:
        folder = pipeline.root / "volta"
        made_of = [*CODE, *(str(path.relative_to(folder)) for name in MAKERS for path in _modules(folder / name))]
        found = [one.path for one in pipeline.wheelhouse.wheels() if one.name == "vllm"]
        return {
            "wheel": [files.sha256(one) for one in found],
            "code": {name: files.sha256(pipeline.root / "volta" / name) for name in made_of},
            "makers": [files.sha256(Path(one)) for one in (__file__, str(cuda_kernels.__file__))],
            "lock": files.sha256(_lock(pipeline)),
            "runtime": files.sha256(pipeline.root / "recipes" / "locks" / "vllm-runtime.txt"),
        }

    return pipeline.stage(
        "gpu-bundle", GpuBundle, inputs, lambda _: _make(pipeline), lambda made: files.sha256(made.path)
    )


def verify(pipeline: Pipeline) -> None:
    """Run the bundle on this machine's card and print its table; on a card of 7.0 also a small model, whole.

    Raises:
        NoGpuError: there is no card, or none that can be used.
        GpuError: a row is not right.
        NotRun: there is no bundle.
    """
    made = bundle(pipeline).result()
    told = pipeline.scratch / "gpu" / "verdicts.json"
    told.unlink(missing_ok=True)
    console.step("run the kernels of 7.0 on this machine's card")
    _answered([sys.executable, made.path, "--json", told], made.rows * ROW + MODELS, "not every row is right")
    if tuple(json.loads(told.read_text())["card"]["capability"]) == (7, 0):
        console.step("run a small model with the kept wheel")
        with triton_kernels.installed(pipeline) as settled:
            words: list[str | Path] = [settled.python, "-m", "volta.small_model"]
            around = {"cwd": pipeline.root, "env": triton_kernels.surroundings(pipeline)}
            _answered(words, MODELS, "a small model's answers are not right", **around)


def _answered(words: Sequence[str | Path], patience: float, wrong: str, **around: Any) -> None:
    try:
        run(words, watch=_print, timeout=patience, **around)
    except ProgramFailed as error:
        said = [line.removeprefix("x ") for line in error.output.splitlines() if line.startswith("x ")]
        if error.status == NO_GPU:
            hint = "carry the file that ./doit gpu-bundle makes to a machine with a card, and run it there"
            raise NoGpuError(said[-1] if said else error.output.strip(), hint=hint) from error
        if error.status == WRONG and not said:
            raise GpuError(wrong, hint="the rows above say which") from error
        raise GpuError(said[-1] if said else error.what, hint="./doit doctor; nvidia-smi") from error


def _print(line: str, _: object) -> None:
    if line and not line.startswith("x "):  # which becomes the error
        console.note(line)


def _modules(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def _lock(pipeline: Pipeline) -> Path:
    return pipeline.root / "recipes" / "locks" / "gpu-runner.txt"


def _make(pipeline: Pipeline) -> GpuBundle:
    # Imported here, because a checkout can lack volta/.
    from volta.gpu import rows
    from volta.gpu_rows import cuda_kernels as cuda_rows

    wheel = triton_kernels.kept(pipeline)
    path = pipeline.scratch / "gpu" / f"voltforge-gpu-{wheel.version.public}-sm70.pyz"
    for stage in pipeline.package(pipeline.recipes["vllm"]).stages.values():
        stage.required()  # a kept wheel makes most stages unnecessary, but their results are needed
        if stage.name.startswith("build:"):
            break
    images = cuda_kernels.images(pipeline)
    with tempfile.TemporaryDirectory(dir=_folder(path.parent)) as scratch:
        recorded = Path(scratch) / "triton.zip"
        with triton_kernels.installed(pipeline) as settled, console.progress("kernels") as tell:
            console.step("record what vLLM launches on 7.0")
            words: list[str | Path] = [
                "-m",
                "volta.gpu_rows.record_triton",
                recorded,
                "--jobs",
                triton_kernels.jobs(pipeline),
            ]
            triton_kernels.asked(pipeline, settled, *words, watch=lambda line, _: tell(line) if line else None)
        triton = rows.Bundle.open(recorded)
        everything = [*(triton.row(number) for number in range(len(triton.listed))), *cuda_rows.rows(images)]
        with files.replacing(path) as sink:
            sink.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name, data in _program(pipeline, Path(scratch)):
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
                rows.write(everything, archive)
            if (size := sink.tell()) > LARGEST:
                raise VoltforgeError(
                    f"the bundle has {files.size(size)}", hint="make LARGER in volta/gpu_rows/record_triton.py smaller"
                )
    path.chmod(0o755)
    launches = sum(len(row.launches) for row in everything)
    shown = path.relative_to(pipeline.root)
    console.note(f"{shown}, {files.size(size)}: {len(everything)} rows, {launches} launches")
    console.note(f"on a machine with an NVIDIA card, Python and numpy: python3 {path.name}")
    return GpuBundle(path, files.sha256(path), len(everything), launches)


def _program(pipeline: Pipeline, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a bundle besides its rows, by name."""
    yield "__main__.py", MAIN.encode()
    for name in CODE:
        yield f"volta/{name}", (pipeline.root / "volta" / name).read_bytes()
    for python in PYTHONS:
        tag = f"cp{python.replace('.', '')}"
        folder = scratch / tag
        environment.install_into(
            _lock(pipeline), folder, pipeline.store.indexes, offline=pipeline.store.offline, python=python
        )
        for path in sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.endswith(LEFT_OUT)):
            if "__pycache__" not in path.parts:
                yield f"site/{tag}/{path.relative_to(folder)}", path.read_bytes()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
