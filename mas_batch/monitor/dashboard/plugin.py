"""On the scheduler: takes runs' feeds, and adds the agents' page and metrics to its dashboard."""

from __future__ import annotations

import time
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from mas_batch.monitor.board import Board

NAME = "mas-batch-dashboard"
HANDLER = "mas_batch_feed"
"""The scheduler's remote call that takes a `messages.Message`."""


class AgentsDashboard(SchedulerPlugin):  # type: ignore[misc]
    """Keeps a `Board` on the scheduler and shows it; registered as often as you like."""

    name = NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Set up whatever of page, JSON and metrics this scheduler can serve."""
        from mas_batch.monitor.dashboard import metrics, page  # not for the submitting process

        self.board = Board()
        scheduler.handlers[HANDLER] = self.receive
        page.install(scheduler)
        metrics.install(scheduler)

    def receive(self, version: int, data: bytes) -> str:
        """Take a message of a run; see `Board.receive`."""
        return self.board.receive(version, data, time.time())


def board_of(scheduler: Any) -> Board | None:
    """Return the board of a scheduler that has one."""
    plugin = scheduler.plugins.get(NAME)
    return plugin.board if isinstance(plugin, AgentsDashboard) else None
