"""`./doit gc`: list or remove the files under build/ and wheelhouse/ that no recipe needs.

A file is needed if any choice on the command line leads to it. Where a stage has not run or a record cannot be read,
everything that may belong to it stays. Links are not followed. Files that voltforge did not make are listed and never
removed.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.commands.disk_usage import disk_usage
from voltforge.commands.needed_files import DOWNLOAD_FOLDER, HEX, IMAGE, JSON, TOOLKIT, entries, needed
from voltforge.errors import VoltforgeError, listed
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.wheel import wheelhouse

COMPANIONS = (wheelhouse.METADATA, wheelhouse.SBOM, wheelhouse.PROVENANCE)
"""Endings that are appended to a wheel's name for the files that belong to it."""
AT_REST = 3600.0
"""Seconds without a change after which a folder that is used without the run lock counts as unused."""
LEFT_OVER = "left over"
"""The kind of files that a killed run leaves."""

_RANDOM = "[a-z0-9_]{8}"
"""The random part of names from Python's tempfile."""
_BESIDE = re.compile(rf"\..+\.{_RANDOM}(\.old)?/?")
"""Temporary names of files.replacing and files.replacing_folder."""
_IN_OURS = re.compile(rf"{_BESIDE.pattern}|tmp{_RANDOM}/")
"""The same and the folders of tempfile, in a folder where only voltforge writes."""
_KEPT_BESIDE = re.compile(rf"\.(simple|.+\.(whl|metadata|json|jsonl|html))\.{_RANDOM}(\.old)?/?")
"""The same in the wheelhouse, where people keep files of their own."""
_OF_BUILD = re.compile(r"\.run-lock|\.turn|doit\.sqlite.*|trust\.\w+|triton\.json")
"""Small files of voltforge in build/ that stay."""


@dataclass(frozen=True)
class Item:
    """A file or folder that no recipe needs."""

    path: Path
    kind: str
    """The name of its folder, or :data:`LEFT_OVER`."""
    size: int
    """Bytes on the disk that its removal frees: those of files with no other link."""
    why: str
    shared: int = 0
    """Bytes of its other files, which their other links keep: those of an environment are in uv's cache too."""


@dataclass(frozen=True)
class Removed:
    """The result of a removal."""

    freed: int
    """Bytes on the disk."""
    problems: tuple[str, ...]
    """A sentence for each item that is still there."""


@dataclass(frozen=True)
class _Area:
    """Names in a folder of build/ that are voltforge's own; those of folders end with a slash."""

    folder: str
    ours: str
    why: str
    kind: str = ""
    """The folder's name if empty."""
    without_run_lock: bool = False
    """True if tasks use it without holding the run lock."""


_AREAS = (
    _Area("toolchains", TOOLKIT, "not the toolchain in use"),
    _Area("trees", r"[^.].*/", "no recipe compiles a source of this name"),
    _Area("environments", r"[^.].*-verify/", "left by a check that was interrupted", LEFT_OVER),
    _Area("environments", r"[^.].*/", "no recipe has a lock of this name"),
    _Area("work", rf"[^.].*-{HEX}/", "no build would continue in it"),
    _Area("wheels", rf"[^.].*-{HEX}/", "not from the last build"),
    _Area("logs", r"[^.].*\.log", "no recipe has this name"),
    _Area("stages", JSON, "no recipe has this name"),
    _Area("image", IMAGE, "replaced by a newer image"),
    _Area(
        "image", r"(context|layout|environment)/|base\.tar|runtime\.txt", "left by the making of an image", LEFT_OVER
    ),
    _Area("reproduce", r"[^.].*/", "a second checkout, which ./doit reproduce makes anew", without_run_lock=True),
    _Area("bench", "thin/", "left by an interrupted benchmark", LEFT_OVER, without_run_lock=True),
    _Area("gpu", rf"tmp{_RANDOM}/", "left by an interrupted gpu-bundle", LEFT_OVER),
    _Area("profile", rf"tmp{_RANDOM}/", "left by an interrupted chart", LEFT_OVER),
    _Area("thin", rf"\.thin-{_RANDOM}/", "left by an interrupted run", LEFT_OVER, without_run_lock=True),
)
"""The first entry that matches a name applies."""
_STAYS = ("cache", "driver-stub", "gate", "history")
"""Folders of build/ that are never searched: they stay small, and ccache limits its own size."""
_FOLDERS = tuple(dict.fromkeys(area.folder for area in _AREAS))
_OUTSIDE = frozenset(area.folder for area in _AREAS if area.without_run_lock)


@dataclass(frozen=True)
class _FoundFile:
    """A file or folder in a folder of voltforge, needed or not."""

    path: Path
    kind: str
    """Empty for what is not ours."""
    why: str
    without_run_lock: bool = False


