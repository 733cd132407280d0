"""The stages of the runtime image: a base of the distribution's packages, and the OCI archive."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.tags import sys_tags

from voltforge.gpu import triton_kernels
from voltforge.image import container_engine, layers, oci_layout
from voltforge.image.layers import Content, Part
from voltforge.image.leave_out import ImageError, LeaveOut
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import distro, environment, locks
from voltforge.sources.environment import Environment
from voltforge.system import console, files
from voltforge.system.process import ProgramFailed, run
from voltforge.system.records import CheckoutPath
from voltforge.wheel.wheelfile import Wheel

NAME = "localhost/voltforge"
BASE = "localhost/voltforge-base"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = ("python3", "libpython3-dev", "g++", "libc6-dev", "ca-certificates")
"""The packages of a base: the interpreter, and the compiler and headers that Triton and Inductor need."""
PROJECTS = ("torch", "vllm")
"""The projects that the wheelhouse must have."""
EMPTIED = ("etc/apt/sources.list", "etc/hostname", "etc/resolv.conf", "var/log/apt", "var/log/dpkg.log",
           "var/log/alternatives.log", "var/log/bootstrap.log", "var/cache/ldconfig/aux-cache")  # fmt: skip
"""The files of a base that differ from machine to machine, or from hour to hour."""
MODULES = (sys.modules[__name__], container_engine, layers, oci_layout, triton_kernels)
CODE = tuple(Path(str(module.__file__)) for module in MODULES)
"""The modules that decide how an image is made: a change of one makes another image."""
KERNELS = Path("/opt/voltforge/triton-cache")
"""The folder of the precompiled kernels in the image; docker/start.py has the same."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "0"}
"""The environment in which mmdebstrap runs."""
HEALTHCHECK = {
    "Test": ["CMD", "/opt/vllm/bin/python", "/opt/voltforge/start.py", "--is-healthy"],
    "Interval": 30 * 10**9, "Timeout": 10 * 10**9, "StartPeriod": 600 * 10**9, "Retries": 3,
}  # fmt: skip
"""Times are in nanoseconds. The start period is long because a first start compiles for minutes."""


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
    name: str
    """The full name of the image: ``localhost/voltforge:0.12.0-sm70``."""
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


