"""Causal and sequence-to-sequence language models that `transformers` knows, in PyTorch."""
