"""Tasks as doit has them: one for each stage of each package, and one for each command."""

from __future__ import annotations

import errno
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from doit.exceptions import TaskFailed

from voltforge.commands import interrupts
from voltforge.commands.reporter import ANNOUNCED
from voltforge.errors import VoltforgeError, remedy
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.run_lock import RunLock
from voltforge.pipeline.stage import Stage
from voltforge.sources.recipe import CHOICES, SOURCE, Recipe, load
from voltforge.system import console

MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors that come from the machine and not from a fault in the program: they are printed without a traceback."""


def package_tasks(pipeline: Pipeline, kind: str, doc: str | None) -> Iterator[dict[str, Any]]:
    """Yield a task for every package that has a stage of that kind. All of them together download at once first."""
    yield {"name": None, "doc": doc, "task_dep": ["downloads"]}
    for recipe in pipeline.recipes.values():
        if stage := pipeline.package(recipe).stages.get(kind):
            yield {**of(stage, pipeline), "name": recipe.name, "doc": recipe.summary}


def wheels(pipeline: Pipeline, doc: str | None) -> Iterator[dict[str, Any]]:
    """Yield the tasks of all wheels; a package with several variants is announced before the first stage runs."""
    for task in package_tasks(pipeline, "wheels", doc):
        recipe = pipeline.recipes.get(task["name"])
        if recipe and recipe.name in CHOICES:
            task["meta"] = {ANNOUNCED: lambda recipe=recipe: variant_sentence(recipe)}
        yield task


def variant_sentence(recipe: Recipe) -> str:
    """Return the variant of a package that is made, and the commands that make the others."""
    variants = {load(path).variant for path in recipe.path.parent.glob(f"{recipe.name}*.toml")} - {recipe.variant}
    ways = [
        f"to {'compile it from source' if variant == SOURCE else f'make the {variant} variant'}: "
        f"./doit {recipe.name}={variant} wheels"
        for variant in sorted(variants)
    ]
    return "; ".join([recipe.summary, *ways])


def of(stage: Stage[Any], checkout: Checkout) -> dict[str, Any]:
    """Return the task of a stage; it is up to date if the stage's own record is current."""
    durations, lock = checkout.durations, checkout.run_lock

    def run_timed() -> None:
        with console.stage(stage.name, durations.usual(stage.name)), durations.measured(stage.name):
            stage.run()

    def is_current() -> bool:
        if stage.current():
            return True
        # The lock is taken here, in doit's own process, because its workers (doit -n) come and go.
        waited = lock.take()
        console.log_to(checkout.scratch / "logs" / "run.log", lock.command)
        return waited and stage.current()

    return {**action(run_timed), "uptodate": [is_current], "task_dep": [before.name for before in stage.after()]}


def downloads(pipeline: Pipeline) -> dict[str, Any]:
    """Return the task that downloads the sources of all packages at once.

    It is skipped offline: there each ``fetch`` task reports the file that it lacks.
    """
    is_current = lambda: pipeline.store.offline or not pipeline.missing_sources()  # noqa: E731
    return {**action(pipeline.download, lock=pipeline.run_lock), "uptodate": [is_current]}


def action(
    work: Callable[..., Any] | str, *arguments: Any, lock: RunLock | None = None, takes_names: bool = False
) -> dict[str, Any]:
    """Return a task that calls ``work``; a VoltforgeError is printed without a traceback.

    Args:
        work: the function, or its module and name: ``commands.doctor:report``. Such a module is imported when the task
            runs: each `./doit` would wait for all of them otherwise.
        arguments: its arguments.
        lock: the run lock to take first, if any.
        takes_names: pass the words that follow the task on the command line as further arguments.
    """

    def guarded(names: Sequence[str] = ()) -> TaskFailed | None:
        interrupts.treat_signals_like_ctrl_c()
        try:
            if lock:
                lock.take()
            call = pkgutil.resolve_name(f"voltforge.{work}") if isinstance(work, str) else work
            call(*arguments, *names)
        except VoltforgeError as error:
            return _failed(error)
        except OSError as error:
            if error.errno not in MACHINE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            return _failed(VoltforgeError(f"{where}{error.strerror}", hint=remedy(error.strerror, "check its owner")))
        except KeyboardInterrupt:
            interrupts.exit_interrupted()
        return None

    named = {"pos_arg": "names"} if takes_names else {}
    return {"actions": [guarded], "verbosity": 2, "io": {"capture": False}, **named}


def locked(work: Callable[..., Any] | str, pipeline: Pipeline, *arguments: Any) -> dict[str, Any]:
    """Return a task that calls ``work`` with the pipeline while no other run is at work in the checkout."""
    return action(work, pipeline, *arguments, lock=pipeline.run_lock)


def _failed(error: VoltforgeError) -> TaskFailed:
    """Return the failure for doit, which exits with status 1; for another status, print the error and exit now."""
    if error.exit_status != VoltforgeError.exit_status:
        console.error(error)
        raise SystemExit(error.exit_status)
    failed = TaskFailed(error.what)
    failed.problem = error
    return failed
