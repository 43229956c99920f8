"""Every private part of Dask that we use, each with a test that says what breaks without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed import Client


def workers_of(client: Client) -> Mapping[str, Mapping[str, Any]]:
    """Ask the scheduler for its workers: address → what it knows of each (`name`, `status`, …).

    Not by `Client.scheduler_info`: that returns an attribute which the client's own periodic
    callback replaces by one without workers, and now and then it does so in between.

    Raises:
        OSError: the scheduler did not answer.
    """
    workers: Mapping[str, Mapping[str, Any]] = client.sync(client.scheduler.identity, n_workers=-1)[
        "workers"
    ]
    return workers


def forget_collections(dask_scheduler: Any, tag: str, kept: int) -> int:
    """Shorten lists of submitted collections, on the scheduler; returns how many entries went.

    Args:
        tag: begins the names of the spans whose lists are shortened; all others are left alone.
        kept: so many last entries of a list stay.
    """
    extension = dask_scheduler.extensions.get("spans")
    forgotten = 0
    for span in extension.spans.values() if extension is not None else ():
        if not span.name[-1].startswith(tag):
            continue
        collections = (span.metadata or {}).get("collections", [])
        forgotten += max(0, len(collections) - kept)
        del collections[:-kept]
    return forgotten
