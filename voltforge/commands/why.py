"""`./doit why`: print which inputs of a stage changed since its last run."""

from __future__ import annotations

from voltforge.errors import VoltforgeError
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import shown
from voltforge.system import console


def explain(pipeline: Pipeline, runtime: RuntimeImage, *names: str) -> None:
    """Print the recorded and the current value of each changed input; without names, for all wheels.

    Raises:
        VoltforgeError: there is no such stage.
    """
    stages = {**pipeline.stages(), **{stage.name: stage for stage in (runtime.base, runtime.image)}}
    if unknown := [name for name in names if name not in stages]:
        raise VoltforgeError(
            f"{', '.join(unknown)}: no such stage", hint=f"./doit why NAME, with one of {', '.join(stages)}"
        )
    for name in names or [name for name in stages if name.startswith("wheels:")]:
        console.step(name)
        try:
            reason = stages[name].reason()
            changes = [] if reason else stages[name].changes()
        except VoltforgeError as error:
            changes, reason = [], f"unknown until an earlier stage has run: {error.what}, {error.hint}"
        if changes:
            rows = [(change.name, shown(change.old), shown(change.new)) for change in changes]
            console.table("", ("changed since the last run", "then", "now"), rows)
        else:
            console.note(reason or "nothing changed")
