"""Loaded into the workers of an embedded cluster before they start."""

from __future__ import annotations

from distributed import Worker

from mas_batch.dask_compat import hush_lost_heartbeats


def dask_setup(worker: Worker) -> None:
    """Called by Dask when the worker is about to start."""
    hush_lost_heartbeats()
