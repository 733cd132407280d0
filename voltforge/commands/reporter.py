"""The output of `./doit` about its tasks: the variant of a package, tasks that are current, and failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from doit.exceptions import BaseFail, UnmetDependency
from doit.reporter import ConsoleReporter

from voltforge.system import console

ANNOUNCED = "announced"
"""Key of a task's ``meta``: a function that returns the sentence to print before the first stage runs."""


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """Print each failure once, as a red line; the stages print their own progress."""

    desc = "prints failures; the stages print their own progress"
    announcements: Sequence[Callable[[], str]] = ()

    def initialize(self, tasks: Mapping[str, Any], selected_tasks: Sequence[str]) -> None:
        """Collect the sentences of the selected tasks and of those that they depend on."""
        reachable: dict[str, Any] = {}
        names = list(selected_tasks)
        while names:
            if (name := names.pop()) not in reachable:
                reachable[name] = tasks[name]
                names += tasks[name].task_dep
        metas = [task.meta or {} for task in reachable.values()]
        self.announcements = [meta[ANNOUNCED] for meta in metas if ANNOUNCED in meta]

    def execute_task(self, task: Any) -> None:
        """Print the sentences before the first task that has something to do."""
        if task.actions:
            for announcement in self.announcements:
                console.note(announcement())
            self.announcements = ()

    def skip_uptodate(self, task: Any) -> None:
        """Print that a wheel or a lock is current; stages below it are not mentioned."""
        if task.name.startswith(("wheels:", "lock")):
            console.note(f"{task.name} is current")

    def _write_failure(self, result: Any, **_: Any) -> None:
        failure: BaseFail = result["exception"]
        if isinstance(failure, UnmetDependency):
            return
        problem = getattr(failure, "problem", None)
        console.error(problem or f"{result['task'].name}: {failure.get_msg()}")

    def complete_run(self) -> None:
        """Print nothing: each failure was printed when it happened."""
