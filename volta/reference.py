"""What the kernels should give, in float64: written to be read, from the definitions and not from the kernels.

A cache is ``[pages, tokens of a page, heads, head size]``; a sequence's pages are named by its row of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a packed word hold column 0, 1, 2, …: AutoAWQ puts columns 0 2 4 6 1 3 5 7 there, lowest first."""

LARGEST_E5M2 = 57344.0


@dataclass(frozen=True)
class Mask:
    """What attention does besides a plain causal softmax."""

    window: int = 0
    """How many keys a query sees, its own among them; 0 for all."""
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    """ALiBi's, one for each query head."""
    sinks: torch.Tensor | None = None
    """A logit for each query head that takes part in the softmax and brings no value."""


def gathered(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first tokens of a sequence, ``[length, heads, head size]`` in float64, from the pages that hold them."""
    needed = -(-length // cache.shape[1])
    return cache.double()[pages[:needed].long()].flatten(0, 1)[:length]


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: Mask) -> torch.Tensor:
    """The attention of one sequence, ``[queries, heads, head size]`` in float64: the queries are its last tokens.

    Query heads come in equal groups, one group after the other for each head of keys and values.
    """
    query, group = query.double(), query.shape[1] // keys.shape[1]
    keys, values = (one.double().repeat_interleave(group, dim=1) for one in (keys, values))
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
    """The eight numbers from 0 to 15 in each 32-bit word of an AWQ matrix, side by side in the order of the columns."""
    places = 4 * torch.tensor(AWQ_ORDER)
    return ((words.long()[..., None] >> places) & 15).flatten(-2)


def awq_weights(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The weights of an AWQ matrix, ``[inputs, outputs]`` in float64: scale times (number less zero point)."""
    group = len(words) // len(scales)
    less = unpacked(zeros).repeat_interleave(group, dim=0)
    return scales.double().repeat_interleave(group, dim=0) * (unpacked(words) - less)


def expert_weights(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """The weights of WNA16 experts, ``[experts, outputs, inputs]`` in float64: scale times (number less zero point).

    Numbers of four bits lie two in a byte, the lower ones first: those of weights along the inputs, zero points along
    the outputs. Scales and zero points have a last axis of groups.
    """

    def spread(packed: torch.Tensor, axis: int) -> torch.Tensor:
        if bits == 8:
            return packed.double()
        return torch.stack((packed & 15, packed >> 4), dim=axis + 1).flatten(axis, axis + 1).double()

    numbers = spread(words, 2)
    group = numbers.shape[2] // scales.shape[2]
    less = spread(zeros, 1) if zeros is not None else torch.full_like(scales, 1 << (bits - 1), dtype=torch.float64)
    return (numbers - less.repeat_interleave(group, 2)) * scales.double().repeat_interleave(group, 2)


def chained_in_float16(left: torch.Tensor, right: torch.Tensor, parts: int) -> torch.Tensor:
    """A product as sm_70 computes it with float16 accumulators: one fused multiply-add after the other, each rounded.

    The inputs are dealt in tiles of 32 to that many parts, whose sums are added in float32 and rounded at the end.
    """
    left, right = left.double(), right.double()
    sums = torch.zeros(parts, len(left), right.shape[1], dtype=torch.float64)
    for k in range(left.shape[1]):
        part = k // 32 % parts
        sums[part] = (sums[part] + left[:, k, None] * right[None, k]).half().double()
    return sums.float().sum(0).half().double()


def e5m2(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that a sign, five bits of exponent and two of fraction can hold, in float64; halves go away
    from zero, as in Triton's code for GPUs without conversions of their own. What is too large is infinite."""
    values = values.double()
    fraction, exponent = torch.frexp(values.abs())
    step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=-13) - 3)
    near = torch.floor(torch.ldexp(fraction, exponent) / step + 0.5) * step
    return torch.copysign(torch.where(near > LARGEST_E5M2, torch.inf, near), values)
