"""The program that builds images: buildah, podman or docker."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.errors import VoltforgeError, remedy
from voltforge.sources import distro
from voltforge.system import console
from voltforge.system.process import ProgramFailed, run

KINDS = ("buildah", "podman", "docker")
"""In the order of preference: the first two need no daemon and write the same bytes each time."""

OCI = ("--layers", "--force-rm", "--timestamp", "0", "--format", "oci")
"""Options of buildah and podman for an image in the OCI format with one layer per instruction."""


class EngineError(VoltforgeError):
    """A container engine failed; ``output`` holds the end of its output."""

    def __init__(self, engine: str, action: str, output: str) -> None:
        # Log lines (time=…) report retries; the last line repeats their reason.
        lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("time=")]
        super().__init__(
            f"{engine} could not {action}: {' '.join(_shortened(line) for line in lines[-4:])}",
            hint=remedy(output, "if the base cannot be pulled: ./doit image:base makes one"),
        )
        self.output = output


@dataclass(frozen=True)
class Engine:
    """A container engine on PATH."""

    kind: str
    """One of :data:`KINDS`."""
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"

    def load(self, root: Path, tag: str) -> None:
        """Make an image of one layer from a root file system in a tar file.

        Raises:
            EngineError: the engine fails.
        """
        if self.kind != "buildah":
            self._run(["import", root, tag], f"load {root.name}")
            return
        container = self._run(["from", "scratch"], "create a container").split()[-1]
        try:
            self._run(["add", container, root, "/"], f"load {root.name}")
            self._run(["commit", "--timestamp", "0", container, tag], f"store {root.name}")
        finally:
            self._run(["rm", container], "remove a container")

    def build(
        self, dockerfile: Path, context: Path, tag: str, arguments: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        """Build an image with one layer per instruction; equal contexts give equal layers.

        Args:
            dockerfile: the instructions.
            context: the folder that they copy from.
            tag: the image's name in the engine's store.
            arguments: build arguments.
            labels: labels of the image (the OCI's pre-defined annotation keys, and ours).

        Raises:
            EngineError: the build fails.
        """
        command = {
            "buildah": ["bud", "--isolation", "chroot", *OCI],
            "podman": ["build", *OCI],
            "docker": ["buildx", "build", "--load", "--provenance=false", "--build-arg", "SOURCE_DATE_EPOCH=0"],
        }[self.kind]
        options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        options += [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
        self._run([*command, *options, "--tag", tag, "--file", dockerfile, context], f"build {tag}")

    def export(self, tag: str, folder: Path, name: str) -> None:
        """Write an image to a new OCI image layout (image-layout.md of the OCI image-spec), under a short name.

        Layers are compressed with zstd, which docker reads since 23.0: measured here, they are a fifth smaller than
        with gzip, and faster to write.

        Raises:
            EngineError: the engine fails, or docker is the engine and skopeo, which writes the layout, is missing.
        """
        action, target = f"export {tag}", f"oci:{folder}:{name}"
        if self.kind != "docker":
            self._run(["push", "--format", "oci", "--compression-format", "zstd", tag, target], action)
        elif shutil.which("skopeo"):
            command = ["skopeo", "copy", "--dest-compress-format", "zstd", f"docker-daemon:{tag}", target]
            _call(command, "docker", action)
        else:
            raise EngineError("docker", action, f"skopeo is not installed; {distro.install_command(['skopeo'])}")

    def image_id(self, tag: str) -> str:
        """Return the id of an image in the engine's store; empty if the store has none under that tag."""
        field = "{{.FromImageID}}" if self.kind == "buildah" else "{{.Id}}"
        try:
            return run([self.kind, "inspect", "--type", "image", "--format", field, tag]).output.strip()
        except ProgramFailed:
            return ""

    def _run(self, words: Sequence[str | Path], action: str) -> str:
        return _call([self.kind, *words], self.kind, action)


def choose() -> Engine:
    """Return the first engine that is installed and runs.

    Raises:
        VoltforgeError: there is none.
    """
    for kind in KINDS:
        try:
            output = run([kind, "version" if kind == "docker" else "--version"], timeout=20).output
        except ProgramFailed:
            continue
        return Engine(kind, next(word for word in output.split() if word[0].isdigit()))
    raise VoltforgeError(
        "no container engine was found: buildah and podman are not installed, docker is not running",
        hint=distro.install_command(["buildah"]),
    )


def _call(words: Sequence[str | Path], engine: str, action: str) -> str:
    try:
        with console.progress(engine) as tell:
            return run(words, watch=lambda line, _: tell(line) if line else None).output
    except ProgramFailed as error:
        raise EngineError(engine, action, error.output or error.what) from error


def _shortened(line: str) -> str:
    """Cut the middle out of a long line: the reason is at its end."""
    return line if len(line) <= 300 else f"{line[:100]} … {line[-200:]}"
