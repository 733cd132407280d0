"""What doit sees: a task per stage and package, one red line for a problem, no traceback for a user's mistake."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from doit.exceptions import BaseFail, InvalidDodoFile, TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter

from voltforge.errors import VoltforgeError, remedy
from voltforge.pipeline.checkout import Checkout, Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.run_lock import RunLock
from voltforge.pipeline.stage import Stage
from voltforge.system import console

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended, as shells give it."""
KEPT = "interrupted: what was finished is kept, the next run goes on from there"
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a machine may refuse a program that makes no mistake."""


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """Says what failed, once; the stages themselves say what they do."""

    desc = "voltforge's own"

    def execute_task(self, task: Any) -> None:
        """Nothing: a stage announces itself when it has something to do."""

    def skip_uptodate(self, task: Any) -> None:
        """Only what was asked for is said to be current, not the stages below it."""
        if task.name.startswith(("wheels:", "lock")):
            console.note(f"{task.name} is current")

    def _write_failure(self, result: Any, **_: Any) -> None:
        failed: BaseFail = result["exception"]
        if isinstance(failed, UnmetDependency):
            return
        problem = getattr(failed, "problem", None)
        console.error(problem or f"{result['task'].name}: {failed.get_msg()}")

    def complete_run(self) -> None:
        """Nothing more: each failure was said when it came."""


def loaded(root: Path, variable: Callable[[str, str], str]) -> Pipeline:
    """The pipeline of a checkout with the command line's ``name=value``.

    Raises:
        InvalidDodoFile: a recipe cannot be used, a variable is none of :class:`Settings`, or makes no sense.
    """
    sys.excepthook = _excepthook
    known = [field.name for field in fields(Settings)]
    given = [word.split("=", 1)[0] for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    if unknown := [name for name in given if name not in known]:
        there_are = ", ".join(f"{name}=" for name in known)
        raise InvalidDodoFile(f"{', '.join(unknown)}: no such variable; there are {there_are}")
    try:
        values = {name: variable(name, getattr(Settings, name)) for name in known}
        # doit's get_var returns None for every name where doit did not parse the command line.
        chosen = {name: value for name, value in values.items() if value is not None}
        pipeline = Pipeline.load(root, Settings(**chosen))
        pipeline.check()
        return pipeline
    except VoltforgeError as error:
        raise InvalidDodoFile(str(error)) from error


def each(pipeline: Pipeline, kind: str) -> Iterator[dict[str, Any]]:
    """A task for every package that has a stage of that kind."""
    for recipe in pipeline.recipes.values():
        if stage := pipeline.package(recipe).stages.get(kind):
            yield {**of(stage, pipeline), "name": recipe.name, "doc": recipe.summary}


def of(stage: Stage[Any], checkout: Checkout) -> dict[str, Any]:
    """The task of one stage: it runs unless the stage's own record says that there is nothing to do."""
    history, turn = checkout.history, checkout.turn

    def timed() -> None:
        with console.stage(stage.name, history.usual(stage.name)), history.measured(stage.name):
            stage.run()

    def nothing_to_do() -> bool:
        if stage.current():
            return True
        # The turn is taken here, in doit's own process, and not by its workers (doit -n).
        waited = turn.take()
        console.log_to(checkout.scratch / "logs" / "run.log", turn.command)
        return waited and stage.current()

    before = [one.name for one in stage.after()]
    return {**action(timed), "uptodate": [nothing_to_do], "task_dep": before}


def downloads(pipeline: Pipeline) -> dict[str, Any]:
    """The task that downloads the sources of all packages at once. Offline each ``fetch`` says what it lacks."""
    nothing_to_do = lambda: pipeline.store.offline or not pipeline.missing_sources()  # noqa: E731
    return {**action(pipeline.download, turn=pipeline.turn), "uptodate": [nothing_to_do]}


def action(
    work: Callable[..., Any], *words: Any, turn: RunLock | None = None, takes_names: bool = False
) -> dict[str, Any]:
    """A task that does one thing, and whose problems are a sentence.

    With ``turn`` it waits until no other run is at work; if it takes names, it is given what follows it on the command
    line.
    """

    def guarded(names: Sequence[str] = ()) -> TaskFailed | None:
        _end_like_ctrl_c()
        try:
            if turn:
                turn.take()
            work(*words, *names)
        except VoltforgeError as error:
            return _failed(error)
        except OSError as error:
            if error.errno not in MACHINE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            return _failed(VoltforgeError(f"{where}{error.strerror}", hint=remedy(error.strerror, "check its owner")))
        except KeyboardInterrupt:
            console.warn(KEPT)
            raise SystemExit(INTERRUPTED) from None
        return None

    named = {"pos_arg": "names"} if takes_names else {}
    return {"actions": [guarded], "verbosity": 2, "io": {"capture": False}, **named}


def _failed(error: VoltforgeError) -> TaskFailed:
    if error.exit_status != VoltforgeError.exit_status:  # which doit has no word for
        console.error(error)
        raise SystemExit(error.exit_status)
    failed = TaskFailed(error.what)
    failed.problem = error
    return failed


def _end_like_ctrl_c() -> None:
    """Let SIGTERM and a closed terminal end the builds too, which have process groups of their own; nohup(1) stays."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C between two tasks is no more of a surprise than in one."""
    if issubclass(kind, KeyboardInterrupt):
        console.warn(KEPT)
    else:
        sys.__excepthook__(kind, error, trace)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
