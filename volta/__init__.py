"""Examine what vLLM does on a Volta; runs where vLLM's wheel is installed, or on the card."""
