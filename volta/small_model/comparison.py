"""Compare vLLM's answers with the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from volta.small_model.checkpoint import PROMPTS
from volta.small_model.reference import TOKENS, Answer, Reference
from volta.torch_operations.operation import Row


def compare(name: str, answers: Sequence[Answer], reference: Reference, took: float | None = None) -> list[Row]:
    """Two rows: whether tokens are the reference's wherever it decides, and how far logarithms are off.

    The reference is given the very tokens that were generated, so that one that it leaves open does not lead the two
    apart. Its choice is decided where its best token is ahead of the next by more than twice the bound: then no two
    errors within the bound can turn it round.
    """
    bound = reference.variant.bound
    worst, asked, decided, other = 0.0, 0, 0, 0
    for answer in answers:
        right = reference.logarithms([*answer.prompt, *answer.tokens])[len(answer.prompt) - 1 :]
        for token, best, here in zip(answer.tokens, answer.best, right, strict=False):
            for candidate, said in best.items():
                off = abs(said - float(here[candidate]))
                worst = max(worst, math.inf if math.isnan(off) else off)
                asked += 1
            (first, second), (choice, _) = (found.tolist() for found in here.topk(2))
            if first - second > 2 * bound:
                decided += 1
                other += token != choice
    count = sum(len(answer.tokens) for answer in answers)
    whole = count == TOKENS * len(PROMPTS) and asked >= count and 4 * decided >= count
    said = f"{decided} of {count} tokens are decided by more than {2 * bound}, {other} of these are others"
    tokens = Row(
        f"{name}: tokens", float(other), 0.0, took, "right" if whole and not other else "wrong",
        said if whole else f"{said}: too few to say anything"
    )  # fmt: skip
    why = f"the largest of {asked} logarithms' differences"
    return [tokens, Row(f"{name}: logarithms", worst, bound, took, "right" if worst <= bound else "wrong", why)]
