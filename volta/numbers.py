"""Holds what Triton's kernels compute on the way of a Volta against float64, on the CPU, with Triton's interpreter.

``python -m volta.numbers`` prints a table and exits with 1 if a row is over its bound. With the word ``compile`` it
makes the same calls and compiles each kernel for sm_70 instead: what is computed here is what compiles there.
``volta.record`` does that, too, and keeps launches and references for a GPU.

The calls go through vLLM's own Python functions. Whatever a kernel may not read is NaN, and so is whatever it must
write: pages of nobody, the rest of a last page, rows beside an input, fresh memory.
"""

# ruff: noqa: E402 (what the environment says must stand before triton is imported, the pretended GPU before vllm is)

from __future__ import annotations

import contextlib
import os
import sys
import unittest.mock
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

COMPILE = "compile" in sys.argv[1:] or os.environ.get("TRITON_INTERPRET") == "0"
if not COMPILE:  # Triton looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from volta import pretend  # isort: skip

import numpy as np
import torch
from triton.runtime import interpreter

from volta import reference

pretend.capability()

from vllm.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from vllm.attention.ops.triton_unified_attention import unified_attention
from vllm.model_executor.layers.quantization import awq_triton

FLOAT8 = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}
STRAY = 2**31 - 1
"""A page number, a packed word, that no kernel should come across."""


PTX_OF_E5M2 = ("cvt.rz.f16.f32", "0xfffefffe;", "0x00800080;", "prmt.b32")
"""The steps by which Triton turns float32 into e5m2 for sm_70: see ``e5m2_of_volta``."""


class KernelError(Exception):
    """A kernel wrote what is not its own or left out what is, or its code for sm_70 is not what was expected."""