class RuntimeImage:
    """The stages ``image:base`` and ``image`` of a checkout."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.folder = pipeline.scratch / "image"

    @property
    def base(self) -> Stage[BaseImage]:
        """The stage that makes a root file system of the distribution's packages; no registry is needed."""
        return self.pipeline.stage("image:base", BaseImage, self._base_inputs, self._bootstrap, _present)

    @property
    def image(self) -> Stage[ImageArchive]:
        """The stage that makes the archive."""
        base: list[Stage[Any]] = [] if self.pipeline.settings.base else [self.base]
        return self.pipeline.stage(
            "image", ImageArchive, self._inputs, self._build, lambda archive: files.sha256(archive.path),
            after=lambda: base,
        )  # fmt: skip

    def why(self) -> None:
        """Print the sizes of the image, and what was left out and why.

        Raises:
            NotRun: the image was not made.
        """
        archive = self.image.result()
        _print_sizes(Content(archive.projects, archive.layers, archive.left_out), archive.base_size)

    def wheels(self) -> dict[str, Wheel]:
        """Return the wheels of the image by project, for the running Python.

        Raises:
            ImageError: one is missing.
        """
        tags = set(sys_tags())
        found = {wheel.name: wheel for wheel in self.pipeline.wheelhouse.wheels() if not tags.isdisjoint(wheel.tags)}
        if missing := [name for name in PROJECTS if name not in found]:
            raise ImageError(
                f"the wheelhouse has no {' and no '.join(missing)} for Python {PYTHON}",
                hint="./doit wheels",
            )
        return {name: found[name] for name in PROJECTS}

    # The inputs of the stages.

    def _base_inputs(self) -> Values:
        return {"suite": distro.codename(), "packages": list(PACKAGES), "engine": str(container_engine.choose())}

    def _inputs(self) -> Values:
        docker = self.pipeline.root / "docker"
        base = self.pipeline.settings.base
        return {
            "wheels": {wheel.path.name: files.sha256(wheel.path) for wheel in self.wheels().values()},
            "lock": files.sha256(self._lock()),
            "python": environment.interpreter(),
            "files": {name: files.sha256(docker / name) for name in ("Dockerfile", "start.py", "leave-out.toml")},
            "base": base or self.base.result().id,
            "engine": str(container_engine.choose()),
            "code": {path.name: files.sha256(path) for path in CODE},
            "kernels": triton_kernels.precompile_inputs(self.pipeline),
        }

    def _lock(self) -> Path:
        return self.pipeline.root / "recipes" / "locks" / "vllm-runtime.txt"

    # The work of the stages.

    def _bootstrap(self, _: str) -> BaseImage:
        engine, suite = container_engine.choose(), distro.codename()
        mirrors = distro.mirrors()
        if not suite or not mirrors:
            hint = "./doit base=python:3.X-slim image"
            raise ImageError("no base can be made: this machine has no apt sources", hint=hint)
        console.step(f"base of {distro.name()}, Python {PYTHON}")
        root = self.folder / "base.tar"
        root.parent.mkdir(parents=True, exist_ok=True)
        empty = " ".join(f'"$1"/{path}' for path in EMPTIED)
        command: list[str | Path] = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
                 *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")),
                 "--dpkgopt=path-include=/usr/share/doc/*/copyright",
                 f"--customize-hook=rm -rf {empty}", suite, root, f"deb {mirrors[0]} {suite} main"]  # fmt: skip
        try:
            with console.progress("mmdebstrap") as tell:
                run(command, env=ENVIRONMENT, watch=lambda line, _: tell(line) if line else None)
        except ProgramFailed as error:
            hint = distro.install_command(["mmdebstrap"]) if error.status is None else "./doit doctor"
            raise ImageError(
                f"mmdebstrap could not make a base: {error.output[-300:] or error.what}", hint=hint
            ) from error
        tag = f"{BASE}:{suite}"
        engine.load(root, tag)
        size = root.stat().st_size
        files.remove(root)
        console.note(f"{tag}, {files.size(size)}")
        return BaseImage(tag, engine.image_id(tag), size)

    def _build(self, _: str) -> ImageArchive:
        engine, wheels = container_engine.choose(), self.wheels()
        tag = f"{wheels['vllm'].version.public}-sm70"
        name = f"{NAME}:{tag}"
        console.step(f"image {name} with {engine}, of {', '.join(wheel.path.name for wheel in wheels.values())}")
        context, layout = self.folder / "context", self.folder / "layout"
        for stale in (context, layout):
            files.remove(stale)
        installed = self._install(wheels)
        content = self._lay_out(installed, context)
        base = self.pipeline.settings.base or self.base.result().tag
        dockerfile = self.pipeline.root / "docker" / "Dockerfile"
        engine.build(dockerfile, context, name, {"BASE": base, "PYTHON": PYTHON}, self._labels(wheels, tag))
        engine.export(name, layout, tag)
        oci_layout.complete(layout, name, HEALTHCHECK)
        compressed = oci_layout.layer_sizes(layout)
        path = self.folder / f"voltforge-{tag}.oci.tar"
        oci_layout.pack(layout, path)
        for folder in (context, layout, installed.path):
            files.remove(folder)
        size = path.stat().st_size
        console.note(f"{path.relative_to(self.pipeline.root)}, {files.size(size)}, {len(compressed)} layers")
        return ImageArchive(
            path, files.sha256(path), size, name, self._base_size(), tuple(compressed),
            dict(content.projects), content.layers, content.left_out,
        )  # fmt: skip

    def _install(self, wheels: Mapping[str, Wheel]) -> Environment:
        """Return an environment with the packages of the lock, and with our wheels in place of the lock's."""
        lock = self.folder / "runtime.txt"
        files.write(lock, "".join(pin.text for pin in locks.read(self._lock()) if pin.name not in PROJECTS))
        store = self.pipeline.store
        installed = environment.create(lock, self.folder / "environment", store.indexes, offline=store.offline)
        for wheel in wheels.values():
            environment.install_wheel(installed, wheel.path)
        if unmet := environment.unmet_requirements(installed):
            raise ImageError(f"the wheels do not fit together: {'; '.join(unmet)}", hint="./doit lock, ./doit wheels")
        return installed

    def _lay_out(self, installed: Environment, context: Path) -> Content:
        """Fill the build context with the layers, the precompiled kernels and the start script."""
        docker = self.pipeline.root / "docker"
        leave_out = LeaveOut.load(docker / "leave-out.toml")
        content = layers.lay_out(installed, layers.reachable(installed, PROJECTS), leave_out, context)
        files.write(context / "configuration/opt/voltforge/start.py", (docker / "start.py").read_bytes())
        compiled = context / "kernels" / KERNELS.relative_to("/")
        with layers.united(context, self.folder / "united") as united, console.progress("kernels for 7.0") as tell:
            packages = united / installed.site_packages.relative_to(installed.path)
            summary = triton_kernels.precompile(self.pipeline, installed, packages, compiled, KERNELS, tell)
        console.note(f"{summary}, compiled ahead for 7.0")
        layers.set_modes(context)
        console.note(f"{len(content.projects)} projects, {files.size(sum(content.projects.values()))}")
        return replace(content, layers={**content.layers, "kernels": layers.folder_size(compiled)})

    def _labels(self, wheels: Mapping[str, Wheel], tag: str) -> dict[str, str]:
        """Return the labels of the image: title, version, and the hashes and receipts of its wheels."""
        house, python = self.pipeline.wheelhouse, environment.python_tag()
        receipts = {name: files.read_json(house.receipt(name, python)) for name in wheels}
        return {
            "org.opencontainers.image.title": "voltforge",
            "org.opencontainers.image.description": "vLLM and PyTorch for NVIDIA Volta (compute capability 7.0)",
            "org.opencontainers.image.version": tag,
            **{f"voltforge.{name}.sha256": files.sha256(wheel.path) for name, wheel in wheels.items()},
            **{f"voltforge.{name}.receipt": str(receipt["key"]) for name, receipt in receipts.items() if receipt},
        }

    def _base_size(self) -> int:
        return 0 if self.pipeline.settings.base else self.base.result().size


def _present(base: BaseImage) -> str:
    """Return the id of the image that the engine has under the tag of the base."""
    return container_engine.choose().image_id(base.tag)


def _print_sizes(content: Content, base: int, largest: int = 25) -> None:
    """Print sizes by layer and by project, and what was left out."""
    sizes = {"base": base, **{name: content.layers[name] for name in layers.LAYERS}}
    rows = [(name, files.size(size)) for name, size in sizes.items() if size]
    rows.append(("all", files.size(sum(sizes.values()))))
    console.table("layers", ("layer", "uncompressed"), rows)
    projects = sorted(content.projects.items(), key=lambda item: -item[1])
    rows = [(name, files.size(size)) for name, size in projects[:largest]]
    rows.append((f"{len(projects[largest:])} others", files.size(sum(size for _, size in projects[largest:]))))
    console.table("projects", ("project", "uncompressed"), rows)
    parts = [(part.what, files.size(part.size), part.why) for part in content.left_out]
    console.table("left out", ("what", "size", "why"), parts)
