"""`./doit doctor`: list what this machine lacks for a build, with the commands that install it."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from voltforge.compile import jobs, object_cache, sandbox, toolchain
from voltforge.errors import VoltforgeError
from voltforge.image import container_engine
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import distro, index
from voltforge.sources.recipe import SourceRecipe
from voltforge.system import console
from voltforge.system.files import size
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel import signing

PYTHONS = ((3, 10), (3, 13))
"""The oldest and the newest Python with wheels of both vLLM 0.12.0 and PyTorch 2.9.0."""
DISK = 30 * 10**9
"""Bytes that a first build of vLLM may use: 9 GB of wheels in uv's cache, as much unpacked, trees, objects, spare."""
PATIENCE = 10
"""Seconds to wait for the answer of a host."""
MEMORY = 3 * 2**30
"""Bytes of memory that one compile job needs."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: str
    """``ok``, ``note`` (works without, or with less), or ``missing`` (a build will fail)."""
    detail: str
    hint: str = ""


def examine(pipeline: Pipeline) -> list[Check]:
    """Return all checks in the order of the report; they change nothing."""
    looks: tuple[Callable[[Pipeline], Iterator[Check]], ...] = (
        _python, _programs, _objects, _disk, _memory, _namespaces, _driver, _index, _upstream, _compiler, _engine, _key,
        _cache,
    )  # fmt: skip
    return [check for look in looks for check in look(pipeline)]


def report(pipeline: Pipeline) -> None:
    """Print the checks.

    Raises:
        VoltforgeError: something is missing that a build needs; the message lists all of it.
    """
    checks = examine(pipeline)
    marks = {"ok": "ok", "note": "note", "missing": "MISSING"}
    console.table(
        "",
        ("", "check", "result"),
        [(marks[c.state], c.name, c.detail + (f"\n-> {c.hint}" if c.hint else "")) for c in checks],
    )
    if missing := [check.name for check in checks if check.state == "missing"]:
        raise VoltforgeError(f"missing: {', '.join(missing)}", hint="run the commands in the lines above")


def _python(_: Pipeline) -> Iterator[Check]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    yield Check("Python", "ok" if good else "missing", version, "" if good else "use Python 3.10 to 3.13")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    hint = "" if header.is_file() else distro.install_command([name])
    yield Check("Python headers", "missing" if hint else "ok", str(header), hint)


def _programs(_: Pipeline) -> Iterator[Check]:
    needed = {
        "g++": "the C++ compiler",
        "ar": "unpacks Debian packages",
        "strip": "drops symbol tables",
        "patch": "applies the series",
    }
    packages = {"ar": "binutils", "strip": "binutils"}
    for program, why in needed.items():
        path = shutil.which(program)
        detail = path or f"not on PATH; it {why}" if program != "g++" else path or "not on PATH"
        if program == "g++" and path:
            detail = f"{path}, {_first_line([path, '--version'])}"
        yield Check(
            program,
            "ok" if path else "missing",
            detail,
            "" if path else distro.install_command([packages.get(program, program)]),
        )


def _objects(pipeline: Pipeline) -> Iterator[Check]:
    cache = object_cache.open_cache("", pipeline.scratch / "cache" / "ccache")
    detail = f"{cache.program}: what was compiled once is not compiled again" if cache else "not in /usr or /opt"
    hint = "" if cache else distro.install_command(["ccache"]) + ", for a second build in seconds"
    yield Check("ccache", "ok" if cache else "note", detail, hint)


def _disk(pipeline: Pipeline) -> Iterator[Check]:
    free = shutil.disk_usage(pipeline.root).free
    detail = f"{size(free)} free; a first build of vLLM takes up to {size(DISK)}"
    yield Check(
        "disk", "ok" if free >= DISK else "note", detail, "" if free >= DISK else "make room, or move the checkout"
    )


def _memory(pipeline: Pipeline) -> Iterator[Check]:
    memory = jobs.memory()
    if memory:
        state = "ok" if memory.free >= MEMORY else "note"
        yield Check("memory", state, f"{size(memory.free)} free of {size(memory.limit)}")
    else:
        yield Check("memory", "note", "the amount of memory is unknown", "jobs=N, or memory=6GiB")
    for recipe in pipeline.recipes.values():
        if not isinstance(recipe, SourceRecipe):
            continue
        count, why = jobs.count("", recipe.build.memory_per_job)
        yield Check(
            "jobs", "ok", f"{recipe.name}: {count} at once on {jobs.cores()} cores ({why}); jobs=N decides otherwise"
        )


def _namespaces(_: Pipeline) -> Iterator[Check]:
    available = sandbox.available()
    if available.hermetic:
        yield Check("sandbox", "ok", "bubblewrap: builds see only their declared inputs, and no network")
        return
    details = {
        "no network": "builds have no network, but can read the whole machine",
        "none": "builds can read the whole machine and use the network",
    }
    hint = "" if shutil.which("bwrap") else distro.install_command(["bubblewrap"])
    yield Check(
        "sandbox",
        "note",
        details[available.kind],
        hint or "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1",
    )


def _driver(_: Pipeline) -> Iterator[Check]:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield Check("NVIDIA driver", "note", "not installed: wheels can be built and checked, not run")
        return
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    for line in _first_line(query, lines=16).splitlines() or [
        "libcuda.so.1 is installed, but nvidia-smi prints nothing"
    ]:
        yield Check("NVIDIA driver", "ok", line)


def _index(pipeline: Pipeline) -> Iterator[Check]:
    if pipeline.store.offline:
        yield Check("package index", "note", "not used: VOLTFORGE_OFFLINE is set")
        return
    for recipe in pipeline.recipes.values():
        source = pipeline.package(recipe).maker.source
        if source.index:
            try:
                pipeline.store.indexes.find(source.index, source.file)
                yield Check("package index", "ok", f"has {source.file}")
            except VoltforgeError as error:
                yield Check("package index", "missing", error.what, error.hint)


def _upstream(pipeline: Pipeline) -> Iterator[Check]:
    for source in (pipeline.package(recipe).maker.source for recipe in pipeline.recipes.values()):
        if not source.url:
            continue
        if pipeline.store.holds(source.artifact):
            yield Check("upstream", "ok", f"{source.file} is here")
            continue
        absent = f"{source.file} is not here"
        if pipeline.store.offline:
            yield Check("upstream", "note", f"{absent}; VOLTFORGE_OFFLINE is set: no host is asked", source.otherwise)
            continue
        try:
            requests.head(source.url, timeout=PATIENCE, allow_redirects=True).raise_for_status()
            yield Check("upstream", "ok", f"has {source.file}")
        except requests.RequestException as error:
            why = index.explained(error, pipeline.store.indexes)
            yield Check("upstream", "note", f"{absent}, and {urlsplit(source.url).hostname}: {why}", source.otherwise)


def _compiler(pipeline: Pipeline) -> Iterator[Check]:
    passed = []
    for home in toolchain.candidates(os.environ):
        if reason := toolchain.unsuitable(pipeline.cuda, home):
            passed.append(reason)
            continue
        yield Check("CUDA compiler", "ok", f"{home}, CUDA {toolchain.nvcc_version(home)}")
        return
    record = pipeline.toolchain.record()
    if record:
        yield Check(
            "CUDA compiler",
            "ok",
            f"CUDA {record.result.version} ({record.result.origin}), from an earlier run",
        )
        return
    mirrors = distro.mirrors()
    detail = "; ".join([*passed, "one will be fetched: NVIDIA's archives, or the distribution's package"])
    state, hint = (
        ("ok", "") if mirrors else ("note", "without NVIDIA's download site: set CUDA_HOME, or VOLTFORGE_MIRRORS")
    )
    yield Check("CUDA compiler", state, detail, hint)


def _engine(_: Pipeline) -> Iterator[Check]:
    try:
        yield Check("image engine", "ok", str(container_engine.choose()))
    except VoltforgeError as error:
        yield Check("image engine", "note", f"{error.what}; wheels need none", error.hint)


def _key(_: Pipeline) -> Iterator[Check]:
    try:
        signer, trust = signing.configured_keys(os.environ)
    except VoltforgeError as error:
        yield Check("signing key", "missing", error.what, error.hint)
        return
    others = len(trust.keys) - bool(signer)
    trusted = f"{others} other keys are trusted" if others else "no other key is trusted"
    if signer:
        yield Check("signing key", "ok", f"{signer.keyid[:16]}…; {trusted}")
    else:
        yield Check("signing key", "note", f"none: wheels are not signed; {trusted}", "./doit key makes one")


def _cache(pipeline: Pipeline) -> Iterator[Check]:
    try:
        if pipeline.cache:
            yield Check("shared cache", "ok", str(pipeline.cache))
    except VoltforgeError as error:
        yield Check("shared cache", "missing", error.what, error.hint)


def _first_line(argv: list[str], lines: int = 1) -> str:
    try:
        return "\n".join(run(argv, timeout=20).output.splitlines()[:lines])
    except ProgramFailed:
        return ""
