"""What a person asks for beside the wheels: the tests, new locks, the checks of any wheel, a table of contents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

from voltforge.commands import gc
from voltforge.compile import object_cache
from voltforge.compile.farm import RENEW_SECONDS, Farm
from voltforge.errors import VoltforgeError
from voltforge.image.stages import Runtime
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import shown
from voltforge.sources import environment
from voltforge.system import console
from voltforge.system.files import size
from voltforge.wheel import checks, signing, thin, wheelfile
from voltforge.wheel.wheelhouse import PROVENANCE

PYTEST = ["pytest", "-n", "2"]
"""Two workers: while one waits for vLLM's wheel and tries that, the other has all the rest."""


def verify_wheels(pipeline: Pipeline) -> None:
    """Print what the checks find in the wheel that ``file=`` names, or in the whole wheelhouse.

    Raises:
        VoltforgeError: a check fails, or there is no wheel.
    """
    named = pipeline.settings.file
    paths = [Path(named)] if named else [one.path for one in pipeline.wheelhouse.wheels()]
    if not paths:
        raise VoltforgeError("the wheelhouse is empty", hint="./doit wheels, or ./doit verify file=PATH.whl")
    broken: list[str] = []
    for path in paths:
        console.step(f"verify {path.name}")
        findings = pipeline.examined(path)
        findings += [] if named else checks.kept(pipeline.wheelhouse, path, pipeline.trust)
        checks.report(findings)
        if failures := checks.failed(findings):
            broken.append(f"{path.name} fails {len(failures)} checks")
    if strangers := [] if named else pipeline.wheelhouse.strangers():
        console.step("verify the index and the receipts")
        checks.report(checks.Finding("wheelhouse", "fail", sentence) for sentence in strangers)
        broken.append(f"the wheelhouse fails {len(strangers)} checks")
    if broken:
        raise VoltforgeError("; ".join(broken), hint="the tables above name each")


def thin_wheel(pipeline: Pipeline) -> None:
    """Make a wheel of the one that ``file=`` names, in build/thin/, with no device code but that of ``arch=``.

    Raises:
        VoltforgeError: there is no such wheel, or something in it is not understood.
    """
    path, archs = Path(pipeline.settings.file), pipeline.settings.arch.replace(",", ";").split(";")
    if not path.is_file():
        what = f"there is no {path}" if pipeline.settings.file else "no wheel is named"
        raise VoltforgeError(what, hint="./doit thin file=PATH.whl arch=7.0")
    console.step(f"thin {path.name} to {', '.join(archs)}")
    made = thin.thin_wheel(
        path, pipeline.scratch / "thin", archs, special=pipeline.thin(wheelfile.Wheel.read(path).name)
    )
    before, after = path.stat().st_size, made.stat().st_size
    console.note(f"{made.relative_to(pipeline.root)}, {size(after)} of {size(before)}")


def why(pipeline: Pipeline, runtime: Runtime, *names: str) -> None:
    """Print which inputs of stages are not what they were when their results were kept, the old and the new.

    Raises:
        VoltforgeError: there is no such stage.
    """
    stages = {**pipeline.stages(), **{stage.name: stage for stage in (runtime.base, runtime.image)}}
    if unknown := [name for name in names if name not in stages]:
        raise VoltforgeError(f"{', '.join(unknown)}: no such stage", hint=f"one of {', '.join(stages)}")
    for name in names or [name for name in stages if name.startswith("wheels:")]:
        console.step(name)
        try:
            reason = stages[name].reason()
            changes = [] if reason else stages[name].changes()
        except VoltforgeError as error:
            changes, reason = [], f"it cannot be said before that: {error.what}, {error.hint}"
        if changes:
            rows = [(change.name, shown(change.old), shown(change.new)) for change in changes]
            console.table("", ("changed since it was kept", "then", "now"), rows)
        else:
            console.note(reason or "nothing changed")


def key(pipeline: Pipeline) -> None:
    """Print the key that wheels are signed with, made if there is none, and sign what the wheelhouse has with it.

    Raises:
        VoltforgeError: it cannot be made or used.
    """
    path = Path(os.environ.get("VOLTFORGE_KEY") or signing.default_key(os.environ))
    signer = signing.Signer.load(path) if path.exists() else signing.make_key(path)
    console.step(f"key {path}, for you alone")
    for name in pipeline.wheelhouse.sign(signer):
        console.note(f"signed {name}")
    console.note("who is to trust it adds this to the file that their VOLTFORGE_TRUSTED names,")
    console.note(f"or to {signing.default_trusted(os.environ)}:")
    console.screen.print(f"{signer.keyid}\n{signer.public}", end="")


def push(pipeline: Pipeline) -> None:
    """Give the wheels of the wheelhouse to the shared cache.

    Raises:
        VoltforgeError: none is named, it does not take one, or a wheel is not signed.
    """
    cache = pipeline.cache
    if not cache:
        raise VoltforgeError(
            "VOLTFORGE_CACHE names no shared cache", hint="VOLTFORGE_CACHE=https://host/path ./doit push"
        )
    house = pipeline.wheelhouse
    kept = [results for _, results in house.receipts() if results.get("build_key")]
    if not kept:
        raise VoltforgeError("the wheelhouse has nothing to give", hint="./doit wheels")
    for results in kept:
        path = house.path / results["file"]
        new = cache.put(results["build_key"], path, house.beside(path, PROVENANCE).read_bytes())
        console.note(f"{path.name}: {'given to' if new else 'is in'} {cache}")