@dataclass(frozen=True)
class Attention:
    """A batch of sequences, each with the tokens that are new in it and those that are in the cache before them."""

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
    """Of keys and of values, where the cache is of eight bits."""
    spread: float = 1.0
    """Standard deviation of the queries."""
    level: float = 0.0
    """What is added to every logit: without a soft cap and sinks, no share of a softmax is another for it."""
    seed: int = 0

    # A float16 output is off by 2**-12 of itself and more where large values cancel; the shares of the softmax are
    # rounded to float16 before they meet the values, scaled keys before they meet the queries.
    bound = 2.0**-9

    def error(self) -> float:
        """The largest relative error of a row, which is a query's head."""
        random = torch.Generator().manual_seed(self.seed)
        heads, lengths = self.kv_heads * self.group, [a + b for a, b in zip(self.new, self.old, strict=True)]
        query = guarded(torch.randn(sum(self.new), heads, self.head_size, generator=random).mul(self.spread).half())
        tables, keys, values = self.pages(lengths, random)
        scale = self.head_size**-0.5
        if self.level:
            query[..., 0] = 8.0
            first = keys[..., 0].float() * 0 + self.level / (8 * scale)  # what is NaN stays so
            keys[..., 0] = first.to(keys.dtype)
        mask = reference.Mask(
            self.window,
            self.softcap,
            2.0 ** -torch.arange(1, heads + 1).float() if self.alibi else None,
            torch.randn(heads, generator=random).half() if self.sinks else None,
        )
        out = torch.full((len(query) + 2, heads, self.head_size), torch.nan, dtype=torch.float16)
        with poisoned_memory():
            unified_attention(
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
            raise KernelError("wrote beside its output")
        right = [
            reference.attention(
                one,
                reference.gathered(keys, pages, length) * self.scales[0],
                reference.gathered(values, pages, length) * self.scales[1],
                scale,
                mask,
            )
            for one, pages, length in zip(query.split(list(self.new)), tables, lengths, strict=True)
        ]
        if COMPILE:  # the rows beside must stay NaN
            beside = torch.full_like(right[0][:1], torch.nan)
            return expect(out, torch.cat([beside, *right, beside]), "row")
        return relative(out[1:-1], torch.cat(right))

    def pages(self, lengths: Sequence[int], random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A block table in random order, and a cache that is NaN wherever no token of a sequence lies."""
        counts = [-(-length // self.page) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=random).int()
        tables = torch.full((len(lengths) + 1, max(counts) + 1), STRAY, dtype=torch.int32)
        both = torch.full((len(order), 2, self.page, self.kv_heads, self.head_size), torch.nan, dtype=torch.float16)
        taken = 0
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[row, :count] = order[taken : taken + count]
            taken += count
            for token in range(length):
                here = both[tables[row, token // self.page], :, token % self.page]
                here.copy_(torch.randn(here.shape, generator=random))
        if self.cache in FLOAT8:
            both = both.to(FLOAT8[self.cache])
        keys, values = both.unbind(1)
        return tables[:-1], keys, values


@dataclass(frozen=True)
class Layer:
    """Attention as a layer does it: new keys and values go into the cache, then the queries meet what is in it."""

    batch: Attention = Attention()
    query_scale: float = 1.0
    """What the layer holds as its queries' scale."""
    bound = Attention.bound

    def error(self) -> float:
        """The largest relative error of a row, where the reference rounds to the cache's type by itself."""
        # Not at the top: the layer's modules are heavy, and a table without layers does well without them.
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadata

        one, random = self.batch, torch.Generator().manual_seed(self.batch.seed)
        heads, lengths = one.kv_heads * one.group, list(one.new)
        assert not any(one.old), "all tokens are new in a layer's case"
        query, key, value = (
            torch.randn(sum(lengths), count, one.head_size, generator=random).half()
            for count in (heads, one.kv_heads, one.kv_heads)
        )
        counts = [-(-length // one.page) for length in lengths]
        order = torch.randperm(sum(counts) + 2, generator=random).int()
        tables = torch.full((len(lengths) + 1, max(counts) + 1), STRAY, dtype=torch.int32)
        slots = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[row, :count], order = order[:count], order[count:]
            slots += [int(tables[row, token // one.page]) * one.page + token % one.page for token in range(length)]
        shape = (sum(counts) + 2, 2, one.page, one.kv_heads, one.head_size)
        if one.cache in FLOAT8:
            cache = torch.full(shape, 0x7F, dtype=torch.uint8)  # NaN in either type
        else:
            cache = torch.full(shape, torch.nan, dtype=torch.float16)
        kind = TritonAttentionImpl(heads, one.head_size, one.head_size**-0.5, one.kv_heads, None, None, one.cache)
        scales = unittest.mock.Mock(
            _k_scale=torch.tensor(one.scales[0]),
            _v_scale=torch.tensor(one.scales[1]),
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
            kind.forward(scales, query, key, value, cache, metadata, output=out)
        if one.cache == "fp8_e5m2":
            key, value = (
                reference.e5m2(new.double() / by) * by for new, by in zip((key, value), one.scales, strict=True)
            )
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        right = [reference.attention(*part, one.head_size**-0.5, reference.Mask()) for part in parts]
        return relative(out, torch.cat(right))


@dataclass(frozen=True)
class Store:
    """Keys and values of some tokens go to their slots; those with slot -1 go nowhere."""

    tokens: int = 5
    padding: Sequence[int] = (1,)
    """Which of the tokens have slot -1."""
    heads: int = 2
    head_size: int = 64
    page: int = 16
    cache: str = "auto"
    scales: Sequence[float] = (1.0, 1.0)
    spread: float = 1.0
    seed: int = 0

    @property
    def bound(self) -> float:
        """Half a step of e5m2's two bits of fraction; a float16 cache holds the very bits."""
        return 2.0**-3 if self.cache in FLOAT8 else 0.0

    def error(self) -> float:
        """The largest relative error of a number in the cache; of the smallest normal one, for those below it."""
        random = torch.Generator().manual_seed(self.seed)
        fused = torch.randn(self.tokens, 3, self.heads, self.head_size, generator=random).mul(self.spread).half()
        _, key, value = fused.unbind(1)  # as a fused projection gives them: rows far apart
        pages = self.tokens // self.page + 3
        slots = torch.randperm(pages * self.page, generator=random)[: self.tokens]
        slots[list(self.padding)] = -1
        shape = (pages, 2, self.page, self.heads, self.head_size)
        if self.cache in FLOAT8:
            cache = torch.full(shape, 0x7F, dtype=torch.uint8)
        else:
            cache = torch.full(shape, torch.nan, dtype=torch.float16)
        before, scales = cache.clone(), torch.tensor(self.scales)
        triton_reshape_and_cache_flash(key, value, *cache.unbind(1), slots, self.cache, *scales)
        kept, worst = slots[slots >= 0], 0.0
        if COMPILE:
            right = torch.full(shape, torch.nan, dtype=torch.float64)  # where nothing may be written NaN must stay
            for number, (new, scale) in enumerate(zip((key, value), self.scales, strict=True)):
                given = new[slots >= 0].double()
                right[kept // self.page, number, kept % self.page] = given / (scale if self.cache in FLOAT8 else 1)
            return expect(cache.view(FLOAT8.get(self.cache, torch.float16)), right, "each")
        for number, new in enumerate((key, value)):
            there, was = (one[:, number].flatten(0, 1) for one in (cache, before))
            rest = torch.ones(len(there), dtype=torch.bool).index_fill(0, kept, False)
            if not torch.equal(bits(there[rest]), bits(was[rest])):
                raise KernelError("wrote to slots of no token")
            held = there[kept].view(FLOAT8.get(self.cache, torch.float16)).double()
            given = new[slots >= 0].double()
            if self.cache in FLOAT8:
                given = given / self.scales[number]
            if held.isnan().any():
                raise KernelError("left a slot unwritten")
            worst = max(worst, float(((held - given).abs() / given.abs().clamp(min=2.0**-14)).max()))
        return worst


@dataclass(frozen=True)
class Dequantize:
    """An AWQ matrix becomes float16."""

    inputs: int = 128
    outputs: int = 64
    group: int = 64
    seed: int = 0

    bound = 2.0**-11
    """One rounding to float16, of scale times a whole number."""

    def error(self) -> float:
        """The largest relative error of a weight."""
        words, scales, zeros = awq(self.inputs, self.outputs, self.group, torch.Generator().manual_seed(self.seed))
        with poisoned_memory():
            made = awq_triton.awq_dequantize_triton(words, scales, zeros)
        right = reference.awq_weights(words, scales, zeros)
        if COMPILE:
            return expect(made, right, "each")
        if not torch.equal(made == 0, right == 0):
            return torch.inf
        return float(((made.double() - right).abs() / right.abs().where(right != 0, 1)).max())


@dataclass(frozen=True)
class Multiply:
    """Rows of float16 meet an AWQ matrix."""

    rows: int = 3
    inputs: int = 256
    outputs: int = 64
    group: int = 64
    parts: int = 8
    """In how many parts the inputs are dealt out; the parts' sums are added at the end."""
    seed: int = 0

    # A weight is rounded to float16 and so is the result, each by 2**-12 of itself or less than twice that. Neither
    # error grows with the number of inputs.
    bound = 2.0**-10

    def error(self) -> float:
        """The largest relative error of a row."""
        random = torch.Generator().manual_seed(self.seed)
        words, scales, zeros = awq(self.inputs, self.outputs, self.group, random)
        rows = guarded(torch.randn(self.rows, self.inputs, generator=random).half())
        with poisoned_memory(), summed() as parts:
            made = awq_triton.awq_gemm_triton(rows, words, scales, zeros, self.parts)
        right = rows.double() @ reference.awq_weights(words, scales, zeros)
        return expect(parts[-1], right, "row", summed=True) if COMPILE else relative(made, right)

    def chained(self) -> float:
        """The same where every multiply-add is rounded to float16, which the interpreter does not do and sm_70 does."""
        random = torch.Generator().manual_seed(self.seed)
        matrix = awq(self.inputs, self.outputs, self.group, random)
        rows = torch.randn(self.rows, self.inputs, generator=random).half()
        weights = reference.awq_weights(*matrix)
        return relative(reference.chained_in_float16(rows, weights.half(), self.parts), rows.double() @ weights)


@dataclass(frozen=True)
class Experts:
    """Rows meet the matrices of some experts, whose weights are of 4 or 8 bits (WNA16)."""

    rows: int = 16
    experts: int = 4
    top_k: int = 2
    inputs: int = 128
    outputs: int = 64
    bits: int = 8
    group: int = 64
    zeros: bool = False
    """Whether there are zero points; otherwise 8 or 128 is subtracted."""
    weighted: bool = True
    """Whether a product is multiplied with the weight that the router gave the expert."""
    seed: int = 0

    bound = Multiply.bound
    """For the same reasons."""

    def error(self) -> float:
        """The largest relative error of a row for one of its experts."""
        import triton.language as tl
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_kernel

        random, packs, block = torch.Generator().manual_seed(self.seed), 8 // self.bits, 16
        groups = self.inputs // self.group

        def words(*shape: int) -> torch.Tensor:
            return torch.randint(0, 256, shape, generator=random).to(torch.uint8)

        weights = words(self.experts, self.outputs, self.inputs // packs)
        zeros = words(self.experts, self.outputs // packs, groups) if self.zeros else None
        scales = torch.rand(self.experts, self.outputs, groups, generator=random).add(0.5).mul(0.01).half()
        rows = guarded(torch.randn(self.rows, self.inputs, generator=random).half())
        router = torch.rand(self.rows, self.top_k, generator=random)
        chosen = torch.stack([torch.randperm(self.experts, generator=random)[: self.top_k] for _ in range(self.rows)])
        order, owners = aligned(chosen, self.experts, block)
        made = torch.full((self.rows, self.top_k, self.outputs), torch.nan, dtype=torch.float16)
        invoke_fused_moe_kernel(
            rows, weights, made, None, scales, zeros, router, order, owners, torch.tensor([len(order)]).int(),
            self.weighted, self.top_k, {"BLOCK_SIZE_M": block, "GROUP_SIZE_M": 1, "SPLIT_K": 1}, tl.float16,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=self.bits == 8, use_int4_w4a16=self.bits == 4,
            per_channel_quant=False, block_shape=[0, self.group],
        )  # fmt: skip
        matrices = reference.expert_weights(weights, scales, zeros, self.bits)
        right = torch.einsum("rk,reok->reo", rows.double(), matrices[chosen])
        return relative(made, right * router.double()[..., None] if self.weighted else right)


Case = Attention | Layer | Store | Dequantize | Multiply | Experts

CASES: tuple[Case, ...] = (
    *(Attention(head_size=size, new=(1, 1, 1), old=(70, 0, 15), seed=size) for size in (64, 80, 128, 192, 256)),
    *(Attention(head_size=size, new=(37, 20), old=(0, 9), seed=size) for size in (64, 80, 128, 192, 256)),
    *(Attention(head_size=size, new=(1, 1), old=(52, 31), cache="fp8_e5m2", seed=size) for size in (64, 80, 128, 256)),
    *(Attention(head_size=size, new=(19, 1), old=(20, 45), cache="fp8_e5m2", seed=size) for size in (64, 80, 128, 256)),
    Attention(new=(1, 30, 5), old=(64, 0, 33), page=32, kv_heads=2, group=4),
    Attention(new=(1, 1), old=(64, 31), page=32, kv_heads=2, group=7),
    Attention(new=(1,), old=(300,), page=16, group=8),
    Attention(new=(1,) * 130, old=tuple(range(130)), kv_heads=1, group=1),
    Attention(new=(3, 1), old=(14, 90), group=5, cache="fp8_e5m2", scales=(0.37, 1.9)),
    Attention(new=(1, 1), old=(14, 90), group=5, cache="fp8_e5m2", scales=(0.37, 1.9), page=32),
    Attention(new=(40,), old=(50,), window=24),
    Attention(new=(1, 1), old=(90, 3), window=24),
    Attention(new=(40,), old=(50,), window=24, cache="fp8_e5m2", page=32),
    Attention(new=(40,), old=(50,), window=24, level=-40.0),
    Attention(new=(1, 1), old=(620, 3), window=24, level=-40.0),
    Attention(new=(1, 1), old=(90, 3), level=-40.0),
    Attention(new=(21, 1), old=(0, 50), alibi=True, group=4),
    Attention(new=(1, 1), old=(7, 50), alibi=True, group=4),
    Attention(new=(21, 1), old=(0, 50), softcap=5.0, spread=8.0),
    Attention(new=(1, 1), old=(7, 50), softcap=5.0, spread=8.0),
    Attention(new=(21, 1), old=(0, 50), sinks=True, window=16, group=8),
    Attention(new=(1, 1), old=(7, 50), sinks=True, group=8),
    Attention(new=(1, 17), old=(50, 33), alibi=True, softcap=30.0, window=40, cache="fp8_e5m2", group=3),
    Layer(Attention(new=(33, 1), old=(0, 0), head_size=80)),
    Layer(Attention(new=(33, 1), old=(0, 0), head_size=80, cache="fp8_e5m2")),
    Layer(Attention(new=(1, 1), old=(0, 0), head_size=128, kv_heads=2, cache="fp8_e5m2", page=32)),
    Layer(Attention(new=(20, 18), old=(0, 0), cache="fp8_e5m2", scales=(0.02, 0.013))),
    *(Store(heads=heads, head_size=size, page=page) for heads, size, page in ((2, 64, 16), (5, 80, 32), (8, 128, 16))),
    *(Store(heads=heads, head_size=size, cache="fp8_e5m2") for heads, size in ((2, 64), (5, 80), (8, 128), (1, 256))),
    Store(tokens=40, padding=(0, 7, 39), cache="fp8_e5m2", scales=(0.37, 1.9), page=32),
    Store(tokens=20, cache="fp8_e5m2", spread=1e-5),
    Store(tokens=20, cache="fp8_e5m2", spread=8000.0),
    *(Dequantize(inputs=256, outputs=72, group=group) for group in (32, 64, 128, 256)),
    Dequantize(inputs=48, outputs=8, group=48),
    *(Multiply(group=group) for group in (32, 64, 128, 256)),
    *(Multiply(parts=parts) for parts in (1, 2, 4, 16)),
    *(Multiply(rows=rows, outputs=88) for rows in (1, 7, 33)),
    Multiply(inputs=96, group=32),
    Multiply(rows=2, inputs=4096, group=128, outputs=32),
    Multiply(rows=2, inputs=4096, group=128, outputs=32, parts=1),
    *(Experts(bits=bits, zeros=zeros) for bits in (4, 8) for zeros in (False, True)),
    *(Experts(bits=bits, rows=21, group=32, outputs=72, weighted=False) for bits in (4, 8)),
    Experts(bits=4, rows=40, experts=3, top_k=1, inputs=96, group=32),
)


def aligned(chosen: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of all (row, choice) pairs by expert, those of each filled up to whole blocks with a number too high,
    and the expert of each block: what moe_align_block_size gives."""
    order, owners = [], []
    for expert in range(experts):
        mine = (chosen.flatten() == expert).nonzero().flatten()
        blocks = -(-len(mine) // block)
        order.append(torch.full((blocks * block,), chosen.numel(), dtype=torch.int32))
        order[-1][: len(mine)] = mine.int()
        owners += [expert] * blocks
    return torch.cat(order), torch.tensor(owners, dtype=torch.int32)


@dataclass(frozen=True)
class Expected:
    """What must be in memory after the launches of a case, where they are only recorded."""

    made: torch.Tensor
    """Where."""
    right: torch.Tensor
    measure: str
    """As :class:`volta.gpu.rows.Result` has it."""
    summed: bool = False
    """Whether the parts along the first axis are added up before."""


EXPECTED: list[Expected] = []
"""Those of the case at hand."""


def expect(made: torch.Tensor, right: torch.Tensor, measure: str, *, summed: bool = False) -> float:
    """Note what a case expects; no error, for nothing was computed."""
    EXPECTED.append(Expected(made, right, measure, summed))
    return 0.0


@contextlib.contextmanager
def summed() -> Iterator[list[torch.Tensor]]:
    """Inside, each tensor whose parts are added up is added to the list: it is what the kernel has written to."""
    plain, seen = torch.Tensor.sum, []

    def noted(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(self)
        return plain(self, *args, **options)

    with unittest.mock.patch.object(torch.Tensor, "sum", noted):
        yield seen


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The same values with a row of NaN before them and one after them in memory."""
    whole = torch.full((len(values) + 2, *values.shape[1:]), torch.nan, dtype=values.dtype)
    whole[1:-1] = values
    return whole[1:-1]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh memory is full of NaN: what a kernel leaves out shows."""
    fresh = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        made = fresh(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with unittest.mock.patch.object(torch, "empty", poisoned):
        yield


def awq(
    inputs: int, outputs: int, group: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random AWQ matrix: its packed words, its scales, its packed zero points."""

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, outputs // 8), generator=random).int()

    scales = torch.rand(inputs // group, outputs, generator=random).add(0.5).mul(0.01).half()
    return words(inputs), guarded(scales), words(inputs // group)


def bits(values: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself by its bits only."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.uint8)


def relative(made: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of a row, in the 2-norm; infinite where a number is missing."""
    if COMPILE:
        return expect(made, right, "row")
    off = (made.double() - right).norm(dim=-1) / right.norm(dim=-1)
    return torch.inf if off.isnan().any() else float(off.max())


def e5m2_of_volta(values: np.ndarray) -> np.ndarray:
    """float32 to e5m2 as Triton does it for sm_70, which has no instruction for it; the interpreter forgets a carry.

    In the PTX: ``cvt.rz.f16.f32``, ``and.b32 0xfffefffe``, ``add.u32 0x00800080``, and ``prmt.b32`` takes the upper
    byte. So halves go away from zero, what rounds beyond 57344 becomes infinite, and NaN, whose bits are 7fff after
    the first step, becomes -0.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    too_far = np.abs(half.astype(np.float32)) > np.abs(values)
    code = half.view(np.uint16) - too_far.astype(np.uint16)
    code[np.isnan(values)] = 0x7FFF
    return (((code & 0xFFFE).astype(np.uint32) + 0x80) >> 8).astype(np.uint8)


def read_by_volta(codes: np.ndarray) -> np.ndarray:
    """e5m2 to float32 as Triton does it for sm_70: it is the upper byte of a float16."""
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


@contextlib.contextmanager
def conversions_of_volta() -> Iterator[None]:
    """Inside, the interpreter makes numbers of e5m2, and reads them, as compiled code does.

    Its own reading knows neither infinity nor NaN, so that poison would do no harm.
    """
    builder = interpreter.InterpreterBuilder
    plain = builder.create_fp_to_fp

    def convert(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        match str(source.dtype.scalar), str(kind.scalar):
            case "fp32", "fp8e5":
                return interpreter.TensorHandle(e5m2_of_volta(source.data), kind.scalar)
            case "fp8e5", "fp32":
                return interpreter.TensorHandle(read_by_volta(source.data), kind.scalar)
        return plain(self, source, kind, rounding)

    with unittest.mock.patch.object(builder, "create_fp_to_fp", convert):
        yield


@contextlib.contextmanager
def kernels() -> Iterator[dict[str, str]]:
    """Inside, each kernel that starts is added by its name, with its PTX for sm_70 if it is compiled."""
    seen: dict[str, str] = {}
    if COMPILE:
        with pretend.launches() as launched:
            yield seen
        seen.update({launch.function: launch.kernel.asm["ptx"] for launch in launched})
        return
    plain = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        seen[self.fn.__name__] = ""
        plain(self, *args, **options)

    with unittest.mock.patch.object(interpreter.GridExecutor, "__call__", noted):
        yield seen


@dataclass(frozen=True)
class Row:
    """What became of one case."""

    kernels: str
    case: str
    error: float
    bound: float
    said: str = ""
    """Why there is no error to compare, where there is none."""

    @property
    def fine(self) -> bool:
        """Whether it stands."""
        return not self.said and self.error <= self.bound


def attempt(case: Case) -> Row:
    """One case, computed or compiled."""
    said, error = "", float("inf")
    EXPECTED.clear()
    with kernels() as started, conversions_of_volta(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are masked away divide nothing by nothing
        try:
            error = case.error()
        except Exception as reason:
            said = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    if COMPILE and not said:
        said = amiss(case, started)
    return Row(" + ".join(started), worded(case), error, case.bound, said)


def amiss(case: Case, compiled: dict[str, str]) -> str:
    """What the PTX of a case's kernels shows that the computation with the interpreter would not; empty if nothing."""
    for name, ptx in compiled.items():
        if "fma.rn.f16" in ptx:
            return f"{name} adds up in float16, and the interpreter rounds less often than that"
        if isinstance(case, Store) and case.cache == "fp8_e5m2":
            missing = [step for step in PTX_OF_E5M2 if step not in ptx]
            if missing:
                return f"{name} makes e5m2 in another way than e5m2_of_volta does, without {', '.join(missing)}"
    return ""


def worded(case: Case) -> str:
    """The case in the words that make it: ``Store(heads=5)``."""
    changed = {
        name: value for name, value in vars(case).items() if value != getattr(type(case)(), name) and name != "seed"
    }
    if isinstance(case, Layer):
        return f"Layer({worded(case.batch)})"
    return f"{type(case).__name__}({', '.join(f'{name}={shown(value)}' for name, value in changed.items())})"


def shown(value: object) -> str:
    """A value, shortened."""
    text = str(value).replace(" ", "")
    return text if len(text) < 30 else f"{text[:12]}…{text[-8:]}"


def table() -> int:
    """Prints all cases; 1 if one of them fails."""
    failed = 0
    print(f"{'error':>9} {'bound':>9}      kernels and case")
    for case in CASES:
        row = attempt(case)
        failed += not row.fine
        measured = f"{'compiled':>19}" if COMPILE else f"{row.error:9.2e} {row.bound:9.2e}"
        print(f"{measured} {'ok' if row.fine else 'BAD':4} {row.kernels}: {row.case} {row.said}".rstrip(), flush=True)
    print(f"{len(CASES) - failed} of {len(CASES)} {'compile for sm_70' if COMPILE else 'within their bounds'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(table())
