"""Whether a wheel or the image is the same, bit for bit, when it is built again elsewhere, under other conditions."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from uv import find_uv_bin

import voltforge
from voltforge.compile import sandbox
from voltforge.errors import VoltforgeError
from voltforge.image import container_engine
from voltforge.image.stages import Runtime
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment
from voltforge.sources.index import Indexes
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.compare import WORDS, Comparison, compare, report

CODE = ("dodo.py", "pyproject.toml", "volta", "voltforge")
DATA = ("requirements.txt", "recipes", "patches", "docker")
"""What of a checkout the second build is given, beside the code."""
ELSEWHERE = "a-checkout-with-a-name-so-long-that-every-path-in-it-has-another-length"
UMASKS = ("0077", "0022")
LOCALES = ("tr_TR.UTF-8", "C", "C.UTF-8")
"""In Turkish the capital of i is not I, which has broken builds; not every machine has it installed."""
ZONES = ("NPT-5:45", "CST+6")
"""As POSIX writes them (tzset(3)): these hold also where no time zones are installed."""
SEEDS = ("4242", "2424")
USERS = ("1234", "1235")
"""Of each of these the second build gets the first one that the first build did not have."""
OWN = ("jobs", "ccache", "file", "url", "gc")
"""Settings that are not handed on to the second build."""
WITHHELD = ("VOLTFORGE_CACHE", "VOLTFORGE_KEY", "VOLTFORGE_TRUSTED", "FORCE_COLOR")
"""Variables that are not: a second build must be a build, nobody signs what came of it, and its log is read by people.
"""
CONFIGURATION = {
    "NETRC": ".netrc",
    "UV_CONFIG_FILE": ".config/uv/uv.toml",
    "DOCKER_CONFIG": ".docker",
    "CONTAINERS_REGISTRIES_CONF": ".config/containers/registries.conf",
}
"""Variables that name what programs look for in HOME, which is another for the second build: access, not content."""


class NotReproducible(VoltforgeError):  # noqa: N818 - it says what was found
    """A second build gave other bytes; ``comparison`` says which."""

    exit_status = 4
    """The exit status of ``./doit``, by which a script tells this from a build that failed."""

    def __init__(self, comparison: Comparison, second: Path) -> None:
        told = [one.place for one in comparison.differences[:3]]
        rest = len(comparison.differences) - len(told) + comparison.more
        places = "; ".join([*told, *([f"{rest} more"] if rest else [])])
        super().__init__(
            f"{comparison.other.name} of a second build: {WORDS[comparison.tier]}{f' ({places})' if places else ''}",
            hint=f"look at the table above; the second build is kept in {second}",
        )
        self.comparison = comparison


@dataclass(frozen=True)
class Variation:
    """A condition of the build."""

    what: str
    first: str
    """As the first build's record has it, or as it is here."""
    second: str
    same_because: str = ""
    """Why it is the same for both after all; empty if it is not."""


@dataclass(frozen=True)
class Second:
    """A second checkout, and the conditions that it builds under."""

    root: Path
    variations: tuple[Variation, ...]
    environ: Mapping[str, str]
    around: tuple[str, ...]
    """What every command is wrapped in."""
    jobs: str = ""
    """Compile jobs at once; empty where the build does not count them."""

    @property
    def varied(self) -> int:
        """How many conditions really are others."""
        return sum(not one.same_because for one in self.variations)

    def run(self, words: Sequence[str | Path], log: Path, label: str) -> None:
        """Run a program in the second checkout, under its conditions.

        Raises:
            ProgramFailed: it failed.
        """
        log.unlink(missing_ok=True)
        with console.progress(label) as tell:
            run(
                [*self.around, *words], cwd=self.root, env=self.environ, log=log,
                watch=lambda line, _: tell(line.strip()) if line else None,
            )  # fmt: skip


def wheel(pipeline: Pipeline, name: str) -> Comparison:
    """Build a wheel of the wheelhouse a second time, from sources to checks, and compare the two.

    Raises:
        NotReproducible: the second is another; its checkout is kept.
        VoltforgeError: there is no first, or the second build fails.
    """
    first = _receipt(pipeline, name)
    made = pipeline.wheelhouse.receipt(name, environment.python_tag()).stat().st_mtime
    second = prepare(pipeline, name, made=made, jobs=first["results"].get("jobs"))
    _build(pipeline, second, name, f"wheels:{name}")
    there = Checkout(second.root, pipeline.settings)
    again = _receipt(there, name)
    inputs = first["inputs"], again["inputs"]
    if other := sorted(key for key in {*inputs[0], *inputs[1]} if inputs[0].get(key) != inputs[1].get(key)):
        console.warn(f"the two builds were not given the same: {', '.join(other)}")
    return _judged(pipeline, second, name, _file(pipeline, first), _file(there, again))


