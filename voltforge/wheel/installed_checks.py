"""Check a wheel in an environment: its symbols resolve, its modules import, and its values are as expected."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from voltforge.binary.elf import ElfError
from voltforge.binary.loader import Loader, system_libraries
from voltforge.sources import options
from voltforge.system import files
from voltforge.system.process import ProgramFailed, run
from voltforge.wheel.examined_wheel import (
    DRIVER,
    PATIENCE,
    ExaminedWheel,
    InstalledPython,
)
from voltforge.wheel.findings import Finding, examples, of_problems

_ANSWER = "voltforge: "
_IMPORT = f"""
import importlib, os, sys
try:
    importlib.import_module(sys.argv[1])
except BaseException as problem:
    lines = str(problem).splitlines() or [""]
    print(f"\\n{_ANSWER}{{type(problem).__name__}}: {{lines[0]}}", flush=True)
    os._exit(1)
os._exit(0)  # skip exit handlers: a crash at exit is no failure of the import
"""
_OPERATORS = """
import importlib, json, os, pathlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
import torch
pathlib.Path(sys.argv[1]).write_text(json.dumps(torch._C._dispatch_get_all_op_names()))
os._exit(0)
"""
_ANSWERS = """
import importlib, json, os, pathlib, sys
names = {}
for module in sys.argv[2].split():
    importlib.import_module(module)
    names[module.split(".")[0]] = sys.modules[module.split(".")[0]]
def answer(expression):
    try:
        return [True, str(eval(expression, names))]
    except Exception as problem:
        return [False, f"{type(problem).__name__}: {problem}"]
pathlib.Path(sys.argv[1]).write_text(json.dumps([answer(expression) for expression in sys.argv[3:]]))
os._exit(0)
"""


def check_symbols(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that ld.so would find every library and every strong symbol of every binary."""
    environment = subject.environment
    if not subject.binaries:
        return
    if not environment:
        yield Finding("symbols", "note", "not checked: it needs an environment with what the wheel requires")
        return
    site = environment.site
    loader = Loader(
        site,
        staged=subject.folder,
        program=environment.python,
        preloaded=(site / "torch" / "lib", *sorted(site.glob("nvidia/*/lib"))),
        fallback=(subject.driver_stub,) if subject.driver_stub else (),
    )
    problems, preloaded, total = [], {}, 0
    for name, binary in subject.binaries.items():
        try:
            resolved = loader.resolve(name)
        except ElfError as error:
            problems.append(error.what)
            continue
        total += len(binary.undefined)
        if resolved.missing:
            problems.append(f"{name} needs {', '.join(resolved.missing)}, which no folder of the search path contains")
        if resolved.unresolved:
            count = f"{len(resolved.unresolved)} of its {len(binary.undefined)} symbols"
            problems.append(f"{name} finds {count} nowhere: {examples(map(str, resolved.unresolved))}")
        if resolved.preloaded:
            preloaded[name] = resolved.preloaded
    yield from of_problems("symbols", problems, f"all {total} that {len(subject.binaries)} binaries ask for are found")
    if preloaded:
        names = sorted({library for libraries in preloaded.values() for library in libraries})
        note = f"{examples(preloaded)} find {', '.join(names)} only after torch was imported"
        yield Finding("symbols", "note", note)


