"""Compare what Triton's kernels compute on the way of a Volta with float64, on the CPU."""
