"""Clearing up: what under build/ and wheelhouse/ no recipe needs any more, what it weighs, and its removal.

Needed is what any choice on the command line leads to, as far as recipes, records and receipts tell. Where they do not,
because a stage has not run or a record cannot be read, all that may belong to it stays. No link is followed, and what
voltforge did not put there itself is told but never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from voltforge.errors import VoltforgeError, listed
from voltforge.image.stages import Runtime
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Values
from voltforge.sources.fetch import Artifact
from voltforge.sources.recipe import CHOICES, SourceRecipe, ThinRecipe, load
from voltforge.system import console, files
from voltforge.wheel import wheelhouse

COMPANIONS = (wheelhouse.METADATA, wheelhouse.SBOM, wheelhouse.PROVENANCE)
"""What is appended to a wheel's name for the files that belong to it."""
SETTINGS = ("arch", "environment", "toolchain", "variables")
"""The inputs of a build that name its work folder: see :meth:`voltforge.pipeline.from_source.Compiled.made_of`."""
AT_REST = 3600.0
"""Seconds without a change after which nobody can be at work in what is used outside of a turn (see ``turn``)."""
BLOCK = 512
"""Bytes of what st_blocks counts, whatever the blocks of the file system are (stat(2))."""
LEFT_OVER = "left over"
"""The kind of what killed runs leave."""
CANNOT_TELL = (VoltforgeError, OSError, LookupError, TypeError, ValueError, AttributeError)
"""What is raised where a stage has not run, or its record is of another shape than today's."""

_HEX = "[0-9a-f]{12}"
_HOME = "[0-9a-f]{16}/"
_TOOLKIT = rf"((redist|distro)-.+|driver-stub)-{_HEX}/"
_JSON = r"[^.].*\.json"
_IMAGE = r"voltforge-.+\.oci\.tar"
_RANDOM = "[a-z0-9_]{8}"
"""What Python's tempfile puts into names."""
_BESIDE = re.compile(rf"\..+\.{_RANDOM}(\.old)?/?")
"""What files.replacing and files.replacing_folder write beside, or move aside."""
_IN_OURS = re.compile(rf"{_BESIDE.pattern}|tmp{_RANDOM}/")
"""The same and what tempfile makes, in a folder where nobody else writes."""
_KEPT_BESIDE = re.compile(rf"\.(simple|.+\.(whl|metadata|json|jsonl|html))\.{_RANDOM}(\.old)?/?")
"""The same in the wheelhouse, where people have files of their own."""
_OF_BUILD = re.compile(r"\.turn|doit\.sqlite.*|trust\.\w+|triton\.json")
"""Small files of ours in build/ that stay."""


@dataclass(frozen=True)
class Item:
    """Something that no recipe needs any more."""

    path: Path
    kind: str
    """Where it lies, or :data:`LEFT_OVER`."""
    size: int
    """Bytes on the disk that its removal frees: those of files with no other link."""
    why: str
    shared: int = 0
    """Bytes of its other files, which their other links keep: those of an environment are in uv's cache too."""


@dataclass(frozen=True)
class Removed:
    """What a removal came to."""

    freed: int
    """Bytes on the disk."""
    problems: tuple[str, ...]
    """A sentence for each item that is still there."""


@dataclass(frozen=True)
class _Known:
    """What a checkout says of itself."""

    recipes: tuple[SourceRecipe | ThinRecipe, ...]
    """Every recipe under every choice; some are equal."""
    receipts: tuple[Values, ...]
    doubtful: bool
    """Whether there are receipts that cannot be read."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(recipe.name for recipe in self.recipes)


@dataclass(frozen=True)
class _Area:
    """Names in a folder of build/ that are voltforge's own; those of folders end with a slash."""

    folder: str
    ours: str
    why: str
    kind: str = ""
    """The folder's name if empty."""
    outside_turns: bool = False
    """Whether it is used by what waits for nobody's turn."""