def image(pipeline: Pipeline, runtime: Runtime) -> Comparison:
    """Put the image together a second time, of the same wheels, and compare the two archives.

    The engine gets a store of its own, so that it takes no layer from the first build. The user stays: to write files
    of several owners an engine must be root, or become it in a way of its own.

    Raises:
        NotReproducible: the second is another; its checkout is kept.
        VoltforgeError: there is no first, or the second build fails.
    """
    first = runtime.image.result().path
    second = prepare(pipeline, "image", made=first.stat().st_mtime, same_user="the engine has a way of its own")
    shutil.copytree(pipeline.wheelhouse.path, second.root / "wheelhouse", copy_function=shutil.copy)
    with _store_apart(second) as apart:
        _build(pipeline, apart, "image", "image:of-wheelhouse")
    again = Runtime(Pipeline.load(second.root, pipeline.settings)).image.result().path
    return _judged(pipeline, second, "image", first, again)


def prepare(pipeline: Pipeline, name: str, *, made: float, jobs: int | None = None, same_user: str = "") -> Second:
    """A second checkout in ``build/reproduce``, without anything built, and conditions unlike the first build's.

    What an earlier, interrupted run has left there is removed.

    Args:
        pipeline: the first checkout.
        name: what is built again.
        made: when the first was, in seconds since 1970.
        jobs: how many compile jobs at once it had, if its record says so.
        same_user: why the user must not be varied, if so.
    """
    root = pipeline.scratch / "reproduce" / name / ELSEWHERE
    files.remove(root.parent)
    _copy(pipeline.root, root)
    (root / "home").mkdir()
    user, around = _user(pipeline, same_user)
    umask = Variation("umask", _umask(), _another(_umask(), UMASKS))
    variables, counted = _variables(root / "home"), _jobs(jobs)
    variations = (
        Variation("length of the path", str(len(str(pipeline.root))), str(len(str(root)))), _order(pipeline.root, root),
        user, umask, *variables.values(), counted, Variation("time", _moment(made), _moment(time.time())),
    )  # fmt: skip
    environ = {**_handed_on(pipeline), **{key: one.second for key, one in variables.items()}}
    around = ("sh", "-c", f'umask {umask.second}; exec "$@"', "sh", *around)
    return Second(root, variations, environ, around, "" if counted.same_because else counted.second)


def _copy(checkout: Path, root: Path) -> None:
    """Bring in what makes a checkout, names in reverse order: some file systems list them as they came."""
    own = Path(voltforge.__file__).parent.parent
    # A checkout of recipes alone, as tests make them, is built by the code that runs.
    places = {name: checkout if (checkout / name).exists() else own for name in CODE}
    places |= {name: checkout for name in DATA if (checkout / name).exists()}
    for name, place in sorted(places.items(), reverse=True):
        for path in sorted([place / name, *(place / name).rglob("*")], reverse=True):
            if path.is_file() and "__pycache__" not in path.parts:
                target = root / path.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def _build(pipeline: Pipeline, second: Second, name: str, task: str) -> None:
    console.step(f"build {name} again, in {second.root.relative_to(pipeline.root)}")
    log = pipeline.scratch / "logs" / f"reproduce-{name}.log"
    words = [*pipeline.settings.words(*OWN), "ccache=off", *([f"jobs={second.jobs}"] if second.jobs else [])]
    try:
        second.run([sys.executable, "-m", "doit", *words, task], log, name)
    except ProgramFailed as error:
        said = re.search(r"^x (.*?)\n(?=  try:|[x*!] |\Z)", error.output, re.DOTALL | re.MULTILINE)
        why = said[1] if said else error.what
        raise VoltforgeError(
            f"the second build of {name} failed: {why}", hint=f"its log is {log}, its checkout {second.root}"
        ) from error


def _judged(pipeline: Pipeline, second: Second, name: str, one: Path, other: Path) -> Comparison:
    comparison = compare(one, other)
    shown = [
        (v.what, v.first, f"the same: {v.same_because}" if v.same_because else v.second) for v in second.variations
    ]
    console.table("", ("condition", "first build", "second build"), shown)
    console.note(f"{second.varied} of {len(shown)} conditions were others for the second build")
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


# The conditions.


