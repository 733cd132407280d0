"""Compute the exact results of vLLM's operations in float64.

The code follows the definitions, not the kernels. The shape of a cache is ``[pages, tokens of a page, heads, head
size]``. A row of the block table lists a sequence's pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position of column 0, 1, 2, … in a packed word: AutoAWQ packs columns 0 2 4 6 1 3 5 7, lowest bits first."""

LARGEST_E5M2 = 57344.0


@dataclass(frozen=True)
class Mask:
    """The options of attention beyond a causal softmax."""

    window: int = 0
    """The number of keys that a query sees, including its own; 0 for all."""
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    """The slopes of ALiBi, one for each query head."""
    sinks: torch.Tensor | None = None
    """A logit for each query head that is part of the softmax and has no value."""


def gathered(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """Return a sequence's first tokens from its pages, ``[length, heads, head size]`` in float64."""
    needed = -(-length // cache.shape[1])
    return cache.double()[pages[:needed].long()].flatten(0, 1)[:length]


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: Mask) -> torch.Tensor:
    """Return the attention of one sequence, ``[queries, heads, head size]`` in float64.

    The queries are the sequence's last tokens. Query heads are in equal groups, one for each head of keys and values.
    """
    query, group = query.double(), query.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, dim=1) for tensor in (keys, values))
    at_query = torch.arange(len(keys) - len(query), len(keys))[:, None]
    at_key = torch.arange(len(keys))[None, :]
    logits = scale * torch.einsum("qhd,khd->hqk", query, keys)
    if mask.softcap:
        logits = mask.softcap * torch.tanh(logits / mask.softcap)
    if mask.slopes is not None:
        logits = logits - mask.slopes.double()[:, None, None] * (at_query - at_key)
    hidden = at_key > at_query
    if mask.window:
        hidden = hidden | (at_query - at_key >= mask.window)
    logits = logits.masked_fill(hidden, -torch.inf)
    if mask.sinks is not None:
        logits = torch.cat((mask.sinks.double()[:, None, None].expand(-1, len(query), 1), logits), dim=-1)
    shares = torch.softmax(logits, dim=-1)[..., -len(keys) :]
    return torch.einsum("hqk,khd->qhd", shares, values)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Return the eight 4-bit numbers in each 32-bit word of an AWQ matrix, in the order of the columns."""
    places = 4 * torch.tensor(AWQ_ORDER)
    return ((words.long()[..., None] >> places) & 15).flatten(-2)


def awq_weights(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the weights of an AWQ matrix, ``[inputs, outputs]`` in float64: scale * (number - zero point)."""
    group = len(words) // len(scales)
    offsets = unpacked(zeros).repeat_interleave(group, dim=0)
    return scales.double().repeat_interleave(group, dim=0) * (unpacked(words) - offsets)


def expert_weights(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return the weights of WNA16 experts, ``[experts, outputs, inputs]`` in float64: scale * (number - zero point).

    A byte holds two 4-bit numbers, the first in the lower bits: weights along the inputs, zero points along the
    outputs. The last axis of scales and zero points is the group.
    """

    def spread(packed: torch.Tensor, axis: int) -> torch.Tensor:
        if bits == 8:
            return packed.double()
        return torch.stack((packed & 15, packed >> 4), dim=axis + 1).flatten(axis, axis + 1).double()

    numbers = spread(words, 2)
    group = numbers.shape[2] // scales.shape[2]
    offsets = spread(zeros, 1) if zeros is not None else torch.full_like(scales, 1 << (bits - 1), dtype=torch.float64)
    return (numbers - offsets.repeat_interleave(group, 2)) * scales.double().repeat_interleave(group, 2)


def chained_in_float16(left: torch.Tensor, right: torch.Tensor, parts: int) -> torch.Tensor:
    """Return a product as sm_70 computes it with float16 accumulators: each fused multiply-add is rounded.

    Tiles of 32 inputs are distributed over ``parts``. The sums of the parts are added in float32 and rounded once.
    """
    left, right = left.double(), right.double()
    sums = torch.zeros(parts, len(left), right.shape[1], dtype=torch.float64)
    for k in range(left.shape[1]):
        part = k // 32 % parts
        sums[part] = (sums[part] + left[:, k, None] * right[None, k]).half().double()
    return sums.float().sum(0).half().double()


def e5m2(values: torch.Tensor) -> torch.Tensor:
    """Round to e5m2 (5 bits of exponent, 2 of fraction); return float64.

    Ties round away from zero, as in Triton's code for GPUs without an instruction for the conversion. Numbers beyond
    the largest become infinite.
    """
    values = values.double()
    fraction, exponent = torch.frexp(values.abs())
    step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=-13) - 3)
    near = torch.floor(torch.ldexp(fraction, exponent) / step + 0.5) * step
    return torch.copysign(torch.where(near > LARGEST_E5M2, torch.inf, near), values)
