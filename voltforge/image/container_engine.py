"""The program that builds images: buildah, podman or docker, whichever is there."""

from __future__ import annotations

import json
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
REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation by which an image in a layout is called (annotations.md of the OCI's image-spec)."""


class EngineError(VoltforgeError):
    """An image that could not be built; ``output`` holds the end of what the engine said."""

    def __init__(self, engine: str, what: str, output: str) -> None:
        # What it tried again stands in its log lines, and once more in the last one.
        said = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("time=")]
        super().__init__(
            f"{engine} could not {what}: {' '.join(_shortened(line) for line in said[-4:])}",
            hint=remedy(output, "a base that cannot be had: ./doit image:base makes one"),
        )
        self.output = output


@dataclass(frozen=True)
class Engine:
    """One of the engines, as found on PATH."""

    kind: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"

    def load(self, root: Path, tag: str) -> None:
        """Make a root file system in a tar file an image of one layer.

        Raises:
            EngineError: the engine refuses.
        """
        if self.kind != "buildah":
            self._run(["import", root, tag], f"load {root.name}")
            return
        container = self._run(["from", "scratch"], "begin an image").split()[-1]
        try:
            self._run(["add", container, root, "/"], f"load {root.name}")
            self._run(["commit", "--timestamp", "0", container, tag], f"keep {root.name}")
        finally:
            self._run(["rm", container], "clean up")

    def build(
        self, dockerfile: Path, context: Path, tag: str, words: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        """Build an image of which each instruction is a layer; equal contexts give equal layers.

        Args:
            dockerfile: the instructions.
            context: the folder that they copy from.
            tag: its name in the engine's store.
            words: build arguments.
            labels: what the image says about itself (the OCI's pre-defined annotation keys, and ours).

        Raises:
            EngineError: it failed.
        """
        own = {
            "buildah": [
                "bud",
                "--isolation",
                "chroot",
                "--layers",
                "--force-rm",
                "--timestamp",
                "0",
                "--format",
                "oci",
            ],
            "podman": ["build", "--layers", "--force-rm", "--timestamp", "0", "--format", "oci"],
            "docker": ["buildx", "build", "--load", "--provenance=false"],
        }
        arguments = [word for name, value in words.items() for word in ("--build-arg", f"{name}={value}")]
        if self.kind == "docker":
            arguments += ["--build-arg", "SOURCE_DATE_EPOCH=0"]
        arguments += [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
        self._run([*own[self.kind], *arguments, "--tag", tag, "--file", dockerfile, context], f"build {tag}")

    def export(self, tag: str, folder: Path, names: Sequence[str]) -> None:
        """Write an image under some names to a new OCI image layout (image-layout.md of the OCI's image-spec).

        Layers are compressed with zstd, which docker reads since 23.0: a fifth smaller than gzip here, and faster.

        Raises:
            EngineError: the engine refuses, or docker is the engine and skopeo is not there to write the layout.
        """
        if self.kind == "docker" and not shutil.which("skopeo"):
            raise EngineError(
                "docker", "export the image", f"skopeo is not installed; {distro.install_command(['skopeo'])}"
            )
        first, *others = names
        what, place = f"export {tag}", f"oci:{folder}:{first}"
        if self.kind == "docker":
            words = ["skopeo", "copy", "--dest-compress-format", "zstd", f"docker-daemon:{tag}", place]
            _call(words, "docker", what)
        else:
            self._run(["push", "--format", "oci", "--compression-format", "zstd", tag, place], what)
        # To export it once more under another name would compress all of its layers again.
        index = json.loads((folder / "index.json").read_text())
        [entry] = index["manifests"]
        index["manifests"] += [{**entry, "annotations": {**entry["annotations"], REF_NAME: name}} for name in others]
        (folder / "index.json").write_text(json.dumps(index, separators=(",", ":")))

    def identity(self, tag: str) -> str:
        """The id of an image in the engine's store, or nothing if it is not there."""
        words = [
            "inspect",
            "--type",
            "image",
            "--format",
            "{{.FromImageID}}" if self.kind == "buildah" else "{{.Id}}",
            tag,
        ]
        try:
            return run([self.kind, *words]).output.strip()
        except ProgramFailed:
            return ""

    def _run(self, words: Sequence[str | Path], what: str) -> str:
        return _call([self.kind, *words], self.kind, what)


def choose() -> Engine:
    """The first engine that is there and answers.

    Raises:
        VoltforgeError: there is none.
    """
    for kind in KINDS:
        try:
            said = run([kind, "version" if kind == "docker" else "--version"], timeout=20).output
        except ProgramFailed:
            continue
        return Engine(kind, next(word for word in said.split() if word[0].isdigit()))
    hint = distro.install_command(["buildah"])
    raise VoltforgeError(
        "no engine that builds images is here: neither buildah, podman nor a running docker", hint=hint
    )


def _call(words: Sequence[str | Path], engine: str, what: str) -> str:
    try:
        with console.progress(engine) as tell:
            return run(words, watch=lambda line, _: tell(line) if line else None).output
    except ProgramFailed as error:
        raise EngineError(engine, what, error.output or error.what) from error


def _shortened(line: str) -> str:
    """What went wrong stands at the end of a line that begins with all of its circumstances."""
    return line if len(line) <= 300 else f"{line[:100]} … {line[-200:]}"
