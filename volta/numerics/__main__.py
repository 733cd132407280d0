"""Compare the Triton kernels that vLLM runs on a Volta with float64, on the CPU, with Triton's interpreter.

``python -m volta.numerics`` prints a table and exits with 1 if a row exceeds its bound. ``python -m volta.numerics
compile`` makes the same calls and compiles each kernel for sm_70 instead, so that every case that is computed is known
to compile. ``volta.gpu_rows.record_triton`` also compiles the cases, and stores launches and references for a GPU.

The cases call vLLM's own Python functions. Memory that a kernel must not read is NaN: unused pages, the rest of a last
page, rows next to an input. So is memory that a kernel must write.
"""

from __future__ import annotations

import sys

from volta.numerics.verify import table

if __name__ == "__main__":
    sys.exit(table())
