"""Cases of attention, of a layer of it, and of the write to its KV cache."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from volta import reference
from volta.numerics.expected import KernelError, bits, expect, relative
from volta.numerics.memory import FLOAT8, STRAY, guarded, poisoned_memory
from volta.numerics.mode import COMPILE

# Imported after the mode, which pretends the GPU.
from vllm.attention.ops import triton_reshape_and_cache_flash, triton_unified_attention  # isort: skip


@dataclass(frozen=True)
class Attention:
    """Attention of a batch of sequences, each with new tokens and with earlier tokens in the cache."""

    new: Sequence[int] = (1,)
    old: Sequence[int] = (40,)
    head_size: int = 64
    kv_heads: int = 1
    group: int = 2
    """Query heads for each head of keys and values."""
    page: int = 16
    cache: str = "auto"
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    scales: Sequence[float] = (1.0, 1.0)
    """The scales of keys and of values, if the cache has 8 bits."""
    spread: float = 1.0
    """Standard deviation of the queries."""
    level: float = 0.0
    """A number added to every logit. Without a soft cap and sinks the softmax does not depend on it."""
    seed: int = 0

    # A float16 output has an error of 2**-12 of itself, and more where large values cancel. The softmax is rounded to
    # float16 before its product with the values, scaled keys before theirs with the queries.
    bound = 2.0**-9

    def error(self) -> float:
        """Return the largest relative error of a row, which is one head of one query."""
        random = torch.Generator().manual_seed(self.seed)
        heads, lengths = self.kv_heads * self.group, [a + b for a, b in zip(self.new, self.old, strict=True)]
        query = guarded(torch.randn(sum(self.new), heads, self.head_size, generator=random).mul(self.spread).half())
        tables, keys, values = self.pages(lengths, random)
        scale = self.head_size**-0.5
        if self.level:
            query[..., 0] = 8.0
            first = keys[..., 0].float() * 0 + self.level / (8 * scale)  # NaN stays NaN
            keys[..., 0] = first.to(keys.dtype)
        mask = reference.Mask(
            self.window,
            self.softcap,
            2.0 ** -torch.arange(1, heads + 1).float() if self.alibi else None,
            torch.randn(heads, generator=random).half() if self.sinks else None,
        )
        out = torch.full((len(query) + 2, heads, self.head_size), torch.nan, dtype=torch.float16)
        with poisoned_memory():
            triton_unified_attention.unified_attention(
                q=query,
                k=keys,
                v=values,
                out=out[1:-1],
                cu_seqlens_q=torch.tensor([0, *np.cumsum(self.new)], dtype=torch.int32),
                max_seqlen_q=max(self.new),
                seqused_k=torch.tensor(lengths, dtype=torch.int32),
                max_seqlen_k=max(lengths),
                softmax_scale=scale,
                causal=True,
                window_size=(self.window - 1, 0) if self.window else (-1, -1),
                block_table=tables,
                softcap=self.softcap,
                q_descale=None,
                k_descale=torch.tensor(self.scales[0]).expand(len(lengths), self.kv_heads),
                v_descale=torch.tensor(self.scales[1]).expand(len(lengths), self.kv_heads),
                alibi_slopes=mask.slopes,
                sinks=mask.sinks,
            )
        if not COMPILE and not out[[0, -1]].isnan().all():
            raise KernelError("the kernel wrote outside its output")
        exact = [
            reference.attention(
                queries,
                reference.gathered(keys, pages, length) * self.scales[0],
                reference.gathered(values, pages, length) * self.scales[1],
                scale,
                mask,
            )
            for queries, pages, length in zip(query.split(list(self.new)), tables, lengths, strict=True)
        ]
        if COMPILE:  # the guards must stay NaN
            guard = torch.full_like(exact[0][:1], torch.nan)
            return expect(out, torch.cat([guard, *exact, guard]), "row")
        return relative(out[1:-1], torch.cat(exact))

    def pages(self, lengths: Sequence[int], random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a block table in random order, keys and values; slots without a token are NaN."""
        counts = [-(-length // self.page) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=random).int()
        tables = torch.full((len(lengths) + 1, max(counts) + 1), STRAY, dtype=torch.int32)
        both = torch.full((len(order), 2, self.page, self.kv_heads, self.head_size), torch.nan, dtype=torch.float16)
        taken = 0
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[row, :count] = order[taken : taken + count]
            taken += count
            for token in range(length):
                slot = both[tables[row, token // self.page], :, token % self.page]
                slot.copy_(torch.randn(slot.shape, generator=random))
        if self.cache in FLOAT8:
            both = both.to(FLOAT8[self.cache])
        keys, values = both.unbind(1)
        return tables[:-1], keys, values


@dataclass(frozen=True)
class Layer:
    """A layer of attention: it writes new keys and values to the cache, then reads the cache for the queries."""

    batch: Attention = Attention()
    query_scale: float = 1.0
    """The layer's scale of its queries."""
    bound = Attention.bound

    def error(self) -> float:
        """Return the largest relative error of a row; the reference rounds to the cache's type itself."""
        # Imported here because the import is slow and only this case needs it.
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadata

        batch, random = self.batch, torch.Generator().manual_seed(self.batch.seed)
        heads, lengths = batch.kv_heads * batch.group, list(batch.new)
        assert not any(batch.old), "all tokens are new in a layer's case"
        query, key, value = (
            torch.randn(sum(lengths), count, batch.head_size, generator=random).half()
            for count in (heads, batch.kv_heads, batch.kv_heads)
        )
        counts = [-(-length // batch.page) for length in lengths]
        order = torch.randperm(sum(counts) + 2, generator=random).int()
        tables = torch.full((len(lengths) + 1, max(counts) + 1), STRAY, dtype=torch.int32)
        slots = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[row, :count], order = order[:count], order[count:]
            slots += [
                int(tables[row, token // batch.page]) * batch.page + token % batch.page for token in range(length)
            ]
        shape = (sum(counts) + 2, 2, batch.page, batch.kv_heads, batch.head_size)
        if batch.cache in FLOAT8:
            cache = torch.full(shape, 0x7F, dtype=torch.uint8)  # NaN in either type
        else:
            cache = torch.full(shape, torch.nan, dtype=torch.float16)
        layer = TritonAttentionImpl(
            heads, batch.head_size, batch.head_size**-0.5, batch.kv_heads, None, None, batch.cache
        )
        scales = unittest.mock.Mock(
            _k_scale=torch.tensor(batch.scales[0]),
            _v_scale=torch.tensor(batch.scales[1]),
            _q_scale_float=self.query_scale,
        )
        metadata = TritonAttentionMetadata(
            num_actual_tokens=len(query),
            max_query_len=max(lengths),
            query_start_loc=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            max_seq_len=max(lengths),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=tables[:-1],
            slot_mapping=torch.tensor(slots),
            use_cascade=False,
            common_prefix_len=0,
            cu_prefix_query_lens=None,
            prefix_kv_lens=None,
            suffix_kv_lens=None,
        )
        out = torch.full_like(query, torch.nan)
        with poisoned_memory():
            layer.forward(scales, query, key, value, cache, metadata, output=out)
        if batch.cache == "fp8_e5m2":
            key, value = (
                reference.e5m2(new.double() / by) * by for new, by in zip((key, value), batch.scales, strict=True)
            )
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        exact = [reference.attention(*part, batch.head_size**-0.5, reference.Mask()) for part in parts]
        return relative(out, torch.cat(exact))


@dataclass(frozen=True)
class Store:
    """The write of keys and values to their slots; tokens with slot -1 are not written."""

    tokens: int = 5
    padding: Sequence[int] = (1,)
    """The numbers of the tokens with slot -1."""
    heads: int = 2
    head_size: int = 64
    page: int = 16
    cache: str = "auto"
    scales: Sequence[float] = (1.0, 1.0)
    spread: float = 1.0
    seed: int = 0

    @property
    def bound(self) -> float:
        """Half a step of e5m2's two-bit fraction; a float16 cache keeps all bits."""
        return 2.0**-3 if self.cache in FLOAT8 else 0.0

    def error(self) -> float:
        """Return the largest error of a number in the cache, relative to it or to the smallest normal float16."""
        random = torch.Generator().manual_seed(self.seed)
        fused = torch.randn(self.tokens, 3, self.heads, self.head_size, generator=random).mul(self.spread).half()
        _, key, value = fused.unbind(1)  # views of a fused projection, whose rows are far apart
        pages = self.tokens // self.page + 3
        slots = torch.randperm(pages * self.page, generator=random)[: self.tokens]
        slots[list(self.padding)] = -1
        shape = (pages, 2, self.page, self.heads, self.head_size)
        if self.cache in FLOAT8:
            cache = torch.full(shape, 0x7F, dtype=torch.uint8)
        else:
            cache = torch.full(shape, torch.nan, dtype=torch.float16)
        before, scales = cache.clone(), torch.tensor(self.scales)
        triton_reshape_and_cache_flash.triton_reshape_and_cache_flash(
            key, value, *cache.unbind(1), slots, self.cache, *scales
        )
        written, worst = slots[slots >= 0], 0.0
        if COMPILE:
            exact = torch.full(shape, torch.nan, dtype=torch.float64)  # where nothing may be written, NaN must stay
            for number, (new, scale) in enumerate(zip((key, value), self.scales, strict=True)):
                values = new[slots >= 0].double()
                exact[written // self.page, number, written % self.page] = values / (
                    scale if self.cache in FLOAT8 else 1
                )
            return expect(cache.view(FLOAT8.get(self.cache, torch.float16)), exact, "each")
        for number, new in enumerate((key, value)):
            after, original = (tensor[:, number].flatten(0, 1) for tensor in (cache, before))
            rest = torch.ones(len(after), dtype=torch.bool).index_fill(0, written, False)
            if not torch.equal(bits(after[rest]), bits(original[rest])):
                raise KernelError("the kernel wrote to slots without a token")
            stored = after[written].view(FLOAT8.get(self.cache, torch.float16)).double()
            values = new[slots >= 0].double()
            if self.cache in FLOAT8:
                values = values / self.scales[number]
            if stored.isnan().any():
                raise KernelError("the kernel did not write a token's slot")
            worst = max(worst, float(((stored - values).abs() / values.abs().clamp(min=2.0**-14)).max()))
        return worst
