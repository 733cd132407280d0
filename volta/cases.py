"""The Triton kernels that vLLM reaches on 7.0, as cases: each makes tensors, then calls vLLM's own Python function.

A case has a name, its tensors (seeded; on any device) and its call, all apart: ``volta.compile`` compiles it without
launching, and the same case can be launched on a GPU or interpreted on the CPU. vLLM is imported when a case is
called, never here.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "e5m2": torch.float8_e5m2}
NOT_COVERED = {
    "layers/mamba, layers/fla, lightning_attn, fused_gdn_gating": "hybrid and state-space models, of which none is in "
    "the table of shapes",
    "merge_attn_states": "cascade attention, which TRITON_ATTN refuses (use_cascade_attention is False)",
    "correct_attn_cp_out": "context parallelism in decode, of FlashAttention, FlashInfer and MLA alone",
    "triton_decode_attention, pack_seq, flashmla_sparse": "MLA, which needs FlashAttention for prefill",
    "prefix_prefill, chunked_prefill_paged_decode, rocm_aiter_fa": "ROCm's backends",
    "backends/flashinfer": "FlashInfer, which needs 7.5",
    "scaled_mm, fp8_utils, int8_utils": "int8 and fp8 weights, refused below 7.5 and 8.0",
    "fused_batched_moe, deep_gemm, count_expert_num_tokens": "expert parallelism with DeepEP or pplx, which are not in "
    "this build, and DeepGEMM, for 9.0",
    "gpt_oss_triton_kernels_moe": "mxfp4, whose package triton_kernels is not in this build",
    "qutlass_utils": "FP4 by QuTLASS, for 10.0",
    "fused_moe_lora": "LoRA on expert layers",
    "eagle_prepare_inputs, eagle_prepare_next_token": "drafts of EAGLE and MTP heads; n-gram drafts are covered",
    "compute_identity_kernel": "experts that do nothing, of LongCat alone",
    "v1/worker/gpu/": "the second model runner, off unless VLLM_USE_V2_MODEL_RUNNER is set",
    "batch_invariant": "off unless VLLM_BATCH_INVARIANT is set",
    "xgrammar's bitmask": "another package's kernel, for structured output",
    "Inductor's": "made by torch.compile of each model's own graph; a call of Triton that it traces, as that of AWQ's "
    "kernels, is compiled anew inside of it, under a key of its own",
}
"""What has Triton kernels and no case here, and why: parts of the names of files or kernels, or another package's."""


