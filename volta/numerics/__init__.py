"""Compare the results of vLLM's Triton kernels, as a Volta would run them, with float64 on the CPU."""
