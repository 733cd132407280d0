"""Cases of LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volta.triton_kernels.case import Case, Tensors


@dataclass(frozen=True, kw_only=True)
class Lora(Case):
    """lora_shrink and lora_expand, for one projection."""

    kernels = ("_lora_shrink_kernel", "_lora_expand_kernel")
    label = "lora"
    rank: int = 16
    hidden: int = 4096
    slices: int = 1
    adapters: int = 1
    tokens: int = 33

    def tensors(self, make: Tensors) -> dict[str, Any]:
        half, slots = torch.float16, self.adapters + 1
        return {
            "inputs": make.normal(self.tokens, self.hidden, dtype=half),
            "a": [make.normal(self.adapters, 1, self.rank, self.hidden, dtype=half) for _ in range(self.slices)],
            "b": [make.normal(self.adapters, 1, self.hidden, self.rank, dtype=half) for _ in range(self.slices)],
            "between": make.normal(self.slices, self.tokens, self.rank, dtype=torch.float32),
            "output": make.normal(self.tokens, self.slices * self.hidden, dtype=half),
            "meta": (
                make.exactly([0] * self.tokens), make.exactly(list(range(self.tokens))),
                make.exactly([0] * (slots - 1) + [self.tokens]), make.exactly([0] * slots + [self.tokens]),
                make.exactly([-1, *range(self.adapters)]), torch.tensor([False]),
            ),
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

        _lora_shrink(arguments["inputs"], arguments["a"], arguments["between"], *arguments["meta"], 1.0)
        _lora_expand(arguments["between"], arguments["b"], arguments["output"], *arguments["meta"], add_inputs=True)
        return arguments["output"]
