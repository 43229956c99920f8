"""What a long run must tidy up on Dask's scheduler, which forgets nothing of what it sees."""

from __future__ import annotations

import logging
import time
from typing import Any

from dask.utils import key_split
from distributed import Client

logger = logging.getLogger(__name__)

EVERY_S = 60.0
_KEPT = 100


class Upkeep:
    """Tidies up once a minute, at the client's cost of one call."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Do it if it is time. That it fails is no reason to end a run."""
        if time.monotonic() - self._last < EVERY_S:
            return
        self._last = time.monotonic()
        try:
            self._client.run_on_scheduler(forget_collections)
        except Exception as error:  # a scheduler of another version, or one that is just lost
            logger.debug("the scheduler was not tidied up: %s", error)


def forget_collections(dask_scheduler: Any) -> int:
    """Shorten the spans' lists of submitted collections; returns how many entries went.

    Every `Client.submit` adds an entry to the span that it belongs to, and a span lives as long
    as the scheduler: hundreds of bytes per partition, for ever (seen in distributed 2026.8).
    The entries serve reports on collections; ours all say "Future". Dask's cache of the last
    100,000 keys' prefixes is emptied too: it would take 50,000 partitions to fill.
    """
    key_split.cache_clear()
    spans = dask_scheduler.extensions.get("spans")
    forgotten = 0
    for span in spans.spans.values() if spans is not None else ():
        collections = (span.metadata or {}).get("collections", [])
        forgotten += max(0, len(collections) - _KEPT)
        del collections[:-_KEPT]
    return forgotten
