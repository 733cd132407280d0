"""Cases of the sampler of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volta.triton_kernels.case import Case, Tensors


@dataclass(frozen=True, kw_only=True)
class Rejection(Case):
    """rejection_sample, the sampler of speculative decoding, with drafts from n-grams or from a model."""

    kernels = (
        "rejection_greedy_sample_kernel", "rejection_random_sample_kernel", "expand_kernel",
        "sample_recovered_tokens_kernel",
    )  # fmt: skip
    label = "rejection"
    vocabulary: int
    drafts: int = 4
    """Proposed tokens of each sequence."""
    sequences: int = 2
    draft_probabilities: bool = False

    def tensors(self, make: Tensors) -> dict[str, Any]:
        tokens = self.sequences * self.drafts
        return {
            "tokens": make.integers(0, self.vocabulary, tokens),
            "probabilities": make.normal(tokens, self.vocabulary, dtype=torch.float32).abs(),
            "draft": make.normal(tokens, self.vocabulary, dtype=torch.float32).abs()
            if self.draft_probabilities else None,
            "ends": make.exactly([self.drafts * (number + 1) for number in range(self.sequences)]),
            "bonus": make.integers(0, self.vocabulary, self.sequences, 1),
            "temperature": make.exactly([1.0] + [0.0] * (self.sequences - 1), torch.float32),
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from types import SimpleNamespace

        from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens, rejection_sample

        metadata = SimpleNamespace(
            all_greedy=False, all_random=False, temperature=arguments["temperature"], generators={}, top_k=None,
            top_p=None,
        )  # fmt: skip
        counts = [self.drafts] * self.sequences
        expanded = expand_batch_to_tokens(
            arguments["temperature"], arguments["ends"], sum(counts), replace_from=0, replace_to=1
        )
        sampled = rejection_sample(
            arguments["tokens"], counts, self.drafts, arguments["ends"], arguments["draft"],
            arguments["probabilities"], arguments["bonus"], metadata,
        )  # fmt: skip
        return expanded, sampled
