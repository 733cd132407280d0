"""The files and folders under build/ and wheelhouse/ that a recipe, a record or a receipt needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from voltforge.errors import VoltforgeError
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Values
from voltforge.sources.fetch import Artifact
from voltforge.sources.recipe import CHOICES, SourceRecipe, ThinRecipe, load
from voltforge.system import files

SETTINGS = ("arch", "environment", "toolchain", "variables")
"""The inputs of a build that name its work folder: see :meth:`voltforge.pipeline.from_source.FromSource.build_in`."""
CANNOT_TELL = (VoltforgeError, OSError, LookupError, TypeError, ValueError, AttributeError)
"""Errors where a stage has not run, or its record has an unexpected shape."""
HEX = "[0-9a-f]{12}"
DOWNLOAD_FOLDER = "[0-9a-f]{16}/"
TOOLKIT = rf"((redist|distro)-.+|driver-stub)-{HEX}/"
JSON = r"[^.].*\.json"
IMAGE = r"voltforge-.+\.oci\.tar"


@dataclass(frozen=True)
class _Known:
    """The recipes and receipts of a checkout."""

    recipes: tuple[SourceRecipe | ThinRecipe, ...]
    """Every recipe under every choice; some are equal."""
    receipts: tuple[Values, ...]
    doubtful: bool
    """True if a receipt cannot be read: then all that may belong to it is needed."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(recipe.name for recipe in self.recipes)


def needed(pipeline: Pipeline, runtime: RuntimeImage) -> frozenset[Path]:
    """Return the files and folders that must stay, for every recipe under every choice and for every receipt.

    Some of them may not exist.

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


def _known(pipeline: Pipeline) -> _Known:
    values = _receipts(pipeline.wheelhouse.path / "receipts")
    receipts = tuple(value for value in values if _is_receipt(value))
    return _Known(tuple(_every_recipe(pipeline.root / "recipes")), receipts, doubtful=len(receipts) < len(values))


def _receipts(folder: Path) -> list[Any]:
    """Return the receipts of a folder, with ``None`` for each that cannot be read; links are followed."""
    try:
        return [files.read_json(path) for path in sorted(folder.iterdir()) if re.fullmatch(JSON, path.name)]
    except FileNotFoundError:
        return []
    except OSError:
        return [None]


def _is_receipt(value: Any) -> bool:
    """Return True if a value has the source and the wheel that a receipt must name."""
    try:
        words = (*map(value["inputs"]["source"].get, ("file", "sha256")), *map(value["results"].get, ("name", "file")))
        words += tuple(_materials(value))
    except CANNOT_TELL:
        return False
    return all(isinstance(word, str) for word in words)


def _every_recipe(folder: Path) -> Iterator[SourceRecipe | ThinRecipe]:
    """Yield the recipes of a folder, each under every combination of the choices that change it."""
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
        yield from _matching(folder, DOWNLOAD_FOLDER)
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
        except VoltforgeError:  # no stock wheel for this Python; another Python may need each of them
            yield from (source.artifact for source in getattr(recipe, "wheels", ()))
    for provision in (pipeline.cuda.redist, pipeline.cuda.distro):
        yield from (archive.artifact for archive in provision.archives)
    for receipt in known.receipts:
        source = receipt["inputs"]["source"]
        yield Artifact(source["file"], source["sha256"])


def _materials(receipt: Values) -> Iterator[str]:
    """Yield the hashes of the materials in a receipt, such as the compiler's archives."""
    named = receipt["results"].get("materials", [])
    yield from (sha256 for material in named for sha256 in material.get("sha256", []) if isinstance(sha256, str))


def _toolkits(pipeline: Pipeline) -> Iterator[Path]:
    """Yield the recorded toolkit, found by its folder name because a checkout may have been moved."""
    folder = pipeline.scratch / "toolchains"
    try:
        home = pipeline.toolchain.result().home
        exists = home.is_dir() or (folder / home.name).is_dir()
    except CANNOT_TELL:
        exists = False
    if exists:
        yield folder / home.name
    else:
        yield from _matching(folder, TOOLKIT)


