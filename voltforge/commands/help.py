"""`./doit` and `./doit help`: what a person can do."""

from __future__ import annotations

from types import ModuleType

from voltforge.system import console


def print_tasks(graph: ModuleType) -> None:
    """Print the tasks of dodo.py in its own order, with the docstring of each."""
    tasks = {name.removeprefix("task_"): task for name, task in vars(graph).items() if name.startswith("task_")}
    console.table(
        (graph.__doc__ or "").split(":")[0],
        ("./doit …", ""),
        [(name, (task.__doc__ or "").strip()) for name, task in tasks.items()],
    )
    console.note("./doit --no-color …, or NO_COLOR=1 in the environment: no colours")
