"""Latency as a model: T = T_compute + T_transfer + T_processing, measured and predicted.

T_compute is the model's own time, T_transfer reading what is asked and writing what is answered,
T_processing all else: waiting for a worker, batching, tokenising, parsing, merging.
"""
