"""Make the rows of vLLM's own CUDA kernels: launched as vLLM's host code launches them, and compared with float64.

Grids, blocks and arguments follow the host functions of vLLM 0.12.0, which each docstring names. Only numpy is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from volta.gpu.rows import Image, Row
from volta.gpu_rows import activations, experts, gptq, kv_cache, norms, rotary, topk_softmax

MAKERS = {
    gptq.SOURCE: gptq.rows,
    norms.SOURCE: norms.rows,
    rotary.SOURCE: rotary.rows,
    activations.SOURCE: activations.rows,
    kv_cache.SOURCE: kv_cache.rows,
    topk_softmax.SOURCE: topk_softmax.rows,
    experts.ALIGN: experts.align_rows,
    experts.WNA16: experts.wna16_rows,
}
"""The function that yields the rows of each source."""


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Yield every row; ``images`` maps the path of a source to its compiled image. A missing source has no rows.

    Raises:
        ValueError: an image lacks a kernel that vLLM launches, or the kernel has other parameters.
    """
    for source, make in MAKERS.items():
        if source in images and (source != experts.WNA16 or experts.ALIGN in images):
            yield from make(images)
