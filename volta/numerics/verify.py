"""Run each case and compare its error with its bound, or compile it and check its code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from volta.numerics.attention import Store
from volta.numerics.cases import CASES, Case, worded
from volta.numerics.expected import EXPECTED
from volta.numerics.interpreter import PTX_OF_E5M2, conversions_of_volta, kernels
from volta.numerics.mode import COMPILE


@dataclass(frozen=True)
class CaseResult:
    """The result of one case."""

    kernels: str
    case: str
    error: float
    bound: float
    problem: str = ""
    """The reason why there is no error to compare; empty if there is one."""

    @property
    def fine(self) -> bool:
        """True if the error is within the bound."""
        return not self.problem and self.error <= self.bound


def attempt(case: Case) -> CaseResult:
    """Compute or compile one case."""
    problem, error = "", float("inf")
    EXPECTED.clear()
    with kernels() as started, conversions_of_volta(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masked rows divide 0 by 0
        try:
            error = case.error()
        except Exception as failure:
            problem = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    if COMPILE and not problem:
        problem = code_problem(case, started)
    return CaseResult(" + ".join(started), worded(case), error, case.bound, problem)


def code_problem(case: Case, compiled: dict[str, str]) -> str:
    """Return a fault in the PTX of a case's kernels that the interpreter cannot find; empty if there is none."""
    for name, ptx in compiled.items():
        if "fma.rn.f16" in ptx:
            return f"{name} sums in float16, which rounds more often than the interpreter"
        if isinstance(case, Store) and case.cache == "fp8_e5m2":
            missing = [step for step in PTX_OF_E5M2 if step not in ptx]
            if missing:
                return f"{name} converts to e5m2 differently from e5m2_of_volta: {', '.join(missing)} is missing"
    return ""


def table() -> int:
    """Print a row for each case; return 1 if one fails, otherwise 0."""
    failed = 0
    print(f"{'error':>9} {'bound':>9}      kernels and case")
    for case in CASES:
        row = attempt(case)
        failed += not row.fine
        measured = f"{'compiled':>19}" if COMPILE else f"{row.error:9.2e} {row.bound:9.2e}"
        print(
            f"{measured} {'ok' if row.fine else 'BAD':4} {row.kernels}: {row.case} {row.problem}".rstrip(), flush=True
        )
    print(f"{len(CASES) - failed} of {len(CASES)} {'compile for sm_70' if COMPILE else 'are within their bounds'}")
    return 1 if failed else 0
