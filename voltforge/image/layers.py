"""The runtime image: what of the wheels goes in, in which layer, and what is left out and why."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Annotated, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import Field, ValidationError

from voltforge.binary import elf
from voltforge.errors import VoltforgeError, listed
from voltforge.sources.environment import Environment
from voltforge.sources.recipe import Pattern, RecipeTable, read_toml
from voltforge.system import console, files

PREFIX = Path("opt/vllm")
"""Where the environment lies in the image."""
LAYERS = (
    "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-nccl-cu12", "nvidia-cusolver-cu12", "nvidia-cusparse-cu12",
    "nvidia-cufft-cu12", "nvidia-cuda-nvrtc-cu12", "nvidia-curand-cu12", "nvidia-nvjitlink-cu12",
    "triton", "torch", "packages", "vllm", "kernels", "configuration",
)  # fmt: skip
"""The folders of the context in the Dockerfile's order; all projects without one of their own share ``packages``."""

BASE_DIGEST = "org.opencontainers.image.base.digest"
OF_THE_MACHINE = ("direct_url.json", "uv_cache.json")
"""What an installer says of where it found a wheel (PEP 610): a folder of the machine that made the image."""


class ImageError(VoltforgeError):
    """An image that cannot be put together."""


class Omission(RecipeTable):
    """Files of a project that are not needed at run time."""

    project: Pattern
    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    why: str


class EntryPoints(RecipeTable):
    """Lines of a project's entry_points.txt that name what is left out."""

    project: Pattern
    lines: Annotated[tuple[str, ...], Field(min_length=1)]


class LeaveOut(RecipeTable):
    """docker/leave-out.toml."""

    files: tuple[Omission, ...] = ()
    entry_points: tuple[EntryPoints, ...] = ()
    strip: tuple[Omission, ...] = ()
    """Binaries whose symbol tables and debug data go; never NVIDIA's."""

    @classmethod
    def load(cls, path: Path) -> LeaveOut:
        """Read it.

        Raises:
            ImageError: it breaks a rule; all problems are named.
        """
        try:
            return cls.model_validate(read_toml(path))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ImageError(f"{path.name} cannot be used:{listed(problems)}") from error
        except (OSError, ValueError) as error:
            raise ImageError(f"{path.name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Part:
    """What an omission or a strip saved."""

    what: str
    why: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Content:
    """What an image holds."""

    projects: Mapping[str, int]
    """Bytes by project."""
    layers: Mapping[str, int]
    """Bytes by layer."""
    left_out: tuple[Part, ...]


def reachable(environment: Environment, roots: Iterable[str]) -> set[str]:
    """The projects that those in ``roots`` need, themselves among them, by what the installed metadata says (PEP 508).

    Raises:
        ImageError: one that is needed is not installed.
    """
    installed = dict(_distributions(environment))
    found: set[str] = set()
    asked: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in roots]
    seen = set(asked)
    missing = set()
    while asked:
        name, extras = asked.pop()
        if name not in installed:
            missing.add(name)
            continue
        found.add(name)
        for line in installed[name].requires or ():
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            step = (str(canonicalize_name(wanted.name)), frozenset(wanted.extras))
            if step not in seen:
                seen.add(step)
                asked.append(step)
    if missing:
        raise ImageError(f"the lock lacks {', '.join(sorted(missing))}, which a wheel requires", hint="./doit lock")
    return found