def _made(pipeline: Pipeline, recipe: SourceRecipe | ThinRecipe) -> Iterator[Path]:
    """Yield the files of a recipe's stages, without the work folder."""
    scratch, name = pipeline.scratch, recipe.name
    yield from _logs(pipeline, name)
    if isinstance(recipe, SourceRecipe):
        yield from (scratch / "trees" / name, scratch / "environments" / recipe.beside(recipe.build.lock).stem)
    try:
        built = pipeline.package(recipe).build.result().path
    except CANNOT_TELL:
        yield from _called(scratch / "wheels", name)
    else:
        yield scratch / built.parent.parent.name / built.parent.name


def _logs(pipeline: Pipeline, name: str) -> tuple[Path, Path]:
    """Return the logs of a build and of its second build (``reproduce``)."""
    return pipeline.scratch / "logs" / f"{name}.log", pipeline.scratch / "logs" / f"reproduce-{name}.log"


def _work(pipeline: Pipeline, known: _Known, name: str) -> Iterator[Path]:
    """Yield the work folders that a build would continue in, the newest, and those of the wheels with receipts."""
    folder = pipeline.scratch / "work"
    folders = {path: _changed(path) for path in _called(folder, name)}
    yield from (path for path, changed in folders.items() if changed == max(folders.values()))
    packages = [pipeline.package(recipe) for recipe in known.recipes if recipe.name == name]
    try:
        today = [package.maker.inputs() for package in packages if isinstance(package.recipe, SourceRecipe)]
        last = packages[0].build.finished().inputs
        kept = [receipt["inputs"] for receipt in known.receipts if receipt["results"]["name"] == name]
        compiled = [made_of for made_of in (*today, last, *kept) if set(SETTINGS) <= set(made_of)]
        keys = [files.digest({setting: made_of[setting] for setting in SETTINGS}) for made_of in compiled]
    except CANNOT_TELL:
        yield from folders
    else:
        yield from folders if known.doubtful else (folder / f"{name}-{key[:12]}" for key in keys)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it was removed meanwhile
        return 0


def _records(pipeline: Pipeline, runtime: RuntimeImage, known: _Known) -> Iterator[Path]:
    """Yield the records of all stages, and other records unless their recipe is known to be gone."""
    stages = [stage for recipe in known.recipes for stage in pipeline.package(recipe).stages.values()]
    yield from (stage.path for stage in (*stages, runtime.base, runtime.image))
    for path in _matching(pipeline.scratch / "stages", JSON):
        try:
            gone = files.read_json(path)["stage"].split(":")[1] not in known.names
        except CANNOT_TELL:
            gone = False
        if not gone:
            yield path


def _images(runtime: RuntimeImage) -> Iterator[Path]:
    try:
        yield runtime.folder / runtime.image.result().path.name
    except CANNOT_TELL:
        yield from _matching(runtime.folder, IMAGE)


def _kept(pipeline: Pipeline, known: _Known) -> Iterator[Path]:
    house = pipeline.wheelhouse.path
    yield from (house / "README.md", house / "simple")
    yield from _matching(house / "receipts", JSON)
    yield from (house / receipt["results"]["file"] for receipt in known.receipts)


def _called(folder: Path, name: str) -> list[Path]:
    """Return the folders in ``folder`` that belong to one recipe's builds."""
    return _matching(folder, rf"{re.escape(name)}-{HEX}/")


def _matching(folder: Path, pattern: str) -> list[Path]:
    return [path for path, shape in entries(folder) if re.fullmatch(pattern, shape)]


def entries(folder: Path) -> list[tuple[Path, str]]:
    """Return the entries of a folder with their names; the name of a folder ends with a slash.

    Links are left out, and so are the entries of a linked folder.
    """
    if folder.is_symlink() or folder.parent.is_symlink():
        return []
    try:
        with os.scandir(folder) as entries:
            known = [(Path(entry), entry.is_dir()) for entry in entries if not entry.is_symlink()]
    except OSError:
        return []
    return sorted((path, f"{path.name}/" if is_folder else path.name) for path, is_folder in known)
