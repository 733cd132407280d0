"""List the cases that `./doit verify:triton` compiles: vLLM's Triton kernels on 7.0, in every configuration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from volta.triton_kernels.attention import Attention, Cache
from volta.triton_kernels.awq import AwqDequantize, AwqGemm
from volta.triton_kernels.case import Case
from volta.triton_kernels.experts import Experts
from volta.triton_kernels.lora import Lora
from volta.triton_kernels.rotary import Mrope
from volta.triton_kernels.sampling import Rejection

NOT_COVERED = {
    "layers/mamba, layers/fla, lightning_attn, fused_gdn_gating": "hybrid and state-space models, none of which is in "
    "the table of shapes",
    "merge_attn_states": "cascade attention, which TRITON_ATTN refuses (use_cascade_attention is False)",
    "correct_attn_cp_out": "context parallelism in decode, which only FlashAttention, FlashInfer and MLA have",
    "triton_decode_attention, pack_seq, flashmla_sparse": "MLA, which needs FlashAttention for prefill",
    "prefix_prefill, chunked_prefill_paged_decode, rocm_aiter_fa": "ROCm's backends",
    "backends/flashinfer": "FlashInfer, which needs 7.5",
    "scaled_mm, fp8_utils, int8_utils": "int8 and fp8 weights, refused below 7.5 and 8.0",
    "fused_batched_moe, deep_gemm, count_expert_num_tokens": "expert parallelism with DeepEP or pplx, which are not in "
    "this build, and DeepGEMM, for 9.0",
    "gpt_oss_triton_kernels_moe": "mxfp4, whose package triton_kernels is not in this build",
    "qutlass_utils": "FP4 with QuTLASS, for 10.0",
    "fused_moe_lora": "LoRA on expert layers",
    "eagle_prepare_inputs, eagle_prepare_next_token": "drafts by EAGLE and MTP heads; n-gram drafts are covered",
    "compute_identity_kernel": "identity experts, which only LongCat has",
    "v1/worker/gpu/": "the second model runner, off unless VLLM_USE_V2_MODEL_RUNNER is set",
    "batch_invariant": "off unless VLLM_BATCH_INVARIANT is set",
    "xgrammar's bitmask": "another package's kernel, for structured output",
    "Inductor's": "kernels that torch.compile generates from each model's graph; it also compiles the Triton kernels "
    "that it traces, such as AWQ's, again under its own key",
}
"""The Triton kernels without a case: parts of file names or kernel names, or another package, and the reason."""


ATTENTION: dict[str, Sequence[Any]] = {
    "head_size": (64, 80, 96, 128, 256),
    "queries": (1, 4, 8, 32, 48, 71),  # per kv head; 48 is StarCoder's, 71 Falcon's: both have one kv head
    "dtype": ("fp16", "fp32"),
    "kv": ("", "e5m2"),
    "block_size": (16, 32),
    "window": (None, 1000),
    "alibi": (False, True),
    "softcap": (0, 30.0),
    "sinks": (False, True),
}
"""The values of each parameter of attention. vLLM refuses bfloat16 below 8.0."""
STRENGTH = 3
"""The cases contain every combination of this many values of :data:`ATTENTION`."""
USUAL = {"queries": (4,), "sinks": (False,)}
"""The values to which :func:`all_attention_cases` restricts these parameters."""


def covering(
    axes: Mapping[str, Sequence[Any]], strength: int, allowed: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield choices of one value for each axis that together contain every allowed combination of ``strength`` values.

    This is a covering array. The algorithm is greedy and deterministic: each choice begins with a missing combination.
    """
    names = list(axes)

    def pairs(choice: Mapping[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
        ordered = [(name, choice[name]) for name in names if name in choice]
        return set(itertools.combinations(ordered, strength))

    def completed(choice: dict[str, Any]) -> dict[str, Any] | None:
        if not allowed(choice):
            return None
        if len(choice) == len(names):
            return choice
        name = next(name for name in names if name not in choice)
        ranked = sorted(axes[name], key=lambda value: -len(pairs({**choice, name: value}) & missing))
        return next((found for value in ranked if (found := completed({**choice, name: value}))), None)

    missing: set[tuple[tuple[str, Any], ...]] = set()
    for chosen in itertools.combinations(names, strength):
        for values in itertools.product(*(axes[name] for name in chosen)):
            missing.add(tuple(zip(chosen, values, strict=True)))
    while missing:
        first = min(missing, key=repr)
        found = completed(dict(first))
        missing.discard(first)
        if found:
            missing -= pairs(found)
            yield found


def fits(choice: Mapping[str, Any]) -> bool:
    """Return True if the registers of 7.0 can hold a choice of :data:`ATTENTION` with tiles of 16.

    They cannot hold more than 32 queries for a kv head of size 256, or more than 64 for one of size above 64. In fp32
    the limits are half of that. No known model exceeds them.
    """
    padded = 1 << (choice.get("head_size", 64) - 1).bit_length()
    rows = max(16, 1 << (choice.get("queries", 1) - 1).bit_length())
    return rows * padded <= (4096 if choice.get("dtype") == "fp32" else 8192)


def attention() -> Iterator[Case]:
    """Yield the cases of attention, in prefill and in decode."""
    for choice in covering(ATTENTION, STRENGTH, fits):
        yield from prefill_and_decode(**choice)
    # DeepSeek's heads of 128 + 64 numbers: VLLM_MLA_DISABLE=1 replaces MLA with ordinary attention.
    for tokens, kv in itertools.product((16, 1), ("", "e5m2")):
        yield Attention(dtype="fp16", kv=kv, head_size=192, heads=16, kv_heads=16, query=tokens)


def all_attention_cases() -> Iterator[Case]:
    """Yield every combination of attention's parameters, for four queries for each kv head and no sinks."""
    axes = {**ATTENTION, **USUAL}
    for values in itertools.product(*axes.values()):
        yield from prefill_and_decode(**dict(zip(axes, values, strict=True)))


def prefill_and_decode(*, queries: int, **choice: Any) -> Iterator[Case]:
    """Yield the case of a choice in prefill and in decode."""
    kv_heads = 1 if queries > 32 else 2
    for tokens in (16, 1):
        yield Attention(**choice, heads=queries * kv_heads, kv_heads=kv_heads, query=tokens)


def other_cases() -> Iterator[Case]:
    """Yield the cases of all other kernels: every combination of their parameters."""
    for dtype, kv, size, block in itertools.product(
        ("fp16", "fp32"), ("", "e5m2"), ATTENTION["head_size"], ATTENTION["block_size"]
    ):
        yield Cache(dtype=dtype, kv=kv, heads=16, kv_heads=2, head_size=size, block_size=block)
    for group, columns in itertools.product((32, 64, 128), (4096, 4104)):
        yield AwqDequantize(rows=4096, columns=columns, group=group)
        for tokens, parts in itertools.product((1, 7, 16), (8,)):
            yield AwqGemm(rows=4096, columns=columns, group=group, tokens=tokens, parts=parts)
    for dtype, top_k, tokens in itertools.product(("fp16", "fp32"), (2, 8), (1, 7, 64)):
        yield Experts(dtype=dtype, experts=8, top_k=top_k, hidden=512, width=256, tokens=tokens)
    for bits, zeros, group, tokens in itertools.product((4, 8), (False, True), (32, 64, 128), (1, 16, 32, 96)):
        if bits == 4 and tokens < 32:
            continue  # with 4 bits and few tokens vLLM calls moe_wna16_gemm, a CUDA kernel
        yield Experts(bits=bits, zeros=zeros, group=group, experts=8, top_k=2, hidden=512, width=256, tokens=tokens)
    for dtype, heads, spread in itertools.product(("fp16", "fp32"), ((28, 4), (12, 2), (16, 16)), (False, True)):
        yield Mrope(
            dtype=dtype, heads=heads[0], kv_heads=heads[1], interleaved=spread,
            sections=(24, 20, 20) if spread else (16, 24, 24),
        )  # fmt: skip
    # One kernel has the whole vocabulary in a block. It compiles in 20 seconds at 32000, in over a minute at 151936.
    yield Rejection(vocabulary=32000)
    for rank, slices, tokens in itertools.product((8, 16, 64), (1, 3), (33, 256)):
        yield Lora(rank=rank, slices=slices, tokens=tokens)


def all_cases() -> list[Case]:
    """Return all cases, in order."""
    return [*attention(), *other_cases()]