def lay_out(environment: Environment, projects: Iterable[str], leave_out: LeaveOut, context: Path) -> Content:
    """Fill ``context`` with a folder for each layer: the files of the projects, each once, by hard links.

    Raises:
        ImageError: two projects own a file of different content, or something that should be left out is not there.
    """
    wanted = set(projects)
    taken: dict[Path, str] = {}
    sizes: dict[str, int] = {}
    layers = dict.fromkeys(LAYERS, 0)
    gone: dict[Omission, int] = {}
    for layer in LAYERS:
        (context / layer).mkdir(parents=True)
    for name, distribution in sorted(_distributions(environment)):
        if name not in wanted:
            continue
        layer = name if name in LAYERS else "packages"
        record = []
        for member in distribution.files or ():
            source = Path(os.path.normpath(Path(str(distribution.locate_file(member)))))
            place = PREFIX / source.relative_to(environment.path)
            if not source.is_file() or source.suffix == ".pyc" or source.name in OF_THE_MACHINE or place in taken:
                continue
            size = source.stat().st_size
            if omission := _matching(leave_out.files, name, str(member)):
                gone[omission] = gone.get(omission, 0) + size
                continue
            record.append(str(member))
            taken[place] = name
            target = context / layer / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if strip := _matching(leave_out.strip, name, str(member)):
                shutil.copy(source, target)
                elf.strip(target)
                gone[strip] = gone.get(strip, 0) + size - target.stat().st_size
            else:
                _link(source, target)
            sizes[name] = sizes.get(name, 0) + target.stat().st_size
            layers[layer] += target.stat().st_size
        _mend(context / layer / PREFIX / _metadata(distribution, environment), record, _lines(leave_out, name))
    known = (*leave_out.files, *leave_out.strip)
    if idle := [
        f"{one.project}: {', '.join(one.patterns)}" for one in known if one not in gone and _concerns(one, wanted)
    ]:
        raise ImageError(f"leave-out.toml names files that are not there:{listed(idle)}", hint="mend or drop the entry")
    left = [Part(f"{one.project}: {', '.join(one.patterns)}", one.why, gone[one]) for one in known if one in gone]
    absent = {name: _weight(one) for name, one in _distributions(environment) if name not in wanted}
    left += [Part(name, "required by nothing in the image", size) for name, size in absent.items()]
    return Content(sizes, layers, tuple(sorted(left, key=lambda part: -part.size)))


@contextlib.contextmanager
def united(context: Path, folder: Path) -> Iterator[Path]:
    """The environment as the image will have it, while it is needed: all layers in one folder, by hard links."""
    files.remove(folder)  # of a run that was ended
    try:
        for layer in LAYERS:
            if (context / layer / PREFIX).exists():
                shutil.copytree(context / layer / PREFIX, folder, copy_function=_link, dirs_exist_ok=True)
        yield folder
    finally:
        files.remove(folder)


