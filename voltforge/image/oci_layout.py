"""OCI image layouts: completed as Docker's engine reads them, and packed into archives of equal bytes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voltforge.system import files

BASE_DIGEST = "org.opencontainers.image.base.digest"
IMAGE_NAME = "io.containerd.image.name"
"""The annotation from which podman and containerd take an image's full name when they load an archive."""


def complete(layout: Path, name: str, healthcheck: Mapping[str, Any]) -> None:
    """Write the image's full name and its health check into a layout of one image.

    The OCI format has no field for a health check, so engines that write it drop a Dockerfile's HEALTHCHECK; Docker's
    engine reads the field all the same. buildah's names of cached steps are removed: they differ between machines.
    """
    index = json.loads((layout / "index.json").read_text())
    [entry] = index["manifests"]
    manifest = json.loads(_blob(layout, entry).read_text())
    config = json.loads(_blob(layout, manifest["config"]).read_text())
    replaced = _blob(layout, entry), _blob(layout, manifest["config"])
    config["config"]["Healthcheck"] = dict(healthcheck)
    for step in config["history"]:
        step.pop("comment", None)
    manifest.get("annotations", {}).pop(BASE_DIGEST, None)
    manifest["config"] |= _add_blob(layout, config)
    entry |= _add_blob(layout, manifest)
    entry["annotations"] = {**entry.get("annotations", {}), IMAGE_NAME: name}
    (layout / "index.json").write_text(json.dumps(index, separators=(",", ":")))
    for path in replaced:
        path.unlink()


def layer_sizes(layout: Path) -> list[tuple[str, int]]:
    """Return the digest and the compressed bytes of every layer of a layout of one image, in order."""
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads(_blob(layout, entry).read_text())
    return [(layer["digest"], layer["size"]) for layer in manifest["layers"]]


def pack(layout: Path, path: Path) -> None:
    """Pack a layout into an OCI archive; equal layouts give equal bytes."""

    def normalized(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with files.replacing(path) as sink, tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(layout.rglob("*")):
            tar.add(file, str(file.relative_to(layout)), recursive=False, filter=normalized)


def _blob(layout: Path, descriptor: Mapping[str, Any]) -> Path:
    return layout / "blobs" / str(descriptor["digest"]).replace(":", "/")


def _add_blob(layout: Path, value: Any) -> dict[str, Any]:
    """Write a JSON blob and return its digest and size, as a descriptor has them."""
    data = json.dumps(value, separators=(",", ":")).encode()
    digest = files.sha256_bytes(data)
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}
