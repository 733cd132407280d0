"""What runs beside vLLM where its wheel is installed: of torch, triton, vllm and the standard library alone."""
