"""`./doit`, `./doit help` and `./doit TASK --help`: the tasks and variables, with what each is for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

from voltforge.commands.command_line import did_you_mean
from voltforge.pipeline.checkout import Settings
from voltforge.system import console

EXAMPLES = (
    ("./doit wheels", "make the wheels of PyTorch and vLLM, in wheelhouse/"),
    ("./doit wheels:vllm jobs=4", "make one wheel, with 4 compile jobs at once"),
    ("./doit torch=source wheels", "compile PyTorch from source (hours)"),
    ("./doit image", "make the wheels and the runtime image"),
    ("./doit doctor", "list what this machine lacks, with the commands that install it"),
    ("./doit list --all", "list every task, with one for each package"),
)


def tasks(root: Path) -> dict[str, str]:
    """The tasks of a checkout's dodo.py by name, in its order, with their docstrings.

    The file is parsed and not run, so that help works where a recipe is broken.
    """
    functions = [
        node
        for node in ast.parse((root / "dodo.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("task_")
    ]
    return {node.name.removeprefix("task_").replace("_", "-"): ast.get_docstring(node) or "" for node in functions}


def variables() -> list[tuple[str, str, str]]:
    """The variables of the command line: name, default, and the docstring in :class:`Settings`."""
    [settings] = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    assert isinstance(settings, ast.ClassDef)
    rows = []
    for field, docstring in zip(settings.body, settings.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(docstring, ast.Expr):
            name = field.target.id
            text = inspect.cleandoc(ast.literal_eval(docstring.value)).replace("``", "")
            rows.append((f"{name}=", getattr(Settings, name), text))
    return rows


def print_tasks(root: Path) -> None:
    """Print every task of dodo.py with its docstring."""
    console.table("PyTorch and vLLM for NVIDIA Volta", ("./doit …", ""), list(tasks(root).items()))
    console.note("./doit help: variables and examples")
    console.note("./doit --no-color …, or NO_COLOR=1 in the environment: no colours")


def print_help(root: Path, names: list[str]) -> int:
    """Print tasks, variables and examples, or the tasks ``names`` and the variables; return the exit status."""
    known = tasks(root)
    names = [name for name in names if "=" not in name and not name.startswith("-")]
    chosen = {name: known[name.split(":")[0]] for name in names if name.split(":")[0] in known}
    if names and not chosen:
        console.warn("; ".join(f"{name} is not a task{did_you_mean(name, known)}" for name in names))
    console.screen.print("usage: ./doit [VARIABLE=VALUE …] TASK …\n", markup=False)
    console.table("tasks", ("./doit …", ""), list((chosen or known).items()))
    console.table("variables, in any order before or after the tasks", ("", "default", ""), variables())
    if not chosen:
        console.table("examples", ("", ""), EXAMPLES)
    console.note("./doit --no-color …, or NO_COLOR=1 in the environment: no colours")
    return 0