def archive(layout: Path, path: Path) -> None:
    """Pack an OCI image layout to an archive, the same bytes for the same layout."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with files.replacing(path) as sink, tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(layout.rglob("*")):
            tar.add(file, str(file.relative_to(layout)), recursive=False, filter=plain)


def complete(layout: Path, healthcheck: Mapping[str, Any]) -> None:
    """Write a health check into the configuration of every image of a layout, as Docker's engine reads it.

    The OCI's format has no place for one, so engines that write it leave a Dockerfile's HEALTHCHECK out. And take out
    which images buildah went on from: steps of its cache, so that the same layers would have another history elsewhere.
    """
    index = json.loads((layout / "index.json").read_text())
    replaced = set()
    for entry in index["manifests"]:
        manifest = json.loads(_blob(layout, entry).read_text())
        config = json.loads(_blob(layout, manifest["config"]).read_text())
        config["config"]["Healthcheck"] = dict(healthcheck)
        for step in config["history"]:
            step.pop("comment", None)
        manifest.get("annotations", {}).pop(BASE_DIGEST, None)
        replaced |= {_blob(layout, entry), _blob(layout, manifest["config"])}
        manifest["config"] |= _put(layout, config)
        entry |= _put(layout, manifest)
    (layout / "index.json").write_text(json.dumps(index, separators=(",", ":")))
    for old in replaced:  # two names may be of one image
        old.unlink()


def compressed(layout: Path) -> list[tuple[str, int]]:
    """Digest and compressed bytes of every layer of a layout, in order."""
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(_blob(layout, index["manifests"][0]).read_text())
    return [(layer["digest"], layer["size"]) for layer in manifest["layers"]]


def why(content: Content, base: int, show: int = 25) -> None:
    """Print sizes by layer and by project, and what was left out."""
    layers = {"base": base, **{name: content.layers[name] for name in LAYERS}}
    rows = [(name, files.size(size)) for name, size in layers.items() if size]
    rows.append(("all", files.size(sum(layers.values()))))
    console.table("layers", ("layer", "uncompressed"), rows)
    largest = sorted(content.projects.items(), key=lambda item: -item[1])
    rows = [(name, files.size(size)) for name, size in largest[:show]]
    rows.append((f"{len(largest[show:])} others", files.size(sum(size for _, size in largest[show:]))))
    console.table("projects", ("project", "uncompressed"), rows)
    console.table(
        "left out", ("what", "size", "why"), [(part.what, files.size(part.size), part.why) for part in content.left_out]
    )


def _distributions(environment: Environment) -> Iterator[tuple[str, Distribution]]:
    for folder in sorted(environment.site_packages.glob("*.dist-info")):
        one = PathDistribution(folder)
        yield str(canonicalize_name(one.metadata["Name"])), one


def _matching(omissions: Sequence[Omission], project: str, member: str) -> Omission | None:
    for one in omissions:
        if fnmatchcase(project, one.project) and any(fnmatchcase(member, pattern) for pattern in one.patterns):
            return one
    return None


def _concerns(omission: Omission, projects: set[str]) -> bool:
    return any(fnmatchcase(project, omission.project) for project in projects)


def _lines(leave_out: LeaveOut, project: str) -> set[str]:
    return {line for one in leave_out.entry_points if one.project == project for line in one.lines}


def _metadata(distribution: Distribution, environment: Environment) -> Path:
    folder = next(Path(str(member)).parts[0] for member in distribution.files or () if ".dist-info/" in str(member))
    return environment.site_packages.relative_to(environment.path) / folder


def _mend(folder: Path, record: Sequence[str], dropped: set[str]) -> None:
    """Make RECORD and entry_points.txt tell the truth about what is left of a project."""
    kept = set(record)
    lines = [line for line in (folder / "RECORD").read_text().splitlines() if line.split(",")[0].strip('"') in kept]
    files.write(folder / "RECORD", "\n".join(sorted(lines)) + "\n")
    entries = folder / "entry_points.txt"
    if dropped:
        text = entries.read_text().splitlines()
        if absent := dropped - {line.strip() for line in text}:
            raise ImageError(f"leave-out.toml names entry points that are not there:{listed(sorted(absent))}")
        files.write(entries, "\n".join(line for line in text if line.strip() not in dropped) + "\n")


def set_modes(context: Path) -> None:
    """Give folders the mode 755, and files 755 or 644: whatever the umask was, nobody special must read the image.

    A file that is a hard link to uv's cache gets another mode as a copy.
    """
    for parent, _, names in os.walk(context):
        Path(parent).chmod(0o755)
        for path in (Path(parent, name) for name in names):
            found = path.lstat()
            mode = 0o755 if found.st_mode & stat.S_IXUSR else 0o644
            if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) != mode:
                with path.open("rb") as source, files.replacing(path, mode) as sink:
                    shutil.copyfileobj(source, sink, files.BLOCK)


def weight(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _weight(distribution: Distribution) -> int:
    paths = [Path(str(distribution.locate_file(member))) for member in distribution.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy(source, target)  # another file system, or one without hard links


def _blob(layout: Path, descriptor: Mapping[str, Any]) -> Path:
    return layout / "blobs" / str(descriptor["digest"]).replace(":", "/")


def _put(layout: Path, value: Any) -> dict[str, Any]:
    """Write a blob of JSON; gives what a descriptor says of it."""
    data = json.dumps(value, separators=(",", ":")).encode()
    digest = files.sha256_bytes(data)
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}
