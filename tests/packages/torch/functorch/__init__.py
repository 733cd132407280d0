"""As PyTorch has it beside torch."""
