"""What all parts of the agents' page have in common."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Protocol

from bokeh.core.properties import without_property_validation
from bokeh.models import ColumnDataSource

from mas_batch.monitor.dashboard.inboxes import INBOXES
from mas_batch.monitor.inbox import Inbox
from mas_batch.monitor.overview import Overview, RunRow, overview

_EVERY_MS = 500


class Component(Protocol):
    """A part of a page, or all of it."""

    root: Any
    """The Bokeh model."""

    def update(self) -> None:
        """Show the scheduler's runs as they are now."""


class RunPlot:
    """Shows one run; by itself, the newest one."""

    root: Any
    columns: ClassVar[tuple[str, ...]]
    """Of `source`."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        self.scheduler = scheduler
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
        data: Any = self.data(run) if run else {name: [] for name in self.columns}
        if self.source.data != data:
            self.source.data.update(data)

    def update(self) -> None:
        """Show the newest run as it is now."""
        runs = current(self.scheduler).runs
        self.show(runs[0] if runs else None)


def add_to(doc: Any, component: Component) -> None:
    """Put a component on a Bokeh document and keep it up to date."""
    component.update()
    doc.add_periodic_callback(component.update, _EVERY_MS)
    doc.add_root(component.root)


def current(scheduler: Any) -> Overview:
    """Return how the scheduler's runs are now."""
    return overview(INBOXES.get(scheduler, Inbox()), time.time())
