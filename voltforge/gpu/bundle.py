"""Make a single file that runs vLLM's kernels for 7.0 on any newer NVIDIA GPU and compares their results."""

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
"""The Python versions that a bundle has bindings of the CUDA driver for."""
MAX_SIZE = 60 * 10**6
"""Largest size of a bundle, in bytes."""
CODE = ("__init__.py", "gpu/__init__.py", "gpu/rows.py", "gpu/card.py", "gpu/check.py", "gpu/worker.py", "gpu/run.py")
"""The modules of volta/ in a bundle."""
MAKERS = ("parallel.py", "pretended_gpu.py", "reference.py", "gpu_rows", "numerics")
"""The modules and packages of volta/ that decide what rows a bundle has."""
LEFT_OUT = (".pyx", ".pyx.in", ".pxd", ".pxd.in", ".pxi", ".pyi", "RECORD", "INSTALLER", "REQUESTED", "uv_cache.json")
"""Suffixes of files in the bindings that no run needs, or that differ from machine to machine."""
MAIN = """\
#!/usr/bin/env python3
import sys


def stop(requirement):
    print("x this bundle needs " + requirement, file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 10):
    stop("Python 3.10 or newer, and this is " + sys.version.split()[0])
try:
    import numpy
except ImportError:
    stop("numpy: pip install numpy")

from volta.gpu.run import main

sys.exit(main(path=sys.path[0]))
"""
WRONG_ROW, NO_GPU = 1, 5
"""Exit statuses of a bundle: a result is wrong; no GPU can be used."""
ROW_TIMEOUT, MODELS_TIMEOUT = 60.0, 4 * 3600.0
"""Seconds for one row, and for all small models."""


class NoGpuError(VoltforgeError):
    """This machine has no GPU that can be used."""

    exit_status = NO_GPU


class GpuError(VoltforgeError):
    """A row has a wrong result."""


@dataclass(frozen=True)
class GpuBundle:
    """The result of the stage."""

    path: CheckoutPath
    sha256: str
    rows: int
    """Comparisons that the bundle makes."""
    launches: int
    """Kernel launches of all rows."""


def bundle(pipeline: Pipeline) -> Stage[GpuBundle]:
    """Return the stage that makes the bundle from the wheelhouse's vLLM."""

    def inputs() -> Values:
        folder = pipeline.root / "volta"
        modules = [*CODE, *(str(path.relative_to(folder)) for name in MAKERS for path in _modules(folder / name))]
        wheels = [wheel.path for wheel in pipeline.wheelhouse.wheels() if wheel.name == "vllm"]
        return {
            "wheel": [files.sha256(path) for path in wheels],
            "code": {name: files.sha256(folder / name) for name in modules},
            "makers": [files.sha256(Path(path)) for path in (__file__, str(cuda_kernels.__file__))],
            "lock": files.sha256(_lock(pipeline)),
            "runtime": files.sha256(pipeline.root / "recipes" / "locks" / "vllm-runtime.txt"),
        }

    return pipeline.stage(
        "gpu-bundle", GpuBundle, inputs, lambda _: _make(pipeline), lambda result: files.sha256(result.path)
    )


def verify(pipeline: Pipeline) -> None:
    """Run the bundle on this machine's GPU and print its table. On a GPU of 7.0 also run a small model.

    Raises:
        NoGpuError: this machine has no GPU that can be used.
        GpuError: a row has a wrong result.
        NotRun: there is no bundle.
    """
    result = bundle(pipeline).result()
    verdicts = pipeline.scratch / "gpu" / "verdicts.json"
    verdicts.unlink(missing_ok=True)
    console.step("run the kernels for 7.0 on this machine's GPU")
    command: list[str | Path] = [sys.executable, result.path, "--json", verdicts]
    _run_checks(command, result.rows * ROW_TIMEOUT + MODELS_TIMEOUT, "a kernel has a wrong result")
    if tuple(json.loads(verdicts.read_text())["card"]["capability"]) == (7, 0):
        console.step("run a small model with the wheel")
        with triton_kernels.installed_vllm(pipeline) as installed:
            options = {"cwd": pipeline.root, "env": triton_kernels.variables(pipeline)}
            model: list[str | Path] = [installed.python, "-m", "volta.small_model"]
            _run_checks(model, MODELS_TIMEOUT, "a small model has a wrong result", **options)


