"""Cases of quantized weights: AWQ matrices, and experts with weights of 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volta import reference
from volta.numerics.expected import expect, relative
from volta.numerics.memory import guarded, poisoned_memory, summed
from volta.numerics.mode import COMPILE

from vllm.model_executor.layers.quantization import awq_triton  # isort: skip - after the mode


@dataclass(frozen=True)
class Dequantize:
    """The dequantization of an AWQ matrix to float16."""

    inputs: int = 128
    outputs: int = 64
    group: int = 64
    seed: int = 0

    bound = 2.0**-11
    """One rounding to float16, of a scale times an integer."""

    def error(self) -> float:
        """Return the largest relative error of a weight."""
        words, scales, zeros = awq(self.inputs, self.outputs, self.group, torch.Generator().manual_seed(self.seed))
        with poisoned_memory():
            output = awq_triton.awq_dequantize_triton(words, scales, zeros)
        exact = reference.awq_weights(words, scales, zeros)
        if COMPILE:
            return expect(output, exact, "each")
        if not torch.equal(output == 0, exact == 0):
            return torch.inf
        return float(((output.double() - exact).abs() / exact.abs().where(exact != 0, 1)).max())


@dataclass(frozen=True)
class Multiply:
    """The product of float16 rows with an AWQ matrix."""

    rows: int = 3
    inputs: int = 256
    outputs: int = 64
    group: int = 64
    parts: int = 8
    """The number of parts along the inputs; the sums of the parts are added at the end."""
    seed: int = 0

    # Weights and results are rounded to float16, with an error of less than 2**-11. Neither error grows with the number
    # of inputs.
    bound = 2.0**-10

    def error(self) -> float:
        """Return the largest relative error of a row."""
        random = torch.Generator().manual_seed(self.seed)
        words, scales, zeros = awq(self.inputs, self.outputs, self.group, random)
        rows = guarded(torch.randn(self.rows, self.inputs, generator=random).half())
        with poisoned_memory(), summed() as parts:
            output = awq_triton.awq_gemm_triton(rows, words, scales, zeros, self.parts)
        exact = rows.double() @ reference.awq_weights(words, scales, zeros)
        return expect(parts[-1], exact, "row", summed=True) if COMPILE else relative(output, exact)

    def chained(self) -> float:
        """Return the error if every multiply-add is rounded to float16, as on sm_70 and not by the interpreter."""
        random = torch.Generator().manual_seed(self.seed)
        matrix = awq(self.inputs, self.outputs, self.group, random)
        rows = torch.randn(self.rows, self.inputs, generator=random).half()
        weights = reference.awq_weights(*matrix)
        return relative(reference.chained_in_float16(rows, weights.half(), self.parts), rows.double() @ weights)


@dataclass(frozen=True)
class Experts:
    """The product of rows with the matrices of their experts, which have weights of 4 or 8 bits (WNA16)."""

    rows: int = 16
    experts: int = 4
    top_k: int = 2
    inputs: int = 128
    outputs: int = 64
    bits: int = 8
    group: int = 64
    zeros: bool = False
    """True if there are zero points; otherwise the kernel subtracts 8 or 128."""
    weighted: bool = True
    """True if a product is multiplied by the router's weight of the expert."""
    seed: int = 0

    bound = Multiply.bound
    """Weights and results are rounded as in :class:`Multiply`."""

    def error(self) -> float:
        """Return the largest relative error of a row for one of its experts."""
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
        output = torch.full((self.rows, self.top_k, self.outputs), torch.nan, dtype=torch.float16)
        invoke_fused_moe_kernel(
            rows, weights, output, None, scales, zeros, router, order, owners, torch.tensor([len(order)]).int(),
            self.weighted, self.top_k, {"BLOCK_SIZE_M": block, "GROUP_SIZE_M": 1, "SPLIT_K": 1}, tl.float16,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=self.bits == 8, use_int4_w4a16=self.bits == 4,
            per_channel_quant=False, block_shape=[0, self.group],
        )  # fmt: skip
        matrices = reference.expert_weights(weights, scales, zeros, self.bits)
        exact = torch.einsum("rk,reok->reo", rows.double(), matrices[chosen])
        return relative(output, exact * router.double()[..., None] if self.weighted else exact)


def aligned(chosen: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of moe_align_block_size: the (row, choice) pairs by expert, and the expert of each block.

    The pairs of an expert are padded to whole blocks with an invalid number.
    """
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
    """Return a random AWQ matrix: its packed words, its scales, its packed zero points."""

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, outputs // 8), generator=random).int()

    scales = torch.rand(inputs // group, outputs, generator=random).add(0.5).mul(0.01).half()
    return words(inputs), guarded(scales), words(inputs // group)
