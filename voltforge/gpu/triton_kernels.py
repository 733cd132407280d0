"""vLLM's Triton kernels: held to the limits of a Volta, and compiled ahead of time; both without a GPU."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voltforge.binary.elf import system_libraries
from voltforge.compile.jobs import count
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Values
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.checks import DRIVER
from voltforge.wheel.wheelfile import Wheel

PATIENCE = 3600.0
"""Seconds that compiling all of them may take; it was 200 of one core."""

MEMORY = 1 << 30
"""Bytes for one process that compiles."""
BROKEN = 3
"""The status with which volta.triton_kernels.measure says that a kernel is broken."""
PRECOMPILE = (
    "parallel.py",
    "pretended_gpu.py",
    *(
        f"triton_kernels/{name}.py"
        for name in ("attention", "awq", "case", "experts", "model_shapes", "precompile", "rotary")
    ),
)
"""The modules of volta/ that decide what is compiled ahead."""


class KernelError(VoltforgeError):
    """A kernel that does not compile, or takes more than a Volta has."""


def verify(pipeline: Pipeline) -> None:
    """Compile every Triton kernel that the wheel's vLLM reaches on 7.0, and print what each takes of it.

    ``build/triton.json`` has a row for each kernel of each case.

    Raises:
        KernelError: one does not compile, or is over a limit; the compiler's own line is named.
        VoltforgeError: there is no wheel.
    """
    from volta.triton_kernels import tables  # which a checkout without volta/ can do without until it is asked for this

    with installed(pipeline) as settled:
        console.step("compile Triton's kernels for 7.0")
        with console.progress("kernels") as tell:
            rows = compiled(pipeline, settled, tell=tell)
    console.table("Triton kernels on 7.0", tables.HEADINGS, tables.summary(rows))
    files.write_json(pipeline.root / "build" / "triton.json", rows)
    report(rows)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say how much was compiled.

    Raises:
        KernelError: a row has a problem.
    """
    console.note(f"{len({row['case'] for row in rows})} cases, {sum(row['seconds'] for row in rows):.0f} s")
    if problems := [row["problem"] for row in rows if row["problem"]]:
        raise KernelError(
            "\n".join(problems[:20]),
            hint="volta/triton_kernels/measure.py has the limits, volta/triton_kernels/matrix.py the cases",
        )


def compiled(
    pipeline: Pipeline,
    settled: Environment,
    *words: str,
    program: Sequence[str | Path] = ("-m", "volta.triton_kernels.measure"),
    tell: Any = lambda _: None,
) -> list[dict[str, Any]]:
    """What ``python -m volta.triton_kernels.measure`` prints in an environment where vLLM is installed."""
    rows: list[dict[str, Any]] = []

    def watch(line: str, _: object) -> None:
        if line.startswith("{"):
            rows.append(json.loads(line))
            tell(rows[-1]["case"])

    many = "--jobs", jobs(pipeline)
    asked(pipeline, settled, *program, *many, *words, watch=watch, ok=(0, BROKEN))
    if not rows:
        raise KernelError("no case was compiled")
    return rows


def inputs(pipeline: Pipeline) -> Values:
    """What decides which kernels are compiled ahead, and their bytes, beside the environment that they are for."""
    try:
        compiler = run([os.environ.get("CC") or "gcc", "--version"]).output.splitlines()[0]
    except ProgramFailed:
        compiler = ""
    sources = {name: files.sha256(pipeline.root / "volta" / name) for name in PRECOMPILE}
    return {"sources": sources, "compiler": compiler}


def warm(pipeline: Pipeline, settled: Environment, packages: Path, cache: Path, place: Path, tell: Any) -> str:
    """Fill a Triton cache with the kernels of common models; it will lie at ``place``. Gives its size in words.

    ``packages`` is the site-packages of what they are for: Triton's own files, stripped or not, are in every key.
    """

    def watch(line: str, _: object) -> None:
        if line:  # else only time went by
            tell(line)

    words: list[str | Path] = [
        "-S",
        "-m",
        "volta.triton_kernels.precompile",
        "--cache",
        cache,
        "--at",
        place,
        "--progress",
    ]
    words += ["--jobs", jobs(pipeline)]
    return asked(pipeline, settled, *words, packages=packages, watch=watch).strip().splitlines()[-1]


def jobs(pipeline: Pipeline) -> str:
    """How many kernels to compile at once."""
    return str(count(pipeline.settings.jobs, MEMORY)[0])


def asked(
    pipeline: Pipeline, settled: Environment, *words: str | Path, packages: Path | None = None, **options: Any
) -> str:
    """Run an environment's Python, with volta to be imported; gives what it printed.

    Raises:
        KernelError: it failed.
    """
    try:
        handed = surroundings(pipeline, packages)
        # -m looks in the current folder first, and its volta must be this checkout's.
        return run([settled.python, *words], cwd=pipeline.root, env=handed, timeout=PATIENCE, **options).output
    except ProgramFailed as error:
        said = [line for line in error.output.splitlines() if line.strip()]
        told = next((line for line in reversed(said) if not line.startswith(" ")), error.what)
        raise KernelError(told) from error


def surroundings(pipeline: Pipeline, packages: Path | None = None) -> dict[str, str]:
    """The variables with which a Python imports vLLM and volta on a machine without a GPU.

    ``packages`` is looked in before all others.
    """
    dropped = "TRITON_", "VLLM_", "PYTHON", "LD_LIBRARY_PATH"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join(str(one) for one in (packages, pipeline.root) if one)
    variables |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if DRIVER not in system_libraries():
        variables["LD_LIBRARY_PATH"] = str(pipeline.driver_stub.required().path)
    return variables


def kept(pipeline: Pipeline) -> Wheel:
    """The wheelhouse's vLLM.

    Raises:
        VoltforgeError: there is none.
    """
    found = [one for one in pipeline.wheelhouse.wheels() if one.name == "vllm"]
    if not found:
        raise VoltforgeError("the wheelhouse has no vllm", hint="./doit wheels:vllm")
    return found[0]


@contextlib.contextmanager
def installed(pipeline: Pipeline) -> Iterator[Environment]:
    """An environment of the runtime's lock with the wheelhouse's vLLM, for as long as it is needed.

    Raises:
        VoltforgeError: there is no wheel of vLLM.
    """
    found = kept(pipeline)
    recipe = pipeline.recipes["vllm"]
    settled = pipeline.environment(recipe.beside(recipe.expect.lock), "vllm-kernels-verify")
    try:
        environment.install_wheel(settled, found.path)
        yield settled
    finally:
        files.remove(settled.path)
