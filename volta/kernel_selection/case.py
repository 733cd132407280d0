"""Define a case, which is a cell of the tables of docs/volta.md, and vLLM's answer to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from volta.kernel_selection.checkpoints import CARDS, FAMILIES, JOINED, KV_CACHES, KV_FAMILIES, QUANTIZATIONS


@dataclass(frozen=True)
class Case:
    """One cell of the tables, by the names in :mod:`volta.kernel_selection.checkpoints`."""

    quantization: str
    family: str
    kv_cache: str = "auto"
    cards: str = "one"


@dataclass(frozen=True)
class Choice:
    """The kernels that vLLM selects for a case, by the names of its classes; empty if the model has none."""

    dtype: str = ""
    linear: str = ""
    """The classes of the linear layers."""
    experts: str = ""
    """The classes of the experts."""
    attention: str = ""
    all_reduce: str = ""
    """The all-reduce between the cards, and the log's message about it."""
    refused: str = ""
    """The message with which vLLM refuses."""
    when: str = ""
    """The time of the refusal: "start", before any process or weight is loaded, or "building" the layers."""


def cases() -> Iterator[Case]:
    """Yield every quantization with every family, and KV caches and several cards with some of them."""
    for quantization in QUANTIZATIONS:
        for family in FAMILIES:
            for kv_cache in KV_CACHES if family in KV_FAMILIES else KV_CACHES[:1]:
                yield Case(quantization, family, kv_cache)
    for cards, (count, _, _) in CARDS.items():
        if count > 1:
            for quantization in JOINED:
                for family in ("Llama", "Mixtral"):
                    yield Case(quantization, family, cards=cards)
