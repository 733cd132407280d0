"""`./doit reproduce`: build a wheel or the image again under other conditions, and compare the bytes."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import voltforge
from voltforge.commands.build_conditions import (
    CODE,
    DATA,
    UMASKS,
    Variation,
    another,
    inherited_environment,
    job_count,
    moment,
    name_order,
    other_user,
    umask_text,
    variables,
)  # fmt: skip
from voltforge.errors import VoltforgeError
from voltforge.image import container_engine
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.compare import TIER_TEXTS, Comparison, compare, report

ELSEWHERE = "a-checkout-with-a-name-so-long-that-every-path-in-it-has-another-length"
OWN = ("jobs", "ccache", "file", "url", "gc")
"""Settings that the second build does not get."""


class NotReproducible(VoltforgeError):  # noqa: N818 - it names the result
    """The second build has other bytes; ``comparison`` holds the differences."""

    exit_status = 4
    """The exit status of ``./doit``, so that a script can tell different bytes from a failed build."""

    def __init__(self, comparison: Comparison, second: Path) -> None:
        shown = [difference.place for difference in comparison.differences[:3]]
        rest = len(comparison.differences) - len(shown) + comparison.more
        places = "; ".join([*shown, *([f"{rest} more"] if rest else [])])
        super().__init__(
            f"the second build of {comparison.other.name} differs: {TIER_TEXTS[comparison.tier]}"
            f"{f' ({places})' if places else ''}",
            hint=f"look at the table above; the second build is kept in {second}",
        )
        self.comparison = comparison


@dataclass(frozen=True)
class SecondCheckout:
    """A second checkout, and the conditions that it builds under."""

    root: Path
    variations: tuple[Variation, ...]
    environ: Mapping[str, str]
    prefix: tuple[str, ...]
    """The words before every command."""
    jobs: str = ""
    """Compile jobs at once; empty where the build does not count them."""

    @property
    def varied(self) -> int:
        """The number of conditions that differ."""
        return sum(not variation.same_because for variation in self.variations)

    def run(self, words: Sequence[str | Path], log: Path, label: str) -> None:
        """Run a program in the second checkout, under its conditions.

        Raises:
            ProgramFailed: it failed.
        """
        log.unlink(missing_ok=True)
        with console.progress(label) as tell:
            run(
                [*self.prefix, *words], cwd=self.root, env=self.environ, log=log,
                watch=lambda line, _: tell(line.strip()) if line else None,
            )  # fmt: skip


def wheel(pipeline: Pipeline, name: str) -> Comparison:
    """Build a wheel of the wheelhouse a second time, from sources to checks, and compare the two.

    Raises:
        NotReproducible: the bytes differ; the second checkout is kept.
        VoltforgeError: there is no first build, or the second build fails.
    """
    first = _receipt(pipeline, name)
    made = pipeline.wheelhouse.receipt(name, environment.python_tag()).stat().st_mtime
    second = prepare(pipeline, name, made=made, jobs=first["results"].get("jobs"))
    _build(pipeline, second, name, f"wheels:{name}")
    there = Checkout(second.root, pipeline.settings)
    again = _receipt(there, name)
    inputs = first["inputs"], again["inputs"]
    if other := sorted(key for key in {*inputs[0], *inputs[1]} if inputs[0].get(key) != inputs[1].get(key)):
        console.warn(f"the two builds had different inputs: {', '.join(other)}")
    return _judged(pipeline, second, name, _file(pipeline, first), _file(there, again))


def image(pipeline: Pipeline, runtime: RuntimeImage) -> Comparison:
    """Build the image a second time from the same wheels, and compare the two archives.

    The engine gets a store of its own, so that it reuses no layer of the first build. The user is the same: an engine
    must be root, or use its own user namespace, to write files of several owners.

    Raises:
        NotReproducible: the bytes differ; the second checkout is kept.
        VoltforgeError: there is no first build, or the second build fails.
    """
    first = runtime.image.result().path
    second = prepare(pipeline, "image", made=first.stat().st_mtime, same_user="the engine uses its own user namespace")
    shutil.copytree(pipeline.wheelhouse.path, second.root / "wheelhouse", copy_function=shutil.copy)
    with _store_apart(second) as apart:
        _build(pipeline, apart, "image", "image:of-wheelhouse")
    again = RuntimeImage(Pipeline.load(second.root, pipeline.settings)).image.result().path
    return _judged(pipeline, second, "image", first, again)


def prepare(
    pipeline: Pipeline, name: str, *, made: float, jobs: int | None = None, same_user: str = ""
) -> SecondCheckout:
    """Return a second checkout in ``build/reproduce``, with nothing built, and conditions that differ from the first.

    An earlier second checkout there is removed.

    Args:
        pipeline: the first checkout.
        name: the recipe, or ``image``.
        made: the time of the first build, in seconds since 1970.
        jobs: the number of compile jobs of the first build, if recorded.
        same_user: the reason for keeping the user; empty to change it.
    """
    root = pipeline.scratch / "reproduce" / name / ELSEWHERE
    files.remove(root.parent)
    _copy(pipeline.root, root)
    (root / "home").mkdir()
    user, prefix = other_user(pipeline, same_user)
    umask = Variation("umask", umask_text(), another(umask_text(), UMASKS))
    varied, counted = variables(root / "home"), job_count(jobs)
    variations = (
        Variation("length of the path", str(len(str(pipeline.root))), str(len(str(root)))),
        name_order(pipeline.root, root),
        user, umask, *varied.values(), counted, Variation("time", moment(made), moment(time.time())),
    )  # fmt: skip
    environ = {**inherited_environment(pipeline), **{key: variation.second for key, variation in varied.items()}}
    prefix = ("sh", "-c", f'umask {umask.second}; exec "$@"', "sh", *prefix)
    return SecondCheckout(root, variations, environ, prefix, "" if counted.same_because else counted.second)


def _copy(checkout: Path, root: Path) -> None:
    """Copy the files of a checkout, in reverse order because some file systems list names in the order of creation."""
    own = Path(voltforge.__file__).parent.parent
    # A checkout with recipes only, as in tests, is built by the running code.
    places = {name: checkout if (checkout / name).exists() else own for name in CODE}
    places |= {name: checkout for name in DATA if (checkout / name).exists()}
    for name, place in sorted(places.items(), reverse=True):
        for path in sorted([place / name, *(place / name).rglob("*")], reverse=True):
            if path.is_file() and "__pycache__" not in path.parts:
                target = root / path.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def _build(pipeline: Pipeline, second: SecondCheckout, name: str, task: str) -> None:
    console.step(f"build {name} again, in {second.root.relative_to(pipeline.root)}")
    log = pipeline.scratch / "logs" / f"reproduce-{name}.log"
    words = [*pipeline.settings.words(*OWN), "ccache=off", *([f"jobs={second.jobs}"] if second.jobs else [])]
    try:
        second.run([sys.executable, "-m", "doit", *words, task], log, name)
    except ProgramFailed as error:
        sentence = re.search(r"^x (.*?)\n(?=  try:|[x*!] |\Z)", error.output, re.DOTALL | re.MULTILINE)
        why = sentence[1] if sentence else error.what
        raise VoltforgeError(
            f"the second build of {name} failed: {why}", hint=f"its log is {log}, its checkout {second.root}"
        ) from error


def _judged(pipeline: Pipeline, second: SecondCheckout, name: str, one: Path, other: Path) -> Comparison:
    comparison = compare(one, other)
    shown = [
        (v.what, v.first, f"the same: {v.same_because}" if v.same_because else v.second) for v in second.variations
    ]
    console.table("", ("condition", "first build", "second build"), shown)
    console.note(f"{second.varied} of {len(shown)} conditions were different in the second build")
    report(comparison)
    record = {
        "sha256": comparison.sha256,
        "tier": comparison.tier,
        "differences": [asdict(difference) for difference in comparison.differences],
        "more": comparison.more,
        "variations": [asdict(variation) for variation in second.variations],
    }
    files.write_json(pipeline.scratch / "reproduce" / f"{name}.json", record)
    if comparison.tier != "identical":
        raise NotReproducible(comparison, second.root)
    files.remove(second.root.parent)
    return comparison


def _receipt(checkout: Checkout, name: str) -> Any:
    kept = files.read_json(checkout.wheelhouse.receipt(name, environment.python_tag()))
    if not kept or not _file(checkout, kept).is_file():
        raise VoltforgeError(
            f"the wheelhouse has no {name} for {environment.python_tag()}", hint=f"./doit wheels:{name}"
        )
    return kept


def _file(checkout: Checkout, receipt: Any) -> Path:
    return checkout.wheelhouse.path / str(receipt["results"]["file"])


# The image's engine.


@contextlib.contextmanager
def _store_apart(second: SecondCheckout) -> Iterator[SecondCheckout]:
    """Yield ``second`` with its own store for the engine's layers, emptied at the end (containers-storage.conf(5))."""
    chosen = container_engine.choose()
    if chosen.kind == "docker":
        console.warn("docker may take layers from the first build: its daemon has one store")
        yield second
        return
    key = "{{.store.GraphDriverName}}" if chosen.kind == "buildah" else "{{.Store.GraphDriverName}}"
    driver = run([chosen.kind, "info", "--format", key]).output.split()[-1]
    with tempfile.TemporaryDirectory(prefix="voltforge-") as state:
        lines = ["[storage]", f'driver = "{driver}"', f'graphroot = "{second.root}/containers"', f'runroot = "{state}"']
        files.write(second.root / "home" / "storage.conf", "\n".join(lines) + "\n")
        environ = {**second.environ, "CONTAINERS_STORAGE_CONF": f"{second.root}/home/storage.conf"}
        try:
            yield replace(second, environ=environ)
        finally:
            with contextlib.suppress(ProgramFailed):
                run([chosen.kind, "rmi", "--all", "--force"], env=environ)
