"""The layers of the image: which files of the environment go into which, and which are left out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from voltforge.binary import elf
from voltforge.errors import listed
from voltforge.image.leave_out import ImageError, LeaveOut, Omission, matching
from voltforge.sources.environment import Environment
from voltforge.system import files

PREFIX = Path("opt/vllm")
"""The folder of the environment in the image."""
LAYERS = (
    "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-nccl-cu12", "nvidia-cusolver-cu12", "nvidia-cusparse-cu12",
    "nvidia-cufft-cu12", "nvidia-cuda-nvrtc-cu12", "nvidia-curand-cu12", "nvidia-nvjitlink-cu12",
    "triton", "torch", "packages", "vllm", "kernels", "configuration",
)  # fmt: skip
"""The folders of the build context, in the order of the Dockerfile. Projects without a layer go into ``packages``."""
INSTALLER_FILES = ("direct_url.json", "uv_cache.json")
"""Files in which an installer notes where it found a wheel (PEP 610): a folder of the build machine."""


@dataclass(frozen=True)
class Part:
    """Files that the image does not hold."""

    what: str
    why: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Content:
    """The sizes of an image's parts, in bytes."""

    projects: Mapping[str, int]
    layers: Mapping[str, int]
    left_out: tuple[Part, ...]


def reachable(environment: Environment, roots: Iterable[str]) -> set[str]:
    """Return the projects that ``roots`` require, directly or not, by the installed metadata (PEP 508); roots included.

    Raises:
        ImageError: a required project is not installed.
    """
    installed = dict(_distributions(environment))
    required: set[str] = set()
    pending: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in roots]
    seen = set(pending)
    missing = set()
    while pending:
        name, extras = pending.pop()
        if name not in installed:
            missing.add(name)
            continue
        required.add(name)
        for line in installed[name].requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            step = (str(canonicalize_name(requirement.name)), frozenset(requirement.extras))
            if step not in seen:
                seen.add(step)
                pending.append(step)
    if missing:
        raise ImageError(f"the lock lacks {', '.join(sorted(missing))}, which a wheel requires", hint="./doit lock")
    return required


def lay_out(environment: Environment, projects: Iterable[str], leave_out: LeaveOut, context: Path) -> Content:
    """Fill ``context`` with one folder per layer: the files of the projects, as hard links, each file once.

    Raises:
        ImageError: leave-out.toml names files or entry points that do not exist.
    """
    wanted = set(projects)
    taken: set[Path] = set()
    sizes: dict[str, int] = {}
    layers = dict.fromkeys(LAYERS, 0)
    saved: dict[Omission, int] = {}
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
            if not source.is_file() or source.suffix == ".pyc" or source.name in INSTALLER_FILES or place in taken:
                continue
            size = source.stat().st_size
            if omission := matching(leave_out.files, name, str(member)):
                saved[omission] = saved.get(omission, 0) + size
                continue
            record.append(str(member))
            taken.add(place)
            target = context / layer / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if strip := matching(leave_out.strip, name, str(member)):
                shutil.copy(source, target)
                elf.strip(target)
                saved[strip] = saved.get(strip, 0) + size - target.stat().st_size
            else:
                _link(source, target)
            sizes[name] = sizes.get(name, 0) + target.stat().st_size
            layers[layer] += target.stat().st_size
        metadata = context / layer / PREFIX / _metadata(distribution, environment)
        _rewrite_metadata(metadata, record, leave_out.dropped_lines(name))
    return Content(sizes, layers, _left_out(environment, wanted, leave_out, saved))


def _left_out(
    environment: Environment, wanted: set[str], leave_out: LeaveOut, saved: Mapping[Omission, int]
) -> tuple[Part, ...]:
    """Return the parts that the image does not hold, the largest first.

    Raises:
        ImageError: an omission of a project in the image matches no file.
    """
    rules = (*leave_out.files, *leave_out.strip)
    unused = [rule for rule in rules if rule not in saved and rule.concerns(wanted)]
    if unused:
        lines = listed([f"{rule.project}: {', '.join(rule.patterns)}" for rule in unused])
        raise ImageError(f"leave-out.toml names files that do not exist:{lines}", hint="correct or remove the entry")
    parts = [
        Part(f"{rule.project}: {', '.join(rule.patterns)}", rule.why, saved[rule]) for rule in rules if rule in saved
    ]
    parts += [
        Part(name, "not required by the image", _size(distribution))
        for name, distribution in _distributions(environment)
        if name not in wanted
    ]
    return tuple(sorted(parts, key=lambda part: -part.size))


@contextlib.contextmanager
def united(context: Path, folder: Path) -> Iterator[Path]:
    """Give the environment as the image will have it, for the length of the block: all layers in one folder, linked."""
    files.remove(folder)  # left by a killed run
    try:
        for layer in LAYERS:
            if (context / layer / PREFIX).exists():
                shutil.copytree(context / layer / PREFIX, folder, copy_function=_link, dirs_exist_ok=True)
        yield folder
    finally:
        files.remove(folder)


def set_modes(context: Path) -> None:
    """Give folders the mode 755, and files 755 or 644, so that every user can read the image whatever the umask was.

    A file that is a hard link to uv's cache is copied first.
    """
    for parent, _, names in os.walk(context):
        Path(parent).chmod(0o755)
        for path in (Path(parent, name) for name in names):
            status = path.lstat()
            mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
            if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) != mode:
                with path.open("rb") as source, files.replacing(path, mode) as sink:
                    shutil.copyfileobj(source, sink, files.BLOCK)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _distributions(environment: Environment) -> Iterator[tuple[str, Distribution]]:
    for folder in sorted(environment.site_packages.glob("*.dist-info")):
        distribution = PathDistribution(folder)
        yield str(canonicalize_name(distribution.metadata["Name"])), distribution


def _metadata(distribution: Distribution, environment: Environment) -> Path:
    folder = next(Path(str(member)).parts[0] for member in distribution.files or () if ".dist-info/" in str(member))
    return environment.site_packages.relative_to(environment.path) / folder


def _rewrite_metadata(folder: Path, record: Sequence[str], dropped: set[str]) -> None:
    """Remove omitted files from RECORD, and dropped lines from entry_points.txt."""
    members = set(record)
    lines = [line for line in (folder / "RECORD").read_text().splitlines() if line.split(",")[0].strip('"') in members]
    files.write(folder / "RECORD", "\n".join(sorted(lines)) + "\n")
    if dropped:
        entries = folder / "entry_points.txt"
        text = entries.read_text().splitlines()
        if absent := dropped - {line.strip() for line in text}:
            raise ImageError(f"leave-out.toml names entry points that do not exist:{listed(sorted(absent))}")
        files.write(entries, "\n".join(line for line in text if line.strip() not in dropped) + "\n")


def _size(distribution: Distribution) -> int:
    paths = [Path(str(distribution.locate_file(member))) for member in distribution.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy(source, target)  # another file system, or one without hard links