def collect_garbage(pipeline: Pipeline, runtime: Runtime) -> None:
    """List what no recipe needs, or remove it with ``gc=delete``.

    Raises:
        VoltforgeError: ``gc=`` is something else.
    """
    choice = pipeline.settings.gc
    if choice not in ("", "delete"):
        raise VoltforgeError(f"gc={choice} is no choice", hint="./doit gc lists, ./doit gc gc=delete removes")
    gc.report(pipeline, runtime, delete=choice == "delete")


def check_server(pipeline: Pipeline) -> None:
    """Measure the running server that ``url=`` names; table, JSON and plot in build/bench/serve/.

    Raises:
        VoltforgeError: no server is named, it cannot be measured, or requests failed.
    """
    from voltforge.commands import serve  # aiohttp takes up to half a second to import, which every ./doit would pay

    url = pipeline.settings.url
    if not url:
        raise VoltforgeError("no server is named", hint="./doit serve:check url=http://127.0.0.1:8000")
    serve.check(url, pipeline.scratch / "bench" / "serve")


def test(root: Path) -> None:
    """Run linter, type checker and tests as CI does.

    Raises:
        VoltforgeError: one of them found something.
    """
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], PYTEST):
        _python(root, "-m", *words)


def lock(pipeline: Pipeline) -> None:
    """Make every lock anew, of the pipeline, the recipes and the tests, from the ``.in`` file beside it.

    Raises:
        InstallError: one of them has no solution.
    """
    root = pipeline.root
    folders = root, root / "recipes" / "locks", root / "tests" / "packages"
    for wanted in [path for folder in folders for path in sorted(folder.glob("*.in"))]:
        console.step(f"lock {wanted.relative_to(root)}")
        environment.lock(root, wanted, wanted.with_suffix(".txt"), pipeline.store.indexes)


def bench(root: Path) -> None:
    """Run every benchmark but that of a running server, which needs one.

    Raises:
        VoltforgeError: one failed.
    """
    for script in sorted({*(root / "bench").glob("*.py")} - {root / "bench" / "serve.py"}):
        _python(root, str(script.relative_to(root)))


def profile(pipeline: Pipeline) -> None:
    """Print where the time of each package's last build went, and draw it in build/profile/.

    Raises:
        VoltforgeError: nothing was built yet, or ninja's log cannot be read.
    """
    from voltforge.compile import build_profile  # which every ./doit would pay for otherwise

    build_profile.show(pipeline.root, pipeline.scratch, pipeline.scheduler.estimates)


def farm(pipeline: Pipeline) -> None:
    """Print who builds what at the server that ``ccache=`` names.

    Raises:
        VoltforgeError: it names none, or that does not answer.
    """
    meeting = _meeting(pipeline)
    hosts = meeting.hosts()
    if not hosts:
        console.note(f"nobody builds anything at {meeting}")
        return
    rows = [(one.name, one.package, str(meeting.compiled_by_host(one.build)[one.name]), one.build) for one in hosts]
    console.table("", ("host", "builds", "objects compiled", "those with the same here share them"), rows)


def help_farm(pipeline: Pipeline) -> None:
    """Build along whatever another host builds, until Ctrl-C.

    Raises:
        VoltforgeError: ``ccache=`` names no server of a farm, or that does not answer.
    """
    meeting, helped = _meeting(pipeline), set[tuple[str, str]]()
    console.step(f"help whoever builds at {meeting}, until Ctrl-C")
    while True:
        there = {(one.name, one.build): one.package for one in meeting.hosts() if one.name != meeting.name}
        helped &= set(there)
        if wanted := sorted(there[one] for one in set(there) - helped if there[one] in pipeline.recipes):
            helped |= {one for one in there if there[one] == wanted[0]}
            words = [sys.executable, "-m", "doit", *pipeline.settings.words(), f"build:{wanted[0]}"]
            if subprocess.call(words, cwd=pipeline.root):
                console.warn(f"build:{wanted[0]} did not end well here: the others go on without it")
        time.sleep(RENEW_SECONDS)


def _meeting(pipeline: Pipeline) -> Farm:
    """Where the hosts of a farm meet.

    Raises:
        VoltforgeError: ``ccache=`` names no such server, or that does not answer.
    """
    server = object_cache.named(pipeline.settings.ccache)
    meeting = server.farm() if server else None
    if not meeting:
        raise VoltforgeError("ccache= names no redis server, where the hosts of a farm meet",
                             hint="./doit ccache=redis://HOST farm; docs/scale.md says how to begin")  # fmt: skip
    meeting.check_connection()
    return meeting


def _python(root: Path, *words: str) -> None:
    """Run Python on the person's own terminal."""
    command = " ".join(["python", *words])
    console.step(command)
    status = subprocess.call([sys.executable, *words], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    if status:
        raise VoltforgeError(f"{command} ended with status {status}")


def about(graph: ModuleType) -> None:
    """Print the tasks of the graph in its own order, with what each is for."""
    tasks = {name.removeprefix("task_"): made for name, made in vars(graph).items() if name.startswith("task_")}
    console.table(
        (graph.__doc__ or "").split(":")[0],
        ("./doit …", ""),
        [(name, (made.__doc__ or "").strip()) for name, made in tasks.items()],
    )
    console.note("./doit --no-color …, or NO_COLOR=1 in the environment: no colours")