def check_imports(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that the modules import, and that the operators of the recipe are registered."""
    expect, environment = subject.expect, subject.environment
    if not (expect.imports or expect.ops):
        return
    if not environment:
        yield Finding("imports", "note", "not checked: it needs an environment with the wheel installed")
        return
    if different := [
        name for name in subject.binaries if not _same_content(subject.folder / name, environment.site / name)
    ]:
        yield Finding(
            "imports", "fail", f"{environment.site} has a different build of {examples(different)}, or lacks it"
        )
        return
    problems = []
    for module in expect.imports:
        problem = _run_script(subject, environment, _IMPORT, module)
        if problem:
            problems.append(f"import {module}: {problem}")
    yield from of_problems("imports", problems, ", ".join(expect.imports))
    if expect.ops and not problems:
        yield from _operators(subject, environment)


def check_config(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check that the configuration reported by the installed wheel agrees with the variables of its build."""
    expression, wanted = subject.expect.config, subject.expect.variables
    if not expression or not subject.environment:
        return
    answers, problem = _values(subject, subject.environment, [expression])
    if problem or not answers[0][0]:
        yield Finding("configuration", "fail", problem or f"{expression}: {answers[0][1]}")
        return
    reported = dict(re.findall(r"\b([A-Z][A-Z0-9_]*)=([^\s,;]*)", answers[0][1]))
    common = sorted(wanted.keys() & reported.keys())
    problems = [f"it reports {name}={reported[name]}, but was built with {wanted[name]}" for name in common
                if not options.same_value(reported[name], wanted[name])]  # fmt: skip
    if not common:
        problems = [f"{expression} reports none of the variables of its build"]
    yield from of_problems("configuration", problems, f"{len(common)} variables as in the recipe: {', '.join(common)}")


def check_answers(subject: ExaminedWheel) -> Iterator[Finding]:
    """Check the values of the recipe's expressions in an environment with the wheel installed."""
    says = subject.expect.says
    if not says:
        return
    if not subject.environment:
        yield Finding("answers", "note", "not checked: it needs an environment with the wheel installed")
        return
    answers, problem = _values(subject, subject.environment, list(says))
    if problem:
        yield Finding("answers", "fail", problem)
        return
    for (expression, pattern), (fine, answer) in zip(says.items(), answers, strict=True):
        if not fine or not fnmatchcase(answer.strip(), pattern):
            yield Finding("answers", "fail", f"{expression} is {answer.strip()[:300]!r}, not {pattern!r}")
        else:
            yield Finding("answers", "pass", f"{expression} is {answer.strip()[:300]}")


def _operators(subject: ExaminedWheel, environment: InstalledPython) -> Iterator[Finding]:
    wanted = set(subject.expect.ops)
    spaces = {name.partition("::")[0] for name in wanted}
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        answer = Path(name) / "operators.json"
        if problem := _run_script(subject, environment, _OPERATORS, str(answer), *subject.expect.imports):
            yield Finding("operators", "fail", problem)
            return
        # An operator's overloads follow its name after a dot.
        registered = {full.partition(".")[0] for full in json.loads(answer.read_bytes())}
    own = {full for full in registered if full.partition("::")[0] in spaces}
    missing = [f"{name} is not registered" for name in sorted(wanted - own)]
    yield from of_problems("operators", missing, f"all {len(wanted)} are registered")
    if own - wanted:
        yield Finding("operators", "note", f"{len(own - wanted)} more are registered: {examples(sorted(own - wanted))}")


def _values(
    subject: ExaminedWheel, environment: InstalledPython, expressions: Sequence[str]
) -> tuple[list[tuple[bool, str]], str]:
    """Return a pair for each expression, (evaluated, value or error as text), and a message if the script failed."""
    with tempfile.TemporaryDirectory(prefix="voltforge-") as name:
        answer = Path(name) / "answers.json"
        modules = " ".join(subject.expect.imports)
        if problem := _run_script(subject, environment, _ANSWERS, str(answer), modules, *expressions):
            return [], problem
        return [(fine, text) for fine, text in json.loads(answer.read_bytes())], ""


def _run_script(subject: ExaminedWheel, environment: InstalledPython, script: str, *words: str) -> str:
    """Run a script in the environment; return an empty string, or its error in one line."""
    variables = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    variables.setdefault("LOGNAME", "voltforge")  # torch needs a user name, and a user id in a container may have none
    if subject.driver_stub and DRIVER not in system_libraries():
        variables["LD_LIBRARY_PATH"] = str(subject.driver_stub)
    try:
        run([environment.python, "-I", "-c", script, *words], env=variables, timeout=PATIENCE)
    except ProgramFailed as error:
        lines = [line for line in error.output.splitlines() if line.strip()]
        messages = [line.removeprefix(_ANSWER) for line in lines if line.startswith(_ANSWER)]
        return (messages or lines or [error.what])[-1] if error.status == 1 else error.what
    return ""


def _same_content(first: Path, second: Path) -> bool:
    return second.is_file() and files.sha256(first) == files.sha256(second)
