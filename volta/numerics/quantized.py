"""Cases of quantized weights: AWQ matrices, and experts with weights of 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volta import reference
from volta.numerics.expected import expect, relative
from volta.numerics.memory import guarded, poisoned_memory, summed
from volta.numerics.mode import COMPILE


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
        from vllm.model_executor.layers.quantization.awq_triton import awq_dequantize_triton

        words, scales, zeros = awq(self.inputs, self.outputs, self.group, torch.Generator().manual_seed(self.seed))
        with poisoned_memory():
            made = awq_dequantize_triton(words, scales, zeros)
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
        from vllm.model_executor.layers.quantization.awq_triton import awq_gemm_triton

        random = torch.Generator().manual_seed(self.seed)
        words, scales, zeros = awq(self.inputs, self.outputs, self.group, random)
        rows = guarded(torch.randn(self.rows, self.inputs, generator=random).half())
        with poisoned_memory(), summed() as parts:
            made = awq_gemm_triton(rows, words, scales, zeros, self.parts)
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


def awq(
    inputs: int, outputs: int, group: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random AWQ matrix: its packed words, its scales, its packed zero points."""

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, outputs // 8), generator=random).int()

    scales = torch.rand(inputs // group, outputs, generator=random).add(0.5).mul(0.01).half()
    return words(inputs), guarded(scales), words(inputs // group)