@dataclass(frozen=True)
class Tensors:
    """Makes tensors: random ones from a seed, or without one of whatever the memory holds, for a compile."""

    device: str = "cpu"
    seed: int | None = None
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self.generator.manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (scale * torch.randn(shape, generator=self.generator)).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Equally distributed, ``high`` not among them."""
        if self.seed is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        made = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64)
        return made.to(dtype).to(self.device)

    def exactly(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """These values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of one of vLLM's functions."""

    kernels: ClassVar[tuple[str, ...]]
    """The names of the kernels that it may launch, as the source has them."""
    label: ClassVar[str]

    @property
    def name(self) -> str:
        """``attention-2d dtype=fp16 head_size=128 …``: each field that is not as it usually is."""
        told = [(one, getattr(self, one.name)) for one in fields(self)]
        return " ".join([self.label, *(f"{one.name}={value}" for one, value in told if value != one.default)])

    @abstractmethod
    def tensors(self, made: Tensors) -> dict[str, Any]:
        """Its arguments."""

    @abstractmethod
    def call(self, **arguments: Any) -> Any:
        """Call vLLM's function with them; gives its result."""


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(number // -by)


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """unified_attention: prefill is one kernel, decode of a small batch two."""

    dtype: str
    kv: str = ""
    """Of the cache, if it is not ``dtype``."""
    head_size: int
    heads: int
    kv_heads: int
    block_size: int = 16
    window: int | None = None
    alibi: bool = False
    softcap: float = 0
    sinks: bool = False
    sequences: int = 2
    query: int = 1
    """Tokens that are new, of each sequence."""
    context: int = 40
    """Tokens in the cache before them."""
    blocks: int = 256
    """Columns of the block table: the longest sequence in blocks."""
    scale: float | None = None

    @property
    def label(self) -> str:  # type: ignore[override]
        return "attention-2d" if self.query > 1 else "attention-3d"

    @property
    def kernels(self) -> tuple[str, ...]:  # type: ignore[override]
        decode = "kernel_unified_attention_3d", "reduce_segments"
        return ("kernel_unified_attention_2d",) if self.query > 1 else decode

    def tensors(self, made: Tensors) -> dict[str, Any]:
        dtype, tokens, size = DTYPES[self.dtype], self.sequences * self.query, self.head_size
        # Query, key and value are views of what one projection gives, as they are in a model.
        qkv = made.normal(tokens, (self.heads + 2 * self.kv_heads) * size, dtype=dtype)
        length = self.context + self.query
        each = cdiv(length, self.block_size)
        shape = self.sequences * each + 1, 2, self.block_size, self.kv_heads, size
        keys, values = made.normal(*shape, dtype=DTYPES[self.kv or self.dtype]).unbind(1)
        table = made.exactly([[1 + row * each + column for column in range(each)] for row in range(self.sequences)])
        table = torch.nn.functional.pad(table, (0, self.blocks - each))
        one = made.exactly(1.0, torch.float32).expand(self.sequences, self.kv_heads)
        return {
            "q": qkv[:, : self.heads * size].view(tokens, self.heads, size), "k": keys, "v": values,
            "out": made.normal(tokens, self.heads, size, dtype=dtype),
            "cu_seqlens_q": made.exactly([self.query * number for number in range(self.sequences + 1)]),
            "max_seqlen_q": self.query, "seqused_k": made.exactly([length] * self.sequences), "max_seqlen_k": length,
            "softmax_scale": self.scale or size**-0.5, "causal": True,
            "window_size": (self.window - 1, 0) if self.window else (-1, -1),
            "block_table": table, "softcap": self.softcap, "q_descale": None, "k_descale": one, "v_descale": one,
            "alibi_slopes": made.normal(self.heads, dtype=torch.float32, scale=0.1) if self.alibi else None,
            "sinks": made.normal(self.heads, dtype=dtype) if self.sinks else None,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.attention.ops.triton_unified_attention import unified_attention

        unified_attention(**arguments)
        return arguments["out"]


@dataclass(frozen=True, kw_only=True)
class Cache(Case):
    """triton_reshape_and_cache_flash."""

    kernels = ("reshape_and_cache_kernel_flash",)
    label = "reshape-and-cache"
    dtype: str = "fp16"
    kv: str = ""
    heads: int = 0
    """Query heads that lie before the keys in what the projection gives."""
    kv_heads: int
    head_size: int
    block_size: int = 16
    tokens: int = 33

    def tensors(self, made: Tensors) -> dict[str, Any]:
        dtype, width = DTYPES[self.dtype], self.kv_heads * self.head_size
        qkv = made.normal(self.tokens, self.heads * self.head_size + 2 * width, dtype=dtype)
        key, value = qkv[:, -2 * width : -width], qkv[:, -width:]
        shape = cdiv(self.tokens, self.block_size) + 1, 2, self.block_size, self.kv_heads, self.head_size
        keys, values = made.normal(*shape, dtype=DTYPES[self.kv or self.dtype]).unbind(1)
        one = made.exactly(1.0, torch.float32)
        return {
            "key": key.view(self.tokens, self.kv_heads, self.head_size),
            "value": value.view(self.tokens, self.kv_heads, self.head_size),
            "key_cache": keys, "value_cache": values,
            "slot_mapping": made.exactly(list(range(self.tokens)), torch.int64),
            "kv_cache_dtype": f"fp8_{self.kv}" if self.kv else "auto", "k_scale": one, "v_scale": one,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

        triton_reshape_and_cache_flash(**arguments)
        return arguments["key_cache"], arguments["value_cache"]


@dataclass(frozen=True, kw_only=True)
class AwqDequantize(Case):
    """awq_dequantize_triton: what prompts of 256 tokens and more take."""

    kernels = ("awq_dequantize_kernel",)
    label = "awq-dequantize"
    rows: int
    columns: int
    group: int = 128

    def tensors(self, made: Tensors) -> dict[str, Any]:
        groups, packed = self.rows // self.group, self.columns // 8
        return {
            "qweight": made.integers(-(2**31), 2**31, self.rows, packed),
            "scales": made.normal(groups, self.columns, dtype=torch.float16, scale=0.01),
            "zeros": made.integers(-(2**31), 2**31, groups, packed),
        }

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.quantization.awq_triton import awq_dequantize_triton

        return awq_dequantize_triton(**arguments)


@dataclass(frozen=True, kw_only=True)
class AwqGemm(Case):
    """awq_gemm_triton, with the number of parts in K that awq.py asks for."""

    kernels = ("awq_gemm_kernel",)
    label = "awq-gemm"
    tokens: int
    rows: int
    columns: int
    group: int = 128
    parts: int = 8

    def tensors(self, made: Tensors) -> dict[str, Any]:
        groups, packed = self.rows // self.group, self.columns // 8
        return {
            "input": made.normal(self.tokens, self.rows, dtype=torch.float16),
            "qweight": made.integers(-(2**31), 2**31, self.rows, packed),
            "scales": made.normal(groups, self.columns, dtype=torch.float16, scale=0.01),
            "qzeros": made.integers(-(2**31), 2**31, groups, packed),
            "split_k_iters": self.parts,
        }

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.quantization.awq_triton import awq_gemm_triton

        return awq_gemm_triton(**arguments)


@dataclass(frozen=True, kw_only=True)
class Experts(Case):
    """fused_experts_impl: both matrix products of a MoE layer."""

    kernels = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
    label = "moe"
    dtype: str = "fp16"
    bits: int = 16
    """Of a weight; 4 and 8 are the WNA16 kernels."""
    zeros: bool = False
    """Whether there are zero points, as AWQ has them."""
    group: int = 128
    experts: int
    top_k: int
    hidden: int
    width: int
    """Of an expert on one card: intermediate size by tensor parallel size."""
    tokens: int

    def tensors(self, made: Tensors) -> dict[str, Any]:
        dtype = DTYPES[self.dtype]
        given: dict[str, Any] = {
            "hidden_states": made.normal(self.tokens, self.hidden, dtype=dtype),
            "topk_weights": made.normal(self.tokens, self.top_k, dtype=torch.float32),
            "topk_ids": made.integers(0, self.experts, self.tokens, self.top_k),
        }
        for number, (out, into) in {1: (2 * self.width, self.hidden), 2: (self.hidden, self.width)}.items():
            if self.bits == 16:
                given[f"w{number}"] = made.normal(self.experts, out, into, dtype=dtype, scale=into**-0.5)
                continue
            packs, groups = 8 // self.bits, into // self.group
            given[f"w{number}"] = made.integers(0, 256, self.experts, out, into // packs, dtype=torch.uint8)
            given[f"w{number}_scale"] = made.normal(self.experts, out, groups, dtype=dtype, scale=0.01)
            if self.zeros:
                given[f"w{number}_zp"] = made.integers(0, 256, self.experts, out // packs, groups, dtype=torch.uint8)
        if self.bits < 16:
            kind = "use_int4_w4a16" if self.bits == 4 else "use_int8_w8a16"
            given |= {kind: True, "block_shape": [0, self.group]}
        return given

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_impl

        return fused_experts_impl(**arguments)


@dataclass(frozen=True, kw_only=True)
class Mrope(Case):
    """triton_mrope: rotary embedding of models with images (without Inductor, which takes vLLM's PyTorch)."""

    kernels = ("_triton_mrope_forward",)
    label = "mrope"
    dtype: str = "fp16"
    heads: int
    kv_heads: int
    head_size: int = 128
    sections: tuple[int, int, int] = (16, 24, 24)
    interleaved: bool = False
    tokens: int = 33

    def tensors(self, made: Tensors) -> dict[str, Any]:
        dtype = DTYPES[self.dtype]
        return {
            "q": made.normal(self.tokens, self.heads * self.head_size, dtype=dtype),
            "k": made.normal(self.tokens, self.kv_heads * self.head_size, dtype=dtype),
            "cos": made.normal(3, self.tokens, self.head_size // 2, dtype=dtype),
            "sin": made.normal(3, self.tokens, self.head_size // 2, dtype=dtype),
            "mrope_section": list(self.sections), "head_size": self.head_size, "rotary_dim": self.head_size,
            "mrope_interleaved": self.interleaved,
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.model_executor.layers.rotary_embedding.mrope import triton_mrope

        return triton_mrope(**arguments)


@dataclass(frozen=True, kw_only=True)
class Rejection(Case):
    """The sampler of speculative decoding: rejection_sample, with n-gram drafts or those of a model."""

    kernels = (
        "rejection_greedy_sample_kernel", "rejection_random_sample_kernel", "expand_kernel",
        "sample_recovered_tokens_kernel",
    )  # fmt: skip
    label = "rejection"
    vocabulary: int
    drafts: int = 4
    """Tokens that are proposed for each sequence."""
    sequences: int = 2
    draft_probabilities: bool = False

    def tensors(self, made: Tensors) -> dict[str, Any]:
        tokens = self.sequences * self.drafts
        return {
            "tokens": made.integers(0, self.vocabulary, tokens),
            "probabilities": made.normal(tokens, self.vocabulary, dtype=torch.float32).abs(),
            "draft": made.normal(tokens, self.vocabulary, dtype=torch.float32).abs()
            if self.draft_probabilities else None,
            "ends": made.exactly([self.drafts * (number + 1) for number in range(self.sequences)]),
            "bonus": made.integers(0, self.vocabulary, self.sequences, 1),
            "temperature": made.exactly([1.0] + [0.0] * (self.sequences - 1), torch.float32),
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from types import SimpleNamespace

        from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens, rejection_sample

        some = SimpleNamespace(
            all_greedy=False, all_random=False, temperature=arguments["temperature"], generators={}, top_k=None,
            top_p=None,
        )  # fmt: skip
        counts = [self.drafts] * self.sequences
        expanded = expand_batch_to_tokens(
            arguments["temperature"], arguments["ends"], sum(counts), replace_from=0, replace_to=1
        )
        sampled = rejection_sample(
            arguments["tokens"], counts, self.drafts, arguments["ends"], arguments["draft"],
            arguments["probabilities"], arguments["bonus"], some,
        )  # fmt: skip
        return expanded, sampled


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

    def tensors(self, made: Tensors) -> dict[str, Any]:
        half, slots = torch.float16, self.adapters + 1
        return {
            "inputs": made.normal(self.tokens, self.hidden, dtype=half),
            "a": [made.normal(self.adapters, 1, self.rank, self.hidden, dtype=half) for _ in range(self.slices)],
            "b": [made.normal(self.adapters, 1, self.hidden, self.rank, dtype=half) for _ in range(self.slices)],
            "between": made.normal(self.slices, self.tokens, self.rank, dtype=torch.float32),
            "output": made.normal(self.tokens, self.slices * self.hidden, dtype=half),
            "meta": (
                made.exactly([0] * self.tokens), made.exactly(list(range(self.tokens))),
                made.exactly([0] * (slots - 1) + [self.tokens]), made.exactly([0] * slots + [self.tokens]),
                made.exactly([-1, *range(self.adapters)]), torch.tensor([False]),
            ),
        }  # fmt: skip

    def call(self, **arguments: Any) -> Any:
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

        _lora_shrink(arguments["inputs"], arguments["a"], arguments["between"], *arguments["meta"], 1.0)
        _lora_expand(arguments["between"], arguments["b"], arguments["output"], *arguments["meta"], add_inputs=True)
        return arguments["output"]


def covering(
    axes: Mapping[str, Sequence[Any]], strength: int, allowed: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Choices of one value for each axis, among which every allowed combination of ``strength`` values occurs.

    Greedy and without chance: each choice begins with a combination that is still missing.
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
        name = next(one for one in names if one not in choice)
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
"""The matrix of attention. bfloat16 is refused below 8.0."""
STRENGTH = 3
"""Every combination of so many of its values is compiled."""
USUAL = {"queries": (4,), "sinks": (False,)}
"""With these alone, :func:`whole` has every combination of all others."""


def fits(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of :data:`ATTENTION` is for 7.0.

    More than 32 queries for a kv head of 256, or more than 64 for one of more than 64, is no model that is known, and
    cannot be held in registers with tiles of 16; in 32 bits that is so from 32 queries on.
    """
    padded = 1 << (choice.get("head_size", 64) - 1).bit_length()
    rows = max(16, 1 << (choice.get("queries", 1) - 1).bit_length())
    return rows * padded <= (4096 if choice.get("dtype") == "fp32" else 8192)


def attention() -> Iterator[Case]:
    """The matrix of attention, in prefill and in decode."""
    for choice in covering(ATTENTION, STRENGTH, fits):
        yield from both(**choice)
    # DeepSeek's heads, of 128 and 64 numbers, where VLLM_MLA_DISABLE makes ordinary attention of MLA.
    for tokens, kv in itertools.product((16, 1), ("", "e5m2")):
        yield Attention(dtype="fp16", kv=kv, head_size=192, heads=16, kv_heads=16, query=tokens)


def whole() -> Iterator[Case]:
    """Every combination of the matrix of attention, for models with four queries for each kv head and no sinks."""
    axes = {**ATTENTION, **USUAL}
    for values in itertools.product(*axes.values()):
        yield from both(**dict(zip(axes, values, strict=True)))


def both(*, queries: int, **choice: Any) -> Iterator[Case]:
    """A choice of the matrix, in prefill and in decode."""
    kv_heads = 1 if queries > 32 else 2
    for tokens in (16, 1):
        yield Attention(**choice, heads=queries * kv_heads, kv_heads=kv_heads, query=tokens)


def others() -> Iterator[Case]:
    """Everything but attention: full products, for they are small."""
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
            continue  # few tokens of 4 bits go to moe_wna16_gemm, a kernel of CUDA
        yield Experts(bits=bits, zeros=zeros, group=group, experts=8, top_k=2, hidden=512, width=256, tokens=tokens)
    for dtype, heads, spread in itertools.product(("fp16", "fp32"), ((28, 4), (12, 2), (16, 16)), (False, True)):
        yield Mrope(
            dtype=dtype, heads=heads[0], kv_heads=heads[1], interleaved=spread,
            sections=(24, 20, 20) if spread else (16, 24, 24),
        )  # fmt: skip
    # One kernel has the whole vocabulary in a block: 20 seconds to compile at 32000, a minute and more at 151936.
    yield Rejection(vocabulary=32000)
    for rank, slices, tokens in itertools.product((8, 16, 64), (1, 3), (33, 256)):
        yield Lora(rank=rank, slices=slices, tokens=tokens)


def every() -> list[Case]:
    """All cases, in order."""
    return [*attention(), *others()]