def unneeded(pipeline: Pipeline, runtime: RuntimeImage) -> list[Item]:
    """Return the items that no recipe needs: the kind that frees most first, and in it the largest item first.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    items = []
    for found in _found(pipeline, runtime):
        if found.kind:
            weight = disk_usage(found.path)
            if not found.without_run_lock or weight.touched + AT_REST <= time.time():
                items.append(Item(found.path, found.kind, weight.frees, found.why, weight.shared))
    sums = _by_kind(items)
    return sorted(items, key=lambda item: (-sums[item.kind], item.kind, -item.size, item.path))


def foreign(pipeline: Pipeline, runtime: RuntimeImage) -> list[Item]:
    """Return the files that voltforge did not make and that no recipe needs; only a person may remove them.

    Raises:
        RecipeError: a recipe cannot be used.
    """
    found = [(file, disk_usage(file.path)) for file in _found(pipeline, runtime) if not file.kind]
    items = [Item(file.path, "not ours", weight.frees, file.why, weight.shared) for file, weight in found]
    return sorted(items, key=lambda item: (-item.size, item.path))


def remove(items: Iterable[Item]) -> Removed:
    """Remove all items, and continue where one cannot be removed.

    A folder is renamed first, so that a killed removal leaves no incomplete folder under its own name.
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
            freed += max(0, item.size - disk_usage(left).frees)
    return Removed(freed, tuple(problems))


def collect(pipeline: Pipeline, runtime: RuntimeImage) -> None:
    """List what no recipe needs, or remove it with ``gc=delete``.

    Raises:
        VoltforgeError: ``gc=`` has another value, or :func:`report` fails.
    """
    choice = pipeline.settings.gc
    if choice not in ("", "delete"):
        raise VoltforgeError(f"gc={choice}: unknown value", hint="./doit gc lists, ./doit gc gc=delete removes")
    report(pipeline, runtime, delete=choice == "delete")


def report(pipeline: Pipeline, runtime: RuntimeImage, delete: bool = False) -> None:
    """Print the files that no recipe needs; with ``delete``, wait for the run lock and remove them.

    Raises:
        RecipeError: a recipe cannot be used; nothing was removed.
        VoltforgeError: something could not be removed; all else was.
    """
    if delete:
        pipeline.run_lock.take()
    items = unneeded(pipeline, runtime)
    _show(pipeline.root, items)
    _show_foreign(pipeline.root, foreign(pipeline, runtime))
    if links := [path for path in _looked_into(pipeline) if path.is_symlink()]:
        console.note(f"links that were not followed: {', '.join(_shown(pipeline.root, path) for path in links)}")
    if items and not delete:
        console.note("./doit gc gc=delete removes them")
    problems: Sequence[str] = ()
    if delete:
        removed = remove(items)
        problems = removed.problems
        console.step(f"freed {files.size(removed.freed)}")
    if runtime.folder.is_dir():
        console.note("not searched: the image engine's own store; buildah rmi --prune removes its unused layers")
    if problems:
        raise VoltforgeError(
            f"some files could not be removed:{listed(list(problems))}", hint="check the owner of each"
        )


# The files that exist.


def _found(pipeline: Pipeline, runtime: RuntimeImage) -> Iterator[_FoundFile]:
    """Yield unneeded paths, made by voltforge or not; none contains another, or a needed path."""
    stays = needed(pipeline, runtime)
    above = {parent for path in stays for parent in path.parents}
    for found in (*_in_scratch(pipeline, stays), *_in_downloads(pipeline, above), *_in_wheelhouse(pipeline, stays)):
        if found.path not in stays and found.path not in above:
            yield found


def _in_scratch(pipeline: Pipeline, stays: frozenset[Path]) -> Iterator[_FoundFile]:
    for path, shape in entries(pipeline.scratch):
        if shape in {f"{name}/" for name in (*_FOLDERS, "downloads", *_STAYS)} or _OF_BUILD.fullmatch(shape):
            continue
        if re.fullmatch(rf"tmp{_RANDOM}/", shape):
            yield _FoundFile(path, LEFT_OVER, "left by an interrupted benchmark", without_run_lock=True)
        else:
            yield _beside(path, shape) or _FoundFile(path, "", "no stage makes this")
    for folder in _FOLDERS:
        for path, shape in entries(pipeline.scratch / folder):
            if path in stays:
                yield from _left_in(path)
            elif found := _beside(path, shape, without_run_lock=folder in _OUTSIDE) or _judged(folder, path, shape):
                yield found


