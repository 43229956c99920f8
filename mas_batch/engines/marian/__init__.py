"""Marian's small translation models, in PyTorch: their file format, network and decoding."""
