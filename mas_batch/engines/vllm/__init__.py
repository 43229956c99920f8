"""The engine `vllm`: many requests in flight on one accelerator, or on several that share a model."""
