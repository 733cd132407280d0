"""Small images, built by the container engine of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from voltforge.image import container_engine, oci_layout


def small_image(folder: Path, tag: str, content: str, label: str = "b", *, stays: bool = False) -> Path:
    """An image of two small layers, built by the engine that is here, as a layout with a health check.

    With ``stays`` the engine goes on to have it.
    """
    (folder / "context/one").mkdir(parents=True)
    (folder / "context/two").mkdir()
    (folder / "context/one/a.txt").write_text("a")
    (folder / "context/two/b.txt").write_text(content)
    (folder / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY one/ /\nCOPY two/ /\nUSER 1000\n")
    chosen = container_engine.choose()
    chosen.build(folder / "Dockerfile", folder / "context", tag, {"BASE": "scratch"}, {"a.label": label})
    chosen.export(tag, folder / "layout", "1.0")
    oci_layout.complete(folder / "layout", "localhost/voltforge-test:1.0", {"Test": ["CMD", "true"]})
    oci_layout.pack(folder / "layout", folder / "image.tar")
    if not stays:
        subprocess.run([chosen.kind, "rmi", "--force", tag], check=True, capture_output=True)
    return folder / "image.tar"
