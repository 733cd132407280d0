"""Compare vLLM's answers with the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from volta.small_model.checkpoint import PROMPTS
from volta.small_model.reference import TOKENS, Answer, Reference
from volta.torch_operations.operation import OperationResult


def compare(
    name: str, answers: Sequence[Answer], reference: Reference, took: float | None = None
) -> list[OperationResult]:
    """Return two rows: the tokens that differ from the reference, and the largest error of a log probability.

    The reference reads the generated tokens, so that one undecided token does not change the rest. A choice is decided
    if the reference's best token leads the next by more than twice the bound. Errors within the bound cannot change it.
    """
    bound = reference.variant.bound
    worst, compared, decided, different = 0.0, 0, 0, 0
    for answer in answers:
        right = reference.logarithms([*answer.prompt, *answer.tokens])[len(answer.prompt) - 1 :]
        for token, best, exact in zip(answer.tokens, answer.best, right, strict=False):
            for candidate, logarithm in best.items():
                off = abs(logarithm - float(exact[candidate]))
                worst = max(worst, math.inf if math.isnan(off) else off)
                compared += 1
            (first, second), (choice, _) = (pair.tolist() for pair in exact.topk(2))
            if first - second > 2 * bound:
                decided += 1
                different += token != choice
    count = sum(len(answer.tokens) for answer in answers)
    enough = count == TOKENS * len(PROMPTS) and compared >= count and 4 * decided >= count
    reason = f"{decided} of {count} tokens are decided by more than {2 * bound}, {different} of these differ"
    tokens = OperationResult(
        f"{name}: tokens", float(different), 0.0, took, "right" if enough and not different else "wrong",
        reason if enough else f"{reason}: too few tokens for a comparison"
    )  # fmt: skip
    why = f"the largest difference of {compared} log probabilities"
    return [
        tokens,
        OperationResult(f"{name}: logarithms", worst, bound, took, "right" if worst <= bound else "wrong", why),
    ]
