"""What runs beside vLLM, inside an environment where its wheel is installed: torch, triton, vllm and the standard library."""
