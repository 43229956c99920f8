"""Latency: T = T_compute + T_transfer + T_processing, as measured, and a run on a virtual clock.

T_compute is the model's own time, T_transfer reading what is asked and writing what is answered,
T_processing all else: waiting for a worker, batching, tokenising, parsing, merging.
"""
