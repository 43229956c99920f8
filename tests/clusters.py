"""Clusters in this process, as a user's own might be."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distributed import Scheduler, SpecCluster


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
