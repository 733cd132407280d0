"""A cell of the table of docs/volta.md, and vLLM's answer to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from volta.kernel_selection.checkpoints import CARDS, FAMILIES, JOINED, KV_CACHES, KV_FAMILIES, QUANTIZATIONS


@dataclass(frozen=True)
class Case:
    """One cell of the table, by the names above."""

    quantization: str
    family: str
    kv_cache: str = "auto"
    cards: str = "one"


@dataclass(frozen=True)
class Choice:
    """What vLLM picks for a case; the names are those of its classes. Empty where there is nothing of the kind."""

    dtype: str = ""
    linear: str = ""
    """The kernels of the linear layers."""
    experts: str = ""
    """The kernels of the experts."""
    attention: str = ""
    all_reduce: str = ""
    """What adds up the cards' parts, and what the log says about it."""
    refused: str = ""
    """The sentence with which it refuses."""
    when: str = ""
    """When it refuses: at "start", before any process or weight is loaded, or while "building" the layers."""


def cases() -> Iterator[Case]:
    """Every quantization with every family; KV caches and several cards with some of them."""
    for quantization in QUANTIZATIONS:
        for family in FAMILIES:
            for kv_cache in KV_CACHES if family in KV_FAMILIES else KV_CACHES[:1]:
                yield Case(quantization, family, kv_cache)
    for cards, (count, _, _) in CARDS.items():
        if count > 1:
            for quantization in JOINED:
                for family in ("Llama", "Mixtral"):
                    yield Case(quantization, family, cards=cards)
