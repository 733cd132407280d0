"""Check vLLM for compute capability 7.0; runs where vLLM's wheel is installed, or on the card."""
