"""Compile vLLM's Triton kernels for compute capability 7.0 without a GPU, and check them against Volta's limits."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voltforge.binary.loader import system_libraries
from voltforge.compile.jobs import count
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Values
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.examined_wheel import DRIVER
from voltforge.wheel.wheelfile import Wheel

TIMEOUT = 3600.0
"""Seconds for all kernels; one core took 200."""
MEMORY_PER_JOB = 1 << 30
"""Bytes for one compiler process."""
BROKEN_KERNEL = 3
"""Exit status of volta.triton_kernels.measure if a kernel has a problem."""
PRECOMPILE = (
    "parallel.py",
    "pretended_gpu.py",
    *(
        f"triton_kernels/{name}.py"
        for name in ("attention", "awq", "case", "experts", "model_shapes", "precompile", "rotary")
    ),
)
"""The modules of volta/ that decide which kernels are precompiled for the image."""


class KernelError(VoltforgeError):
    """A kernel that does not compile, or exceeds a limit of Volta."""


def verify(pipeline: Pipeline) -> None:
    """Compile every Triton kernel that the wheel's vLLM uses on 7.0, and print the resources that each takes.

    ``build/triton.json`` gets a row for each kernel of each case.

    Raises:
        KernelError: a kernel does not compile, with the compiler's message, or exceeds a limit.
        VoltforgeError: the wheelhouse has no vLLM.
    """
    from volta.triton_kernels import tables  # a checkout may lack volta/: only this command needs it

    with installed_vllm(pipeline) as installed:
        console.step("compile Triton kernels for 7.0")
        with console.progress("kernels") as show:
            rows = compile_kernels(pipeline, installed, show=show)
    console.table("Triton kernels on 7.0", tables.HEADINGS, tables.summary(rows))
    files.write_json(pipeline.root / "build" / "triton.json", rows)
    check(rows)


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the number of cases and their time.

    Raises:
        KernelError: a row has a problem.
    """
    console.note(f"{len({row['case'] for row in rows})} cases, {sum(row['seconds'] for row in rows):.0f} s")
    if problems := [row["problem"] for row in rows if row["problem"]]:
        raise KernelError(
            "\n".join(problems[:20]),
            hint="volta/triton_kernels/measure.py has the limits, volta/triton_kernels/verified_cases.py the cases",
        )


def compile_kernels(
    pipeline: Pipeline,
    installed: Environment,
    *arguments: str,
    program: Sequence[str | Path] = ("-m", "volta.triton_kernels.measure"),
    show: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run ``python -m volta.triton_kernels.measure`` beside vLLM and return the rows that it prints.

    Args:
        pipeline: the checkout.
        installed: an environment with vLLM.
        arguments: options of the program.
        program: another program, for a test.
        show: gets the name of each case, for a progress display.
    """
    rows: list[dict[str, Any]] = []

    def watch(line: str, _: object) -> None:
        if line.startswith("{"):
            rows.append(json.loads(line))
            show(rows[-1]["case"])

    words = *program, "--jobs", job_count(pipeline), *arguments
    run_python(pipeline, installed, *words, watch=watch, ok=(0, BROKEN_KERNEL))
    if not rows:
        raise KernelError("no case was compiled")
    return rows


def precompile_inputs(pipeline: Pipeline) -> Values:
    """Return what decides the precompiled kernels besides the environment: the sources of volta/ and the C compiler."""
    try:
        compiler = run([os.environ.get("CC") or "gcc", "--version"]).output.splitlines()[0]
    except ProgramFailed:
        compiler = ""
    sources = {name: files.sha256(pipeline.root / "volta" / name) for name in PRECOMPILE}
    return {"sources": sources, "compiler": compiler}


def precompile(
    pipeline: Pipeline,
    installed: Environment,
    packages: Path,
    cache: Path,
    final_path: Path,
    show: Callable[[str], None],
) -> str:
    """Fill a Triton cache with the kernels of common models.

    Args:
        pipeline: the checkout.
        installed: an environment with vLLM.
        packages: the site-packages of the image. Triton's own files are part of every key of the cache.
        cache: the folder of the cache.
        final_path: the path of the cache in the image.
        show: gets lines of progress.

    Returns:
        The size of the cache, as words.
    """

    def watch(line: str, _: object) -> None:
        if line:  # an empty line only marks the time
            show(line)

    options: list[str | Path] = ["--cache", cache, "--at", final_path, "--progress", "--jobs", job_count(pipeline)]
    program = "-S", "-m", "volta.triton_kernels.precompile"
    output = run_python(pipeline, installed, *program, *options, packages=packages, watch=watch)
    return output.strip().splitlines()[-1]


def job_count(pipeline: Pipeline) -> str:
    """Return the number of kernels to compile at once."""
    return str(count(pipeline.settings.jobs, MEMORY_PER_JOB)[0])


def run_python(
    pipeline: Pipeline, installed: Environment, *arguments: str | Path, packages: Path | None = None, **options: Any
) -> str:
    """Run the Python of an environment, with volta importable, and return its output.

    Raises:
        KernelError: it failed; the message is the last line of its output that is not indented.
    """
    try:
        env = variables(pipeline, packages)
        # With -m, Python imports from the current folder first: volta must be that of this checkout.
        command = [installed.python, *arguments]
        return run(command, cwd=pipeline.root, env=env, timeout=TIMEOUT, **options).output
    except ProgramFailed as error:
        lines = [line for line in error.output.splitlines() if line.strip()]
        message = next((line for line in reversed(lines) if not line.startswith(" ")), error.what)
        raise KernelError(message) from error


def variables(pipeline: Pipeline, packages: Path | None = None) -> dict[str, str]:
    """Return the environment variables to import vLLM and volta on a machine without a GPU.

    Args:
        pipeline: the checkout.
        packages: a folder to import from before all others.
    """
    dropped = "TRITON_", "VLLM_", "PYTHON", "LD_LIBRARY_PATH"
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    python_path = os.pathsep.join(str(folder) for folder in (packages, pipeline.root) if folder)
    env |= {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if DRIVER not in system_libraries():
        env["LD_LIBRARY_PATH"] = str(pipeline.driver_stub.required().path)
    return env


def vllm_wheel(pipeline: Pipeline) -> Wheel:
    """Return vLLM's wheel in the wheelhouse.

    Raises:
        VoltforgeError: the wheelhouse has none.
    """
    wheels = [wheel for wheel in pipeline.wheelhouse.wheels() if wheel.name == "vllm"]
    if not wheels:
        raise VoltforgeError("the wheelhouse has no vllm", hint="./doit wheels:vllm")
    return wheels[0]


@contextlib.contextmanager
def installed_vllm(pipeline: Pipeline) -> Iterator[Environment]:
    """Yield a temporary environment with the runtime's lock and the wheelhouse's vLLM.

    Raises:
        VoltforgeError: the wheelhouse has no vLLM.
    """
    wheel = vllm_wheel(pipeline)
    recipe = pipeline.recipes["vllm"]
    installed = pipeline.environment(recipe.beside(recipe.expect.lock), "vllm-kernels-verify")
    try:
        environment.install_wheel(installed, wheel.path)
        yield installed
    finally:
        files.remove(installed.path)
