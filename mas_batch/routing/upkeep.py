"""What a long run must tidy up on Dask's scheduler, which forgets nothing of what it sees.

Every `Client.submit` adds an entry to the span that it belongs to, and a span lives as long as the
scheduler: hundreds of bytes per partition, for ever (seen in distributed 2026.8). The entries serve
reports on collections; a run's all say "Future". A scheduler may be a user's own, so only the spans
of runs are tidied, whichever process works on them.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager

from distributed import Client, span

from mas_batch.dask_compat import forget_collections

logger = logging.getLogger(__name__)

EVERY_S = 60.0
KEPT = 100
_TAG = "mas-batch "


def run_span(name: str) -> AbstractContextManager[str]:
    """Have what is submitted belong to one span of the run.

    Dask makes a new default span, for ever, whenever nothing is left to do of a kind for a moment.
    Its dashboard can tell runs apart by the span.
    """
    opened: AbstractContextManager[str] = span(_TAG + name)
    return opened


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
            self._client.run_on_scheduler(forget_collections, tag=_TAG, kept=KEPT)
        except Exception as error:  # a scheduler of another version, or one that is just lost
            logger.debug("the scheduler was not tidied up: %s", error)
