"""Compute the reference's log probabilities with the Llama of transformers on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volta.small_model.checkpoint import CONFIG, Tensors, Variant

TOKENS, BEST = 16, 20
"""The number of generated tokens, and of candidates for each token whose log probability vLLM reports."""


@dataclass(frozen=True)
class Answer:
    """The tokens that were generated after one prompt."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    best: Sequence[Mapping[int, float]]
    """For each token: the candidates with their log probabilities, including the generated token."""


class Reference:
    """The Llama of transformers on the CPU."""

    def __init__(self, exact: Tensors, variant: Variant, dtype: str = "float32") -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{name: value for name, value in CONFIG.items() if name != "torch_dtype"})
        config._attn_implementation = "eager"
        self.variant = variant
        self.model = LlamaForCausalLM(config).eval()
        self.model.load_state_dict(exact)
        self.model.to(getattr(torch, dtype))

    def logarithms(self, tokens: Sequence[int]) -> Any:
        """Return the log probabilities of the next token after each token, ``[tokens, words]`` in float32."""
        import torch

        with torch.no_grad():
            output = self.model(torch.tensor([list(tokens)]), past_key_values=self._cache(), use_cache=True)
        return torch.log_softmax(output.logits[0].float(), -1)

    def greedy(self, prompt: Sequence[int]) -> Answer:
        """Generate tokens greedily with this model."""
        tokens, best = list(prompt), []
        for _ in range(TOKENS):
            values, candidates = self.logarithms(tokens)[-1].topk(BEST)
            tokens.append(int(candidates[0]))
            best.append(dict(zip(candidates.tolist(), values.tolist(), strict=True)))
        return Answer(prompt, tokens[len(prompt) :], best)

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        from volta.reference import e5m2

        if self.variant.cache == "auto":
            return DynamicCache()

        class Rounded(DynamicCache):
            """A cache that rounds to e5m2."""

            def update(self, keys: Any, values: Any, *more: Any, **others: Any) -> Any:
                rounded = [e5m2(tensor.half()).to(tensor.dtype) for tensor in (keys, values)]
                return super().update(*rounded, *more, **others)

        return Rounded()