_AREAS = (
    _Area("toolchains", _TOOLKIT, "the toolchain in use is another one"),
    _Area("trees", r"[^.].*/", "no recipe compiles a source of this name"),
    _Area("environments", r"[^.].*-verify/", "of a check that was cut short", LEFT_OVER),
    _Area("environments", r"[^.].*/", "no recipe has a lock of this name"),
    _Area("work", rf"[^.].*-{_HEX}/", "no build would go on in it"),
    _Area("wheels", rf"[^.].*-{_HEX}/", "it is not of the last build"),
    _Area("logs", r"[^.].*\.log", "no recipe has this name"),
    _Area("stages", _JSON, "no recipe has this name"),
    _Area("image", _IMAGE, "another image took its place"),
    _Area("image", r"(context|layout|environment)/|base\.tar|runtime\.txt", "of the making of an image", LEFT_OVER),
    _Area("reproduce", r"[^.].*/", "a second checkout, made anew when it is asked for", outside_turns=True),
    _Area("bench", "thin/", "of a benchmark that was cut short", LEFT_OVER, outside_turns=True),
    _Area("gpu", rf"tmp{_RANDOM}/", "of a bundle that was cut short", LEFT_OVER),
    _Area("profile", rf"tmp{_RANDOM}/", "of a chart that was cut short", LEFT_OVER),
    _Area("thin", rf"\.thin-{_RANDOM}/", "of a run that was cut short", LEFT_OVER, outside_turns=True),
)
"""The first one that fits a name counts."""
_STAYS = ("cache", "driver-stub", "gate", "history")
"""Folders of build/ in which nothing is too much: ccache keeps its own within bounds."""
_FOLDERS = tuple(dict.fromkeys(area.folder for area in _AREAS))
_OUTSIDE = frozenset(area.folder for area in _AREAS if area.outside_turns)


@dataclass(frozen=True)
class _Found:
    """Something that lies where voltforge puts things, needed or not."""

    path: Path
    kind: str
    """Empty for what is not ours."""
    why: str
    outside_turns: bool = False


def needed(pipeline: Pipeline, runtime: Runtime) -> frozenset[Path]:
    """The files and folders that must stay, be they there or not, for any recipe under any choice and any receipt.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    known = _known(pipeline)
    made = [path for recipe in known.recipes for path in _made(pipeline, recipe)]
    work = [path for name in known.names for path in _work(pipeline, known, name)]
    records = _records(pipeline, runtime, known)
    logs = [path for name in ("image", "run") for path in _logs(pipeline, name)]
    kept = [*_toolkits(pipeline), *_images(runtime), *logs, *_kept(pipeline, known)]
    return frozenset([*_sources(pipeline, known), *made, *work, *records, *kept])


def unneeded(pipeline: Pipeline, runtime: Runtime) -> list[Item]:
    """What no recipe needs any more, the kind that frees most first, and in it what frees most.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    items = []
    for found in _found(pipeline, runtime):
        if found.kind:
            weight = _weigh(found.path)
            if not found.outside_turns or weight.touched + AT_REST <= time.time():
                items.append(Item(found.path, found.kind, weight.frees, found.why, weight.shared))
    sums = _by_kind(items)
    return sorted(items, key=lambda item: (-sums[item.kind], item.kind, -item.size, item.path))


