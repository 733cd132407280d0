"""Compare PyTorch's operations on this machine's GPU with float64 on the CPU."""
