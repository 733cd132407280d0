"""Write the tables of docs/volta.md in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from volta.kernel_selection.case import Case, Choice
from volta.kernel_selection.checkpoints import CARDS, JOINED, KV_CACHES, KV_FAMILIES, QUANTIZATIONS


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    written = [list(heads), *(list(line) for line in lines)]
    written.insert(1, ["---"] * len(written[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in written)


def cases_as_text(cases: Iterable[Case]) -> str:
    """Return the cases of one answer as text: quantizations with the same families, then these families."""
    families: dict[str, list[str]] = {}
    for case in cases:
        families.setdefault(case.quantization, []).append(case.family)
    quantizations: dict[str, list[str]] = {}
    for quantization, members in families.items():
        quantizations.setdefault("; ".join(members), []).append(quantization)
    words = [
        f"{'any quantization' if len(members) == len(QUANTIZATIONS) else '; '.join(members)}: {which}"
        for which, members in quantizations.items()
    ]
    return "<br>".join(words)


def cases_of_answers(answers: dict[Case, Choice]) -> dict[Choice, list[Case]]:
    """Return the cases of each answer."""
    members: dict[Choice, list[Case]] = {}
    for case, choice in answers.items():
        members.setdefault(choice, []).append(case)
    return members


def markdown(answers: dict[Case, Choice]) -> str:
    """Return the tables of docs/volta.md."""
    alone = {case: choice for case, choice in answers.items() if case.cards == "one" and case.kv_cache == "auto"}
    runs = cases_of_answers({case: choice for case, choice in alone.items() if not choice.refused})
    refusals = cases_of_answers({case: choice for case, choice in alone.items() if choice.refused})
    text = "Selected on one card with `--kv-cache-dtype auto`:\n\n"
    text += rows(
        ("quantization: families", "dtype", "linear layers", "experts", "attention"),
        (
            (
                cases_as_text(members),
                answer.dtype,
                f"`{answer.linear}`",
                f"`{answer.experts}`" if answer.experts else "-",
                answer.attention,
            )
            for answer, members in runs.items()
        ),
    )
    text += "\nRefused, before anything is loaded unless the table says otherwise:\n\n"
    text += rows(
        ("quantization: families", "message"),
        (
            (
                cases_as_text(members),
                answer.refused if answer.when == "start" else f"while the layers are built: {answer.refused}",
            )
            for answer, members in refusals.items()
        ),
    )
    text += f"\nOther KV caches, with any quantization, for {', '.join(KV_FAMILIES)}:\n\n"
    text += rows(("`--kv-cache-dtype`", "answer"), ((f"`{kv}`", with_cache(answers, kv)) for kv in KV_CACHES[1:]))
    text += f"\nSeveral cards, with {'; '.join(JOINED)}, for Llama and Mixtral:\n\n"
    text += rows(
        ("cards", "layers", "all-reduce; log message"),
        ((cards, *with_cards(answers, cards)) for cards, (count, _, _) in CARDS.items() if count > 1),
    )
    known = {choice.refused for choice in alone.values()}
    several = {
        choice.refused for choice in answers.values() if choice.when == "start" and "cards cannot" in choice.refused
    }
    text += "".join(f"\nAlso refused: {sentence}\n" for sentence in sorted(several - known))
    return text


def with_cache(answers: dict[Case, Choice], kv_cache: str) -> str:
    """Return how the answers for a KV cache differ from those for auto."""
    differences = set()
    for case, choice in answers.items():
        auto = answers[Case(case.quantization, case.family, cards=case.cards)]
        if case.kv_cache == kv_cache and choice != auto:
            differences.add(
                f"refused at the start: {choice.refused}" if choice.when == "start" else f"{case}: {choice}"
            )
    return "<br>".join(sorted(differences)) or "as with auto"


def with_cards(answers: dict[Case, Choice], cards: str) -> tuple[str, str]:
    """Return how the answers for several cards differ from those for one, and the all-reduce."""
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
