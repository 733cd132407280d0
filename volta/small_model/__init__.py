"""Run a small Llama, made on the spot, with vLLM, and compare it with transformers on the CPU."""