def foreign(pipeline: Pipeline, runtime: Runtime) -> list[Item]:
    """What voltforge did not put there by itself, and which no recipe needs either: it is for a person to remove.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    found = [(one, _weigh(one.path)) for one in _found(pipeline, runtime) if not one.kind]
    items = [Item(one.path, "not ours", weight.frees, one.why, weight.shared) for one, weight in found]
    return sorted(items, key=lambda item: (-item.size, item.path))


def remove(items: Iterable[Item]) -> Removed:
    """Remove all of them, and go on where one cannot be removed.

    A folder is moved aside first: a killed removal leaves nothing under its name that could be taken for whole.
    """
    items, freed, problems = list(items), 0, []
    total = sum(item.size for item in items)
    with console.progress("gc") as tell:
        for item in items:
            tell(f"{item.path.name}, {files.size(freed)} of {files.size(total)}")
            left = item.path
            try:
                left = _aside(item.path)
                files.remove(left)
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                problems.append(f"{left} could not be removed: {error.strerror or error}{where}")
            freed += max(0, item.size - _weigh(left).frees)
    return Removed(freed, tuple(problems))


def collect(pipeline: Pipeline, runtime: Runtime) -> None:
    """List what no recipe needs, or remove it with ``gc=delete``.

    Raises:
        VoltforgeError: ``gc=`` has another value, or :func:`report` fails.
    """
    choice = pipeline.settings.gc
    if choice not in ("", "delete"):
        raise VoltforgeError(f"gc={choice}: unknown value", hint="./doit gc lists, ./doit gc gc=delete removes")
    report(pipeline, runtime, delete=choice == "delete")


def report(pipeline: Pipeline, runtime: Runtime, delete: bool = False) -> None:
    """Print what no recipe needs any more, and with ``delete`` remove it, once no other run is at work.

    Raises:
        RecipeError: a recipe cannot be used; nothing was removed.
        VoltforgeError: something could not be removed; all else was.
    """
    if delete:
        pipeline.turn.take()
    items = unneeded(pipeline, runtime)
    _show(pipeline.root, items)
    _show_foreign(pipeline.root, foreign(pipeline, runtime))
    if links := [path for path in _looked_into(pipeline) if path.is_symlink()]:
        console.note(f"links, which were not followed: {', '.join(_shown(pipeline.root, path) for path in links)}")
    if items and not delete:
        console.note("./doit gc gc=delete removes what no recipe needs")
    problems: Sequence[str] = ()
    if delete:
        removed = remove(items)
        problems = removed.problems
        console.step(f"freed {files.size(removed.freed)}")
    if runtime.folder.is_dir():
        console.note("the image engine's own store is not looked into: buildah rmi --prune clears it of unused layers")
    if problems:
        raise VoltforgeError(f"not all could be removed:{listed(list(problems))}", hint="check the owner of each")


# What is needed.


def _known(pipeline: Pipeline) -> _Known:
    found = _receipts(pipeline.wheelhouse.path / "receipts")
    receipts = tuple(one for one in found if _is_receipt(one))
    return _Known(tuple(_every_recipe(pipeline.root / "recipes")), receipts, doubtful=len(receipts) < len(found))


def _receipts(folder: Path) -> list[Any]:
    """What they hold, ``None`` for what cannot be read; links are read like files."""
    try:
        return [files.read_json(path) for path in sorted(folder.iterdir()) if re.fullmatch(_JSON, path.name)]
    except FileNotFoundError:
        return []
    except OSError:
        return [None]


def _is_receipt(value: Any) -> bool:
    """Whether it says of which source it is and which wheel it is for."""
    try:
        words = (*map(value["inputs"]["source"].get, ("file", "sha256")), *map(value["results"].get, ("name", "file")))
        words += tuple(_materials(value))
    except CANNOT_TELL:
        return False
    return all(isinstance(word, str) for word in words)


def _every_recipe(folder: Path) -> Iterator[SourceRecipe | ThinRecipe]:
    """The recipes of a folder, each under every combination of the choices that change it."""
    for path in sorted(folder.glob("*.toml")):
        if path.stem == "cuda":
            continue
        offered = {name: [value] for name, value in CHOICES.items()}
        for condition in load(path).conditions:
            name, value = condition.split("=")
            offered[name].append(value)
        for values in product(*offered.values()):
            yield load(path, dict(zip(offered, values, strict=True)))


def _sources(pipeline: Pipeline, known: _Known) -> Iterator[Path]:
    folder = pipeline.store.folder
    if known.doubtful:
        yield from _matching(folder, _HOME)
    yield from (folder / sha256[:16] for receipt in known.receipts for sha256 in _materials(receipt))
    for artifact in {*_artifacts(pipeline, known)}:
        home = folder / artifact.sha256[:16]
        yield from (home / artifact.file, home / ".lock", folder / artifact.file)
        if not pipeline.store.holds(artifact):
            yield home / f"{artifact.sha256}.part"


def _artifacts(pipeline: Pipeline, known: _Known) -> Iterator[Artifact]:
    for recipe in known.recipes:
        try:
            yield pipeline.package(recipe).maker.source.artifact
        except VoltforgeError:  # there is no stock wheel for the Python that runs: for another one it may be any
            yield from (source.artifact for source in getattr(recipe, "wheels", ()))
    for provision in (pipeline.cuda.redist, pipeline.cuda.distro):
        yield from (archive.artifact for archive in provision.archives)
    for receipt in known.receipts:
        source = receipt["inputs"]["source"]
        yield Artifact(source["file"], source["sha256"])


def _materials(receipt: Values) -> Iterator[str]:
    """The hashes of what a receipt names: the compiler's archives among them."""
    named = receipt["results"].get("materials", [])
    yield from (sha256 for one in named for sha256 in one.get("sha256", []) if isinstance(sha256, str))


