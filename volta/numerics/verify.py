"""Run each case and compare its error with its bound, or compile it and look at its code."""

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
class Row:
    """What became of one case."""

    kernels: str
    case: str
    error: float
    bound: float
    said: str = ""
    """Why there is no error to compare, where there is none."""

    @property
    def fine(self) -> bool:
        """Whether it stands."""
        return not self.said and self.error <= self.bound


def attempt(case: Case) -> Row:
    """One case, computed or compiled."""
    said, error = "", float("inf")
    EXPECTED.clear()
    with kernels() as started, conversions_of_volta(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are masked away divide nothing by nothing
        try:
            error = case.error()
        except Exception as reason:
            said = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    if COMPILE and not said:
        said = amiss(case, started)
    return Row(" + ".join(started), worded(case), error, case.bound, said)


def amiss(case: Case, compiled: dict[str, str]) -> str:
    """What the PTX of a case's kernels shows that the computation with the interpreter would not; empty if nothing."""
    for name, ptx in compiled.items():
        if "fma.rn.f16" in ptx:
            return f"{name} adds up in float16, and the interpreter rounds less often than that"
        if isinstance(case, Store) and case.cache == "fp8_e5m2":
            missing = [step for step in PTX_OF_E5M2 if step not in ptx]
            if missing:
                return f"{name} makes e5m2 in another way than e5m2_of_volta does, without {', '.join(missing)}"
    return ""


def table() -> int:
    """Prints all cases; 1 if one of them fails."""
    failed = 0
    print(f"{'error':>9} {'bound':>9}      kernels and case")
    for case in CASES:
        row = attempt(case)
        failed += not row.fine
        measured = f"{'compiled':>19}" if COMPILE else f"{row.error:9.2e} {row.bound:9.2e}"
        print(f"{measured} {'ok' if row.fine else 'BAD':4} {row.kernels}: {row.case} {row.said}".rstrip(), flush=True)
    print(f"{len(CASES) - failed} of {len(CASES)} {'compile for sm_70' if COMPILE else 'within their bounds'}")
    return 1 if failed else 0
