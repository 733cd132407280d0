"""Write the tables of docs/volta.md in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from volta.kernel_selection.case import Case, Choice
from volta.kernel_selection.checkpoints import CARDS, JOINED, KV_CACHES, KV_FAMILIES, QUANTIZATIONS


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    written = [list(heads), *(list(line) for line in lines)]
    written.insert(1, ["---"] * len(written[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in written)


def places(cases: Iterable[Case]) -> str:
    """Where the same answer is given: families after the quantization that they share, "all" for all of them."""
    families: dict[str, list[str]] = {}
    for case in cases:
        families.setdefault(case.quantization, []).append(case.family)
    quantizations: dict[str, list[str]] = {}
    for quantization, some in families.items():
        quantizations.setdefault("; ".join(some), []).append(quantization)
    words = [
        f"{'any quantization' if len(some) == len(QUANTIZATIONS) else '; '.join(some)}: {which}"
        for which, some in quantizations.items()
    ]
    return "<br>".join(words)


def gathered(answers: dict[Case, Choice]) -> dict[Choice, list[Case]]:
    """The cases of each answer."""
    found: dict[Choice, list[Case]] = {}
    for case, choice in answers.items():
        found.setdefault(choice, []).append(case)
    return found


def markdown(answers: dict[Case, Choice]) -> str:
    """The tables of docs/volta.md."""
    alone = {case: choice for case, choice in answers.items() if case.cards == "one" and case.kv_cache == "auto"}
    runs = gathered({case: choice for case, choice in alone.items() if not choice.refused})
    refusals = gathered({case: choice for case, choice in alone.items() if choice.refused})
    text = "What is taken, on one card with `--kv-cache-dtype auto`:\n\n"
    text += rows(
        ("quantization: families", "dtype", "linear layers", "experts", "attention"),
        (
            (places(some), one.dtype, f"`{one.linear}`", f"`{one.experts}`" if one.experts else "-", one.attention)
            for one, some in runs.items()
        ),
    )
    text += "\nWhat is refused, before anything is loaded unless it is said otherwise:\n\n"
    text += rows(
        ("quantization: families", "in these words"),
        (
            (places(some), one.refused if one.when == "start" else f"while the layers are built: {one.refused}")
            for one, some in refusals.items()
        ),
    )
    text += f"\nOther KV caches, with any quantization, for {', '.join(KV_FAMILIES)}:\n\n"
    text += rows(("`--kv-cache-dtype`", "answer"), ((f"`{kv}`", with_cache(answers, kv)) for kv in KV_CACHES[1:]))
    text += f"\nSeveral cards, with {'; '.join(JOINED)}, for Llama and Mixtral:\n\n"
    text += rows(
        ("cards", "layers", "sums are made by; the log says"),
        ((cards, *with_cards(answers, cards)) for cards, (count, _, _) in CARDS.items() if count > 1),
    )
    known = {choice.refused for choice in alone.values()}
    several = {
        choice.refused for choice in answers.values() if choice.when == "start" and "cards cannot" in choice.refused
    }
    text += "".join(f"\nRefused there: {sentence}\n" for sentence in sorted(several - known))
    return text


def with_cache(answers: dict[Case, Choice], kv_cache: str) -> str:
    """What a KV cache changes against auto."""
    said = set()
    for case, choice in answers.items():
        auto = answers[Case(case.quantization, case.family, cards=case.cards)]
        if case.kv_cache == kv_cache and choice != auto:
            said.add(f"refused at the start: {choice.refused}" if choice.when == "start" else f"{case}: {choice}")
    return "<br>".join(sorted(said)) or "as with auto"


def with_cards(answers: dict[Case, Choice], cards: str) -> tuple[str, str]:
    """What several cards change against one, and what adds up their parts."""
    changed, reduced = [], set()
    for case, choice in answers.items():
        if case.cards == cards:
            alone = answers[Case(case.quantization, case.family)]
            if replace(choice, all_reduce="") != alone:
                changed.append(
                    f"{case.quantization}, {case.family}: `{choice.linear}`"
                    if choice.linear
                    else f"{case.quantization}, {case.family}: refused"
                )
            if not choice.refused:
                reduced.add(choice.all_reduce or "nothing to sum")
    return "<br>".join(changed) or "as on one", "<br>".join(sorted(reduced))
