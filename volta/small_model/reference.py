"""Compute the reference's answers, by the Llama of transformers on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volta.small_model.checkpoint import CONFIG, Tensors, Variant

TOKENS, BEST = 16, 20
"""How many tokens are generated, and for how many candidates each time vLLM tells the logarithm of the probability."""


@dataclass(frozen=True)
class Answer:
    """What was generated after one prompt."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    best: Sequence[Mapping[int, float]]
    """For each token: candidates, the generated one among them, with the logarithm of their probability."""


class Reference:
    """transformers' own Llama on the CPU."""

    def __init__(self, exact: Tensors, variant: Variant, dtype: str = "float32") -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{name: what for name, what in CONFIG.items() if name != "torch_dtype"})
        config._attn_implementation = "eager"
        self.variant = variant
        self.model = LlamaForCausalLM(config).eval()
        self.model.load_state_dict(exact)
        self.model.to(getattr(torch, dtype))

    def logarithms(self, tokens: Sequence[int]) -> Any:
        """The logarithms of the probabilities of what follows each token, ``[tokens, words]`` in float32."""
        import torch

        with torch.no_grad():
            made = self.model(torch.tensor([list(tokens)]), past_key_values=self._cache(), use_cache=True)
        return torch.log_softmax(made.logits[0].float(), -1)

    def greedy(self, prompt: Sequence[int]) -> Answer:
        """What this model generates itself."""
        tokens, best = list(prompt), []
        for _ in range(TOKENS):
            said, found = self.logarithms(tokens)[-1].topk(BEST)
            tokens.append(int(found[0]))
            best.append(dict(zip(found.tolist(), said.tolist(), strict=True)))
        return Answer(prompt, tokens[len(prompt) :], best)

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        from volta.reference import e5m2

        if self.variant.cache == "auto":
            return DynamicCache()

        class Rounded(DynamicCache):
            """A cache that keeps e5m2."""

            def update(self, keys: Any, values: Any, *more: Any, **others: Any) -> Any:
                short = [e5m2(one.half()).to(one.dtype) for one in (keys, values)]
                return super().update(*short, *more, **others)

        return Rounded()
