"""The runtime image of a checkout: its base, its environment, its layers, and the archive that comes out."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.tags import sys_tags

from voltforge.gpu import triton_kernels
from voltforge.image import container_engine, layers
from voltforge.image.layers import Content, ImageError, LeaveOut, Part
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import distro, environment
from voltforge.sources.environment import Environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.system.records import CheckoutPath
from voltforge.wheel.wheelfile import Wheel

NAME = "localhost/voltforge"
BASE = "localhost/voltforge-base"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = ("python3", "libpython3-dev", "g++", "libc6-dev", "ca-certificates")
"""What a base needs: the interpreter, and for Triton and Inductor a compiler and headers."""
PROJECTS = ("torch", "vllm")
"""What must be in the wheelhouse."""
EMPTIED = ("etc/apt/sources.list", "etc/hostname", "etc/resolv.conf", "var/log/apt", "var/log/dpkg.log",
           "var/log/alternatives.log", "var/log/bootstrap.log", "var/cache/ldconfig/aux-cache")  # fmt: skip
"""What in a base speaks of the machine or the hour that it was made on."""
CODE = (Path(__file__), Path(container_engine.__file__), Path(layers.__file__), Path(triton_kernels.__file__))
"""What decides besides its inputs how an image is made; a change of it makes another."""
KERNELS = Path("/opt/voltforge/triton-cache")
"""Where in the image the kernels lie that are compiled ahead; start.py has the same."""
HEALTHCHECK = {
    "Test": ["CMD", "/opt/vllm/bin/python", "/opt/voltforge/start.py", "--is-healthy"],
    "Interval": 30 * 10**9, "Timeout": 10 * 10**9, "StartPeriod": 600 * 10**9, "Retries": 3,
}  # fmt: skip
"""In nanoseconds; a first start compiles for minutes."""


@dataclass(frozen=True)
class BaseImage:
    """A root file system in the store of the container engine."""

    tag: str
    id: str
    """The engine's digest of the image."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class ImageArchive:
    """The runtime image as an OCI archive."""

    path: CheckoutPath
    sha256: str
    size: int
    """In bytes."""
    tags: tuple[str, ...]
    base_size: int
    """Bytes of the base that voltforge made; 0 for a base from a registry."""
    compressed: tuple[tuple[str, int], ...]
    """Digest and bytes of each layer as it is in the archive."""
    projects: Mapping[str, int]
    """Bytes of each project."""
    layers: Mapping[str, int]
    """Bytes of each layer, uncompressed."""
    left_out: tuple[Part, ...]
    """Parts of the environment that the image does not need."""