def _variables(home: Path) -> dict[str, Variation]:
    """The variables that are others, by name."""
    spoken = next((os.environ[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(key)), "C")
    known = _locales()
    other = next(one for one in LOCALES if _normal(one) in known and _normal(one) != _normal(spoken))
    zone, seed = os.environ.get("TZ", ""), os.environ.get("PYTHONHASHSEED", "")
    return {
        "LC_ALL": Variation("locale", spoken, other),
        "TZ": Variation("time zone", zone or "the system's", _another(zone, ZONES)),
        "HOME": Variation("home", str(Path.home()), str(home)),
        "PYTHONHASHSEED": Variation("hash seed", seed or "random", _another(seed, SEEDS)),
    }


def _handed_on(pipeline: Pipeline) -> dict[str, str]:
    """The environment of the first build as far as it says where things are to be had, whatever HOME is."""
    environ = {key: value for key, value in os.environ.items() if key not in WITHHELD}
    found = {key: Path.home() / file for key, file in CONFIGURATION.items() if (Path.home() / file).exists()}
    # The first build's downloads are a mirror like any other: what comes from there is held to its hash.
    mirrors = (pipeline.scratch / "downloads").absolute().as_uri(), environ.get("VOLTFORGE_MIRRORS", "")
    cache = run([find_uv_bin(), "cache", "dir"]).output.splitlines()[-1]
    return {
        **{key: str(path) for key, path in found.items()},
        **environ,
        **_configured(pipeline.store.indexes),
        "VOLTFORGE_MIRRORS": " ".join(mirrors).strip(),
        "UV_CACHE_DIR": cache,
        "NO_COLOR": "1",
    }


def _configured(indexes: Indexes) -> dict[str, str]:
    """The variables from which :func:`voltforge.sources.index.configured` reads these very indexes again."""
    told = {"UV_DEFAULT_INDEX": indexes.default, "UV_INDEX": " ".join(indexes.extra), "PIP_CERT": indexes.certificate}
    told |= {"UV_FIND_LINKS": ",".join(indexes.find_links), "UV_NO_INDEX": "" if indexes.default else "1"}
    return {key: value for key, value in told.items() if value}


def _user(pipeline: Pipeline, same_because: str) -> tuple[Variation, tuple[str, ...]]:
    """Another user, and the words that make a command see itself as that one: a user namespace needs no rights."""
    own = str(os.getuid())
    other = _another(own, USERS)
    words = ("unshare", "--user", f"--map-user={other}", f"--map-group={other}", "--")
    if not same_because:
        inside = sandbox.choose(pipeline.settings.sandbox)
        try:
            run([*words, *inside.command(["true"], writable={}, readable={}, cwd=Path("/"))], timeout=20)
            return Variation("user", own, other), words
        except ProgramFailed:
            same_because = "unshare(1) cannot make another here"
    return Variation("user", own, own, same_because), ()


def _order(checkout: Path, root: Path) -> Variation:
    """In which order the file system lists the names of a folder."""
    for folder in (name for name in (*CODE, *DATA) if (checkout / name).is_dir() and (root / name).is_dir()):
        both = set(os.listdir(checkout / folder)) & set(os.listdir(root / folder))
        first, second = ([name for name in os.listdir(place / folder) if name in both] for place in (checkout, root))
        if first != second:
            return Variation("order of names", f"{', '.join(first[:3])}, …", f"{', '.join(second[:3])}, …")
    return Variation("order of names", "as listed", "as listed", "this file system has an order of its own")


def _jobs(first: int | None) -> Variation:
    if first is None:
        return Variation("jobs", "not counted", "not counted", "it is not compiled")
    return Variation("jobs", str(first), "1" if first > 1 else "2")


def _umask() -> str:
    mask = os.umask(0o077)  # there is no way to ask but to set it
    os.umask(mask)
    return f"{mask:04o}"


def _another(value: str, candidates: Sequence[str]) -> str:
    return next(one for one in candidates if one != value)


def _locales() -> set[str]:
    """Those that this machine has; the first two are part of every C library."""
    try:
        installed = run(["locale", "-a"]).output.split()
    except ProgramFailed:
        installed = []
    return {_normal(one) for one in ("C", "C.UTF-8", *installed)}


def _normal(name: str) -> str:
    """A locale's name as ``locale -a`` writes it."""
    return re.sub("utf-?8", "utf8", name, flags=re.IGNORECASE)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


# The image's engine.


@contextlib.contextmanager
def _store_apart(second: Second) -> Iterator[Second]:
    """The same with a store of its own for the engine's layers, emptied at the end (containers-storage.conf(5))."""
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
