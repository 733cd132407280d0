"""`./doit thin`: remove the device code of other GPUs from any wheel."""

from __future__ import annotations

from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console
from voltforge.system.files import size
from voltforge.wheel import thin, wheelfile


def thin_wheel(pipeline: Pipeline) -> None:
    """Write a copy of the wheel that ``file=`` names to build/thin/, with the device code of ``arch=`` only.

    Raises:
        VoltforgeError: the wheel is missing, or holds something that cannot be thinned.
    """
    path, archs = Path(pipeline.settings.file), pipeline.settings.arch.replace(",", ";").split(";")
    if not path.is_file():
        what = f"{path} does not exist" if pipeline.settings.file else "no wheel was given"
        raise VoltforgeError(what, hint="./doit thin file=PATH.whl arch=7.0")
    console.step(f"thin {path.name} to {', '.join(archs)}")
    settings = pipeline.thin(wheelfile.Wheel.read(path).name)
    thinned = thin.thin_wheel(path, pipeline.scratch / "thin", archs, settings=settings)
    before, after = path.stat().st_size, thinned.stat().st_size
    console.note(f"{thinned.relative_to(pipeline.root)}: {size(after)}, before {size(before)}")
