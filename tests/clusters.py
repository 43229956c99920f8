"""Clusters in this process, as a user's own might be."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client, Scheduler, SpecCluster, Worker

from mas_batch import pipeline
from mas_batch.job_file import load_job


@contextmanager
def cluster_of(workers: Mapping[str, Mapping[str, Any]], **scheduler: Any) -> Iterator[SpecCluster]:
    """Start a scheduler without a dashboard, and workers as `SpecCluster` specifies them.

    Args:
        scheduler: further options of the scheduler.
    """
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options |= scheduler
    with SpecCluster(
        workers=dict(workers),
        scheduler={"cls": Scheduler, "options": options},
        silence_logs=logging.ERROR,
    ) as cluster:
        yield cluster


@contextmanager
def summarizers(count: int = 3, capability: str = "summarize") -> Iterator[Client]:
    """Yield a client of workers in this process that can summarize, or do what is said."""
    options = {"nthreads": 3, "resources": {capability: 1.0}}
    workers = {
        f"w-{i}": {"cls": Worker, "options": {"name": f"w-{i}", **options}} for i in range(count)
    }
    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(count)
        yield client


def run_in_process(job_file: Path, *overrides: str) -> pipeline.Summary:
    """Run a job to its end on threads: a run that nothing happens to needs no processes."""
    with summarizers() as client:
        return pipeline.run(load_job(str(job_file), overrides), client=client)