class Runtime:
    """The stages of the image: ``base`` and ``image``."""

    def __init__(self, checkout: Pipeline) -> None:
        self.checkout = checkout
        self.folder = checkout.scratch / "image"

    @property
    def base(self) -> Stage[BaseImage]:
        """A root file system of the distribution's own packages, for where no registry can be reached."""
        return self.checkout.stage("image:base", BaseImage, self._packages, self._bootstrap, _present)

    @property
    def image(self) -> Stage[ImageArchive]:
        """The archive."""
        # Without wheels that is said at once, and no base made before.
        there = all(any(self.checkout.wheelhouse.path.glob(f"{name}-*.whl")) for name in PROJECTS)
        first = [] if self.checkout.settings.base else [self.base]
        after: list[Stage[Any]] = first if there else []
        seal = lambda archive: files.sha256(archive.path)  # noqa: E731
        return self.checkout.stage("image", ImageArchive, self._made_of, self._build, seal, after=lambda: after)

    def why(self) -> None:
        """Print the sizes of the image, and what was left out and why; it must have been made."""
        archive = self.image.result()
        layers.why(Content(archive.projects, archive.layers, archive.left_out), archive.base_size)

    def wheels(self) -> dict[str, Wheel]:
        """The wheels of the wheelhouse that go in, by project, for the Python that runs.

        Raises:
            ImageError: one is missing.
        """
        ours = set(sys_tags())
        found = {one.name: one for one in self.checkout.wheelhouse.wheels() if not ours.isdisjoint(one.tags)}
        if missing := [name for name in PROJECTS if name not in found]:
            raise ImageError(
                f"the wheelhouse has no {' and no '.join(missing)} for Python {PYTHON}",
                hint="./doit torch=thin wheels, or ./doit wheels",
            )
        return {name: found[name] for name in PROJECTS}

    # What the stages are made of.

    def _packages(self) -> Values:
        return {"suite": distro.codename(), "packages": list(PACKAGES), "engine": str(container_engine.choose())}

    def _made_of(self) -> Values:
        docker = self.checkout.root / "docker"
        chosen = self.checkout.settings.base
        return {
            "wheels": {one.path.name: files.sha256(one.path) for one in self.wheels().values()},
            "lock": files.sha256(self._lock()),
            "python": environment.interpreter(),
            "files": {name: files.sha256(docker / name) for name in ("Dockerfile", "start.py", "leave-out.toml")},
            "base": chosen or self.base.result().id,
            "engine": str(container_engine.choose()),
            "code": {path.name: files.sha256(path) for path in CODE},
            "kernels": triton_kernels.precompile_inputs(self.checkout),
        }

    def _lock(self) -> Path:
        return self.checkout.root / "recipes" / "locks" / "vllm-runtime.txt"

    # What they do.

    def _bootstrap(self, _: str) -> BaseImage:
        chosen, suite = container_engine.choose(), distro.codename()
        mirrors = distro.mirrors()
        if not suite or not mirrors:
            raise ImageError("no base can be made: this machine has no apt sources", hint="base=python:3.X-slim")
        console.step(f"base of {distro.name()}, Python {PYTHON}")
        root = self.folder / "base.tar"
        root.parent.mkdir(parents=True, exist_ok=True)
        empty = " ".join(f'"$1"/{path}' for path in EMPTIED)
        words: list[str | Path] = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
                 *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")),
                 f"--customize-hook=rm -rf {empty}", suite, root, f"deb {mirrors[0]} {suite} main"]  # fmt: skip
        try:
            with console.progress("mmdebstrap") as tell:
                run(
                    words,
                    env={**_plain_environment(), "SOURCE_DATE_EPOCH": "0"},
                    watch=lambda line, _: tell(line) if line else None,
                )
        except ProgramFailed as error:
            hint = distro.install_command(["mmdebstrap"]) if error.status is None else "./doit doctor"
            raise ImageError(
                f"mmdebstrap could not make a base: {error.output[-300:] or error.what}", hint=hint
            ) from error
        tag = f"{BASE}:{suite}"
        chosen.load(root, tag)
        size = root.stat().st_size
        files.remove(root)
        console.note(f"{tag}, {files.size(size)}")
        return BaseImage(tag, str(chosen.identity(tag)), size)

    def _build(self, _: str) -> ImageArchive:
        chosen, wheels = container_engine.choose(), self.wheels()
        base = self.checkout.settings.base or self.base.result().tag
        vllm = wheels["vllm"].version.public
        tags = [f"{vllm}-sm70", "latest"]
        console.step(f"image {NAME}:{tags[0]} with {chosen}, of {', '.join(one.path.name for one in wheels.values())}")
        context, layout = self.folder / "context", self.folder / "layout"
        for stale in (context, layout):
            files.remove(stale)
        settled = self._settle(wheels)
        leave_out = LeaveOut.load(self.checkout.root / "docker" / "leave-out.toml")
        content = layers.lay_out(settled, layers.reachable(settled, PROJECTS), leave_out, context)
        configuration = context / "configuration" / "opt" / "voltforge"
        files.write(configuration / "start.py", (self.checkout.root / "docker" / "start.py").read_bytes())
        compiled = context / "kernels" / KERNELS.relative_to("/")
        with layers.united(context, self.folder / "united") as united, console.progress("kernels for 7.0") as tell:
            packages = united / settled.site_packages.relative_to(settled.path)
            said = triton_kernels.precompile(self.checkout, settled, packages, compiled, KERNELS, tell)
        console.note(f"{said}, compiled ahead for 7.0")
        sizes = {**content.layers, "kernels": layers.weight(compiled)}
        layers.set_modes(context)
        console.note(f"{len(content.projects)} projects, {files.size(sum(content.projects.values()))}")
        labels = {
            "org.opencontainers.image.title": "voltforge",
            "org.opencontainers.image.description": "vLLM and PyTorch for NVIDIA Volta (compute capability 7.0)",
            "org.opencontainers.image.version": tags[0],
            **{f"voltforge.{name}.sha256": files.sha256(one.path) for name, one in wheels.items()},
            **{f"voltforge.{name}.receipt": key for name, key in self._receipts(wheels).items()},
        }
        words = {"BASE": base, "PYTHON": PYTHON}
        chosen.build(self.checkout.root / "docker" / "Dockerfile", context, f"{NAME}:{tags[0]}", words, labels)
        chosen.export(f"{NAME}:{tags[0]}", layout, tags)
        layers.complete(layout, HEALTHCHECK)
        compressed = layers.compressed(layout)
        path = self.folder / f"voltforge-{tags[0]}.oci.tar"
        layers.archive(layout, path)
        for done in (context, layout, settled.path):
            files.remove(done)
        console.note(
            f"{path.relative_to(self.checkout.root)}, {files.size(path.stat().st_size)}, {len(compressed)} layers"
        )
        return ImageArchive(
            path, files.sha256(path), path.stat().st_size, tuple(tags), self._base_size(), tuple(compressed),
            dict(content.projects), sizes, tuple(content.left_out),
        )  # fmt: skip

    def _settle(self, wheels: dict[str, Wheel]) -> Environment:
        """An environment with what the lock names, and our own wheels in place of the lock's."""
        pins = re.split(r"(?m)^(?=[a-z0-9])", self._lock().read_text(encoding="utf-8"))
        lock = self.folder / "runtime.txt"
        files.write(lock, "".join(pin for pin in pins if pin.split("==")[0] not in PROJECTS))
        store = self.checkout.store
        settled = environment.create(lock, self.folder / "environment", store.indexes, offline=store.offline)
        for one in wheels.values():
            environment.install_wheel(settled, one.path)
        if unmet := environment.unmet_requirements(settled):
            raise ImageError(f"the wheels do not go together: {'; '.join(unmet)}", hint="./doit lock, ./doit wheels")
        return settled

    def _receipts(self, wheels: dict[str, Wheel]) -> dict[str, str]:
        kept = {
            name: files.read_json(self.checkout.wheelhouse.receipt(name, environment.python_tag())) for name in wheels
        }
        return {name: str(receipt["key"]) for name, receipt in kept.items() if receipt}

    def _base_size(self) -> int:
        return 0 if self.checkout.settings.base else self.base.result().size


def _present(base: BaseImage) -> str:
    """Return the id of the image that the engine has under the tag of the base."""
    return str(container_engine.choose().identity(base.tag))


def _plain_environment() -> dict[str, str]:
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