def _toolkits(pipeline: Pipeline) -> Iterator[Path]:
    """The toolkit and the driver's stub of the record, by their names: a checkout may have been moved."""
    folder = pipeline.scratch / "toolchains"
    try:
        home = pipeline.toolchain.result().home
        stands = home.is_dir() or (folder / home.name).is_dir()
    except CANNOT_TELL:
        stands = False
    if stands:
        yield folder / home.name
    else:
        yield from _matching(folder, _TOOLKIT)


def _made(pipeline: Pipeline, recipe: SourceRecipe | ThinRecipe) -> Iterator[Path]:
    """What the stages of a recipe keep, but for the work folder."""
    scratch, name = pipeline.scratch, recipe.name
    yield from _logs(pipeline, name)
    if isinstance(recipe, SourceRecipe):
        yield from (scratch / "trees" / name, scratch / "environments" / recipe.beside(recipe.build.lock).stem)
    try:
        built = pipeline.package(recipe).build.result().path
    except CANNOT_TELL:
        yield from _called(scratch / "wheels", name)
    else:
        yield scratch / built.parent.parent.name / built.parent.name  # a wheel of the shared cache is in downloads/


def _logs(pipeline: Pipeline, name: str) -> tuple[Path, Path]:
    """Of what was built, and of the same built again."""
    return pipeline.scratch / "logs" / f"{name}.log", pipeline.scratch / "logs" / f"reproduce-{name}.log"


def _work(pipeline: Pipeline, known: _Known, name: str) -> Iterator[Path]:
    """The work folders that a build would go on in, the newest, and those that the wheels of receipts come from."""
    folder = pipeline.scratch / "work"
    there = {path: _changed(path) for path in _called(folder, name)}
    yield from (path for path, changed in there.items() if changed == max(there.values()))
    packages = [pipeline.package(recipe) for recipe in known.recipes if recipe.name == name]
    try:
        today = [package.maker.inputs() for package in packages if isinstance(package.recipe, SourceRecipe)]
        last = packages[0].build.finished().inputs
        kept = [receipt["inputs"] for receipt in known.receipts if receipt["results"]["name"] == name]
        compiled = [made_of for made_of in (*today, last, *kept) if set(SETTINGS) <= set(made_of)]
        keys = [files.digest({setting: made_of[setting] for setting in SETTINGS}) for made_of in compiled]
    except CANNOT_TELL:
        yield from there
    else:
        yield from there if known.doubtful else (folder / f"{name}-{key[:12]}" for key in keys)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it went away just now
        return 0


def _records(pipeline: Pipeline, runtime: Runtime, known: _Known) -> Iterator[Path]:
    """The records of all stages, and any other of which it cannot be told that its recipe is gone."""
    stages = [stage for recipe in known.recipes for stage in pipeline.package(recipe).stages.values()]
    yield from (stage.path for stage in (*stages, runtime.base, runtime.image))
    for path in _matching(pipeline.scratch / "stages", _JSON):
        try:
            gone = files.read_json(path)["stage"].split(":")[1] not in known.names
        except CANNOT_TELL:
            gone = False
        if not gone:
            yield path


def _images(runtime: Runtime) -> Iterator[Path]:
    try:
        yield runtime.folder / runtime.image.result().path.name
    except CANNOT_TELL:
        yield from _matching(runtime.folder, _IMAGE)