def _judged(folder: str, path: Path, shape: str) -> _FoundFile | None:
    """Classify an entry of a folder of build/ by its name; None for results that stay."""
    for area in _AREAS:
        if area.folder == folder and re.fullmatch(area.ours, shape):
            return _FoundFile(path, area.kind or folder, area.why, area.without_run_lock)
    if folder in ("bench", "reproduce", "gpu", "profile"):  # results, which may have taken an hour
        return None
    return _FoundFile(path, "", "made by `./doit thin`" if folder == "thin" else "no stage makes this")


def _in_downloads(pipeline: Pipeline, above: set[Path]) -> Iterator[_FoundFile]:
    for path, shape in entries(pipeline.store.folder):
        if shape == "rejected/":
            yield _FoundFile(path, "downloads", "its hash was wrong")
        elif re.fullmatch(DOWNLOAD_FOLDER, shape) and path in above:
            for part, form in entries(path):
                yield _beside(part, form) or _FoundFile(part, "downloads", "not the needed file")
        elif re.fullmatch(DOWNLOAD_FOLDER, shape):
            names = [part.name for part, _ in entries(path) if part.name != ".lock"]
            yield _FoundFile(path, "downloads", f"no recipe names {', '.join(names) or 'it'}")
        else:
            yield _beside(path, shape) or _FoundFile(path, "", "put there by hand; no recipe names it")


def _in_wheelhouse(pipeline: Pipeline, stays: frozenset[Path]) -> Iterator[_FoundFile]:
    house = pipeline.wheelhouse.path
    for path, shape in entries(house):
        if path not in stays and shape.endswith(".whl"):
            yield _FoundFile(path, "", "no receipt names it")
        elif found := _beside(path, shape, _KEPT_BESIDE):
            yield found
        elif (wheel := _companion_of(path)) and not os.path.lexists(wheel):
            yield _FoundFile(path, "wheelhouse", "its wheel is missing")
    for path, shape in entries(house / "receipts"):
        if found := _beside(path, shape, _KEPT_BESIDE):
            yield found


def _companion_of(path: Path) -> Path | None:
    """The wheel that a file belongs to, by its name."""
    wheels = [path.name.removesuffix(end) for end in COMPANIONS if path.name.endswith(f".whl{end}")]
    return path.with_name(wheels[0]) if wheels else None


def _beside(
    path: Path, shape: str, pattern: re.Pattern[str] = _BESIDE, *, without_run_lock: bool = False
) -> _FoundFile | None:
    """Classify a temporary file of a killed run; None for other files."""
    why = "left by an interrupted run"
    return _FoundFile(path, LEFT_OVER, why, without_run_lock) if pattern.fullmatch(shape) else None


def _left_in(folder: Path) -> list[_FoundFile]:
    """Return the temporary files in a folder that stays, if only voltforge writes there, as in work and wheels."""
    if folder.parent.name not in ("work", "wheels"):
        return []
    return [found for path, shape in entries(folder) if (found := _beside(path, shape, _IN_OURS))]


def _looked_into(pipeline: Pipeline) -> list[Path]:
    """The folders in which links would hide something."""
    scratch, house = pipeline.scratch, pipeline.wheelhouse.path
    return [scratch, *(scratch / name for name in (*_FOLDERS, "downloads")), house, house / "receipts"]


def _by_kind(items: Iterable[Item]) -> Mapping[str, int]:
    sums: dict[str, int] = {}
    for item in items:
        sums[item.kind] = sums.get(item.kind, 0) + item.size
    return sums


def _aside(path: Path) -> Path:
    """Rename a folder to a temporary name of voltforge, and return the new path; a file keeps its name."""
    if not path.is_dir() or path.is_symlink() or _BESIDE.fullmatch(path.name):
        return path
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    path.rename(aside)
    files.sync_folder(path.parent)
    return aside


# Output.


def _show(root: Path, items: Sequence[Item]) -> None:
    if not items:
        console.note("nothing to remove")
        return
    sums, rows, last = _by_kind(items), [], ""
    for item in items:
        kind = "" if item.kind == last else f"{item.kind}, {files.size(sums[item.kind])}"
        rows.append((kind, _shown(root, item.path), files.size(item.size), _why(item)))
        last = item.kind
    rows.append(("all", "", files.size(sum(sums.values())), ""))
    console.table("files that no recipe needs", ("kind", "what", "frees", "why"), rows)
    if any(item.shared for item in items):
        console.note("a file with other links frees nothing: uv's cache has links to what it installs")


def _why(item: Item) -> str:
    return f"{item.why}; {files.size(item.shared)} have other links" if item.shared else item.why


def _show_foreign(root: Path, items: Sequence[Item]) -> None:
    if items:
        rows = [(_shown(root, item.path), files.size(item.size), _why(item)) for item in items]
        console.table("files that gc never removes", ("what", "size", "why"), rows)


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
