"""Report which kernels vLLM selects on a card of a given compute capability, without a GPU."""
