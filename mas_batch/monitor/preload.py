"""`dask scheduler --preload mas_batch.monitor.preload`: the agents' page before the first run."""

from __future__ import annotations

from distributed import Scheduler

from mas_batch.monitor.dashboard import page
from mas_batch.monitor.dashboard.plugin import NAME, AgentsDashboard

# Dask imports this module before it starts its dashboard: our plots are then among its own, and
# JupyterLab's extension, which lists those, lists ours.
page.register()


async def dask_setup(scheduler: Scheduler) -> None:
    """Called by Dask when the scheduler has started."""
    await scheduler.register_scheduler_plugin(AgentsDashboard(), name=NAME, idempotent=True)
