"""The engine `vllm`: many requests in flight, on one accelerator or several together."""