def _kept(pipeline: Pipeline, known: _Known) -> Iterator[Path]:
    house = pipeline.wheelhouse.path
    yield from (house / "README.md", house / "simple")
    yield from _matching(house / "receipts", _JSON)
    yield from (house / receipt["results"]["file"] for receipt in known.receipts)


def _called(folder: Path, name: str) -> list[Path]:
    """The folders in ``folder`` of one recipe's builds."""
    return _matching(folder, rf"{re.escape(name)}-{_HEX}/")


def _matching(folder: Path, pattern: str) -> list[Path]:
    return [path for path, shape in _entries(folder) if re.fullmatch(pattern, shape)]


# What there is.


def _found(pipeline: Pipeline, runtime: Runtime) -> Iterator[_Found]:
    """All that is not needed, ours or not; neither is any of it in another, nor is anything in it needed."""
    stays = needed(pipeline, runtime)
    above = {parent for path in stays for parent in path.parents}
    for found in (*_in_scratch(pipeline, stays), *_in_downloads(pipeline, above), *_in_wheelhouse(pipeline, stays)):
        if found.path not in stays and found.path not in above:
            yield found


def _in_scratch(pipeline: Pipeline, stays: frozenset[Path]) -> Iterator[_Found]:
    for path, shape in _entries(pipeline.scratch):
        if shape in {f"{name}/" for name in (*_FOLDERS, "downloads", *_STAYS)} or _OF_BUILD.fullmatch(shape):
            continue
        if re.fullmatch(rf"tmp{_RANDOM}/", shape):
            yield _Found(path, LEFT_OVER, "of a benchmark that was cut short", outside_turns=True)
        else:
            yield _beside(path, shape) or _Found(path, "", "no stage makes this")
    for folder in _FOLDERS:
        for path, shape in _entries(pipeline.scratch / folder):
            if path in stays:
                yield from _left_in(path)
            elif found := _beside(path, shape, outside_turns=folder in _OUTSIDE) or _judged(folder, path, shape):
                yield found


def _judged(folder: str, path: Path, shape: str) -> _Found | None:
    """What an entry of a folder of build/ is, by its name."""
    for area in _AREAS:
        if area.folder == folder and re.fullmatch(area.ours, shape):
            return _Found(path, area.kind or folder, area.why, area.outside_turns)
    if folder in ("bench", "reproduce", "gpu", "profile"):  # results, some of which take an hour to make
        return None
    return _Found(path, "", "`./doit thin` made it, for you" if folder == "thin" else "no stage makes this")


def _in_downloads(pipeline: Pipeline, above: set[Path]) -> Iterator[_Found]:
    for path, shape in _entries(pipeline.store.folder):
        if shape == "rejected/":
            yield _Found(path, "downloads", "came with another hash than was asked for")
        elif re.fullmatch(_HOME, shape) and path in above:
            for part, form in _entries(path):
                yield _beside(part, form) or _Found(part, "downloads", "not the file that is needed here")
        elif re.fullmatch(_HOME, shape):
            names = [part.name for part, _ in _entries(path) if part.name != ".lock"]
            yield _Found(path, "downloads", f"no recipe names {', '.join(names) or 'it'}")
        else:
            yield _beside(path, shape) or _Found(path, "", "put there by hand, and no recipe names it")


def _in_wheelhouse(pipeline: Pipeline, stays: frozenset[Path]) -> Iterator[_Found]:
    house = pipeline.wheelhouse.path
    for path, shape in _entries(house):
        if path not in stays and shape.endswith(".whl"):
            yield _Found(path, "", "no receipt speaks of it")
        elif found := _beside(path, shape, _KEPT_BESIDE):
            yield found
        elif (wheel := _companion_of(path)) and not os.path.lexists(wheel):
            yield _Found(path, "wheelhouse", "its wheel is gone")
    for path, shape in _entries(house / "receipts"):
        if found := _beside(path, shape, _KEPT_BESIDE):
            yield found


def _companion_of(path: Path) -> Path | None:
    """The wheel that a file belongs to, by its name."""
    wheels = [path.name.removesuffix(end) for end in COMPANIONS if path.name.endswith(f".whl{end}")]
    return path.with_name(wheels[0]) if wheels else None


