"""Make the rows of vLLM's own CUDA kernels: launched as its host code does, and compared with float64.

A row's geometry follows the host functions of vLLM 0.12.0 that are named beside it. numpy is all that this needs.
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
"""What makes the rows of each source."""


def rows(images: Mapping[str, Image]) -> Iterator[Row]:
    """Every row, from each source's image by the source's path; a source that is not there has no rows.

    Raises:
        ValueError: an image has not the kernel that vLLM launches, or takes other arguments.
    """
    for source, make in MAKERS.items():
        if source in images and (source != experts.WNA16 or experts.ALIGN in images):
            yield from make(images)
