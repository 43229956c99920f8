"""What all parts of the agents' page have in common, in the manner of Dask's own components."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.models import ColumnDataSource
from distributed.dashboard.components import DashboardComponent
from distributed.dashboard.utils import update

from mas_batch.monitor.dashboard.plugin import board_of
from mas_batch.monitor.overview import FORMAT, Overview, RunRow, overview


class RunPlot(DashboardComponent):  # type: ignore[misc]
    """Shows one run; by itself, the newest one."""

    def __init__(self, scheduler: Any, columns: Iterable[str], **kwargs: Any) -> None:
        self.scheduler = scheduler
        self.columns = tuple(columns)
        self.source = ColumnDataSource({name: [] for name in self.columns})
        self.root = self.build(**kwargs)

    def build(self, **kwargs: Any) -> Any:
        """Return the Bokeh model that shows `source`."""
        raise NotImplementedError

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return what `source` is to hold."""
        raise NotImplementedError

    @without_property_validation  # type: ignore[untyped-decorator]
    def show(self, run: RunRow | None) -> None:
        """Show a run, or nothing."""
        data = self.data(run) if run else {name: [] for name in self.columns}
        update(self.source, data)

    def update(self) -> None:
        """Called by Dask's dashboard every now and then."""
        runs = current(self.scheduler).runs
        self.show(runs[0] if runs else None)


def current(scheduler: Any) -> Overview:
    """Return how the scheduler's runs are now; none where there is no board."""
    board, now = board_of(scheduler), time.time()
    return overview(board, now) if board is not None else Overview(FORMAT, now, [])