def _beside(
    path: Path, shape: str, pattern: re.Pattern[str] = _BESIDE, *, outside_turns: bool = False
) -> _Found | None:
    """What a killed run left beside what it was about to replace."""
    why = "of a run that was cut short"
    return _Found(path, LEFT_OVER, why, outside_turns) if pattern.fullmatch(shape) else None


def _left_in(folder: Path) -> list[_Found]:
    """The same in a folder that stays: only where voltforge itself writes, not in trees or environments."""
    if folder.parent.name not in ("work", "wheels"):
        return []
    return [found for path, shape in _entries(folder) if (found := _beside(path, shape, _IN_OURS))]


def _entries(folder: Path) -> list[tuple[Path, str]]:
    """What is in a folder, with each name as patterns have it: with a slash after a folder's. No links, nor in one."""
    if folder.is_symlink() or folder.parent.is_symlink():
        return []
    try:
        with os.scandir(folder) as entries:
            known = [(Path(entry), entry.is_dir()) for entry in entries if not entry.is_symlink()]
    except OSError:
        return []
    return sorted((path, f"{path.name}/" if is_folder else path.name) for path, is_folder in known)


def _looked_into(pipeline: Pipeline) -> list[Path]:
    """The folders in which links would hide something."""
    scratch, house = pipeline.scratch, pipeline.wheelhouse.path
    return [scratch, *(scratch / name for name in (*_FOLDERS, "downloads")), house, house / "receipts"]


# What it weighs.


@dataclass(frozen=True)
class _Weight:
    frees: int
    shared: int
    touched: float
    """When anything of it was last changed, in seconds since 1970: a time that nobody can set back (st_ctime)."""


def _weigh(path: Path) -> _Weight:
    frees, touched = 0, 0.0
    shared: dict[tuple[int, int], int] = {}
    for found in _stats(path):
        if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1:
            frees += found.st_blocks * BLOCK
        else:
            shared[found.st_dev, found.st_ino] = found.st_blocks * BLOCK
        touched = max(touched, found.st_ctime)
    return _Weight(frees, sum(shared.values()), touched)


def _stats(path: Path) -> Iterator[os.stat_result]:
    inside = (f"{parent}/{name}" for parent, folders, names in os.walk(path) for name in (*folders, *names))
    for name in (str(path), *inside):
        with contextlib.suppress(OSError):  # it went away just now
            yield os.lstat(name)


def _by_kind(items: Iterable[Item]) -> Mapping[str, int]:
    sums: dict[str, int] = {}
    for item in items:
        sums[item.kind] = sums.get(item.kind, 0) + item.size
    return sums


def _aside(path: Path) -> Path:
    """Move a folder to a name under which it is known as left over; a file goes at once, and stays."""
    if not path.is_dir() or path.is_symlink() or _BESIDE.fullmatch(path.name):
        return path
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    path.rename(aside)
    files.sync_folder(path.parent)
    return aside


# What is said of it.


def _show(root: Path, items: Sequence[Item]) -> None:
    if not items:
        console.note("there is nothing that no recipe needs")
        return
    sums, rows, last = _by_kind(items), [], ""
    for item in items:
        kind = "" if item.kind == last else f"{item.kind}, {files.size(sums[item.kind])}"
        rows.append((kind, _shown(root, item.path), files.size(item.size), _why(item)))
        last = item.kind
    rows.append(("all", "", files.size(sum(sums.values())), ""))
    console.table("what no recipe needs any more", ("kind", "what", "frees", "why"), rows)
    if any(item.shared for item in items):
        console.note("a file with other links frees nothing: uv's cache has links to what it installs")


def _why(item: Item) -> str:
    return f"{item.why}; {files.size(item.shared)} have other links" if item.shared else item.why


def _show_foreign(root: Path, items: Sequence[Item]) -> None:
    if items:
        rows = [(_shown(root, item.path), files.size(item.size), _why(item)) for item in items]
        console.table("not ours, left alone", ("what", "size", "why"), rows)


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
