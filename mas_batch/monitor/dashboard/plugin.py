"""On the scheduler: takes runs' snapshots, adds the agents' page and metrics to its dashboard."""

from __future__ import annotations

import time

from distributed import Scheduler, SchedulerPlugin

from mas_batch.dask_compat import add_remote_call
from mas_batch.monitor.dashboard.inboxes import INBOXES
from mas_batch.monitor.inbox import Inbox

NAME = "mas-batch-dashboard"
HANDLER = "mas_batch_feed"
"""The scheduler's remote call that takes a `snapshot.Snapshot`."""


class AgentsDashboard(SchedulerPlugin):  # type: ignore[misc]
    """Keeps an `Inbox` for the scheduler and shows it; registered as often as you like."""

    name = NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Set up whatever of page, JSON and metrics this scheduler can serve."""
        # Bokeh is large, and the submitting process imports this module too.
        from mas_batch.monitor.dashboard import metrics, page

        self._scheduler = scheduler
        INBOXES[scheduler] = Inbox()
        add_remote_call(scheduler, HANDLER, self.receive)
        page.install(scheduler)
        metrics.install()

    async def close(self) -> None:
        """Serve no metrics of a scheduler that is closed."""
        INBOXES.pop(self._scheduler, None)

    def receive(self, version: str, data: bytes) -> None:
        """Take a snapshot of a run; see `Inbox.receive`."""
        INBOXES.get(self._scheduler, Inbox()).receive(version, data, time.time())
