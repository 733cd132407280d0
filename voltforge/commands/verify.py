"""`./doit verify`: check finished wheels against their recipes, or any wheel named by `file=`."""

from __future__ import annotations

from pathlib import Path

from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console
from voltforge.wheel import checks
from voltforge.wheel.findings import Finding, failed, report


def verify_wheels(pipeline: Pipeline) -> None:
    """Check the wheel that ``file=`` names, or every wheel of the wheelhouse, and print the findings.

    Raises:
        VoltforgeError: a check fails, or there is no wheel.
    """
    file = pipeline.settings.file
    paths = [Path(file)] if file else [wheel.path for wheel in pipeline.wheelhouse.wheels()]
    if not paths:
        raise VoltforgeError("the wheelhouse is empty", hint="./doit wheels, or ./doit verify file=PATH.whl")
    problems: list[str] = []
    for path in paths:
        console.step(f"verify {path.name}")
        findings = pipeline.examined(path)
        findings += [] if file else checks.check_in_wheelhouse(pipeline.wheelhouse, path, pipeline.trust)
        report(findings)
        if failures := failed(findings):
            problems.append(f"{path.name} fails {len(failures)} checks")
    if strangers := [] if file else pipeline.wheelhouse.index_problems():
        console.step("verify the index and the receipts")
        report(Finding("wheelhouse", "fail", sentence) for sentence in strangers)
        problems.append(f"the wheelhouse fails {len(strangers)} checks")
    if problems:
        raise VoltforgeError("; ".join(problems), hint="read the failures in the tables above")
