"""Holds what Triton's kernels compute on the way of a Volta against float64, on the CPU, with Triton's interpreter.

``python -m volta.numerics`` prints a table and exits with 1 if a row is over its bound. With the word ``compile`` it
makes the same calls and compiles each kernel for sm_70 instead: what is computed here is what compiles there.
``volta.gpu_rows.record_triton`` does that, too, and keeps launches and references for a GPU.

The calls go through vLLM's own Python functions. Whatever a kernel may not read is NaN, and so is whatever it must
write: pages of nobody, the rest of a last page, rows beside an input, fresh memory.
"""

from __future__ import annotations

import sys

from volta.numerics.verify import table

if __name__ == "__main__":
    sys.exit(table())