def _run_checks(command: Sequence[str | Path], timeout: float, wrong: str, **options: Any) -> None:
    """Run a program that prints a table, and raise its error; ``wrong`` is the message for wrong rows."""
    try:
        run(command, watch=_print, timeout=timeout, **options)
    except ProgramFailed as error:
        errors = [line.removeprefix("x ") for line in error.output.splitlines() if line.startswith("x ")]
        if error.status == NO_GPU:
            hint = "copy the file that ./doit gpu-bundle makes to a machine with a GPU, and run it there"
            raise NoGpuError(errors[-1] if errors else error.output.strip(), hint=hint) from error
        if error.status == WRONG_ROW and not errors:
            raise GpuError(wrong, hint="see the rows above") from error
        raise GpuError(errors[-1] if errors else error.what, hint="./doit doctor; nvidia-smi") from error


def _print(line: str, _: object) -> None:
    if line and not line.startswith("x "):  # such a line becomes the error
        console.note(line)


def _modules(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def _lock(pipeline: Pipeline) -> Path:
    return pipeline.root / "recipes" / "locks" / "gpu-runner.txt"


def _make(pipeline: Pipeline) -> GpuBundle:
    from volta.gpu import rows  # a checkout may lack volta/: only this stage needs it
    from volta.gpu_rows import cuda_kernels as cuda_rows

    wheel = triton_kernels.vllm_wheel(pipeline)
    path = pipeline.scratch / "gpu" / f"voltforge-gpu-{wheel.version.public}-sm70.pyz"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stage in pipeline.package(pipeline.recipes["vllm"]).stages.values():
        stage.required()  # a current wheel makes most stages unnecessary, but their results are needed
        if stage.name.startswith("build:"):
            break
    images = cuda_kernels.images(pipeline)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        triton = rows.Bundle.open(_record_triton(pipeline, Path(scratch) / "triton.zip"))
        all_rows = [*(triton.row(number) for number in range(len(triton.listed))), *cuda_rows.rows(images)]
        with files.replacing(path) as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name, data in _program(pipeline, Path(scratch)):
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
                rows.write(all_rows, archive)
            if (size := file.tell()) > MAX_SIZE:
                raise VoltforgeError(
                    f"the bundle has {files.size(size)}, and the limit is {files.size(MAX_SIZE)}",
                    hint="make LARGER in volta/gpu_rows/record_triton.py smaller",
                )
    path.chmod(0o755)
    launches = sum(len(row.launches) for row in all_rows)
    console.note(f"{path.relative_to(pipeline.root)}, {files.size(size)}: {len(all_rows)} rows, {launches} launches")
    console.note(f"run it on a machine with an NVIDIA GPU, Python and numpy: python3 {path.name}")
    return GpuBundle(path, files.sha256(path), len(all_rows), launches)


def _record_triton(pipeline: Pipeline, path: Path) -> Path:
    """Write the launches of vLLM's Triton kernels, with inputs and expected results, to ``path``."""
    with triton_kernels.installed_vllm(pipeline) as installed, console.progress("kernels") as show:
        console.step("record the Triton kernels that vLLM launches on 7.0")
        program = "-m", "volta.gpu_rows.record_triton", path, "--jobs", triton_kernels.job_count(pipeline)
        triton_kernels.run_python(pipeline, installed, *program, watch=lambda line, _: show(line) if line else None)
    return path


def _program(pipeline: Pipeline, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a bundle besides its rows: name and content."""
    yield "__main__.py", MAIN.encode()
    for name in CODE:
        yield f"volta/{name}", (pipeline.root / "volta" / name).read_bytes()
    store = pipeline.store
    for python in PYTHONS:
        tag = f"cp{python.replace('.', '')}"
        folder = scratch / tag
        environment.install_into(_lock(pipeline), folder, store.indexes, offline=store.offline, python=python)
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(LEFT_OUT)):
            if "__pycache__" not in path.parts:
                yield f"site/{tag}/{path.relative_to(folder)}", path.read_bytes()
