"""The tables of the agents' page: a row per agent, a row per host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from bokeh.models import ColumnDataSource, CustomJS
from bokeh.models.widgets import (
    DataTable,
    HTMLTemplateFormatter,
    NumberFormatter,
    StringFormatter,
    TableColumn,
)

from mas_batch.monitor.dashboard.base import RunPlot
from mas_batch.monitor.overview import RunRow

STATE_COLOURS = {
    "loading": "#9ecae1",
    "ready": "#6baed6",
    "busy": "#2171b5",
    "draining": "#bdbdbd",
    "breaker open": "#d94801",
    "probing": "#fd8d3c",
    "server away": "#d94801",
    "lost": "#a50f15",
    "released": "#bdbdbd",
}
_ROW_PX = 25


_Columns = dict[str, tuple[str, int, Callable[[], Any]]]
"""Name → (title, width, its formatter: one per page, or Bokeh would not have a second viewer)."""

_COUNT = partial(NumberFormatter, format="0,0")
_RATE = partial(NumberFormatter, format="0,0.0")
_AGENT_COLUMNS: _Columns = {
    "agent": ("agent", 90, StringFormatter),
    "capabilities": ("capabilities", 110, StringFormatter),
    "model": ("model", 175, StringFormatter),
    "device": ("device", 60, StringFormatter),
    "hosts": ("hosts", 130, StringFormatter),
    "load": ("load", 60, StringFormatter),
    "records": ("records", 60, _COUNT),
    "records_per_s": ("records/s", 60, _RATE),
    "tokens_per_s": ("tokens/s", 60, _RATE),
    "failed_answers": ("failed answers", 95, _COUNT),
    "failed_tries": ("failed tries", 70, _COUNT),
    "agreement": ("agreement %", 85, partial(NumberFormatter, format="0.0", nan_format="–")),
}


_STATE = partial(
    HTMLTemplateFormatter, template='<span style="color: <%- colour %>">&#9679;</span> <%- value %>'
)
_HOST_COLUMNS: _Columns = {
    "worker": ("worker", 215, StringFormatter),
    "agents": ("agents", 150, StringFormatter),
    "state": ("state", 100, _STATE),
    "since_s": ("for s", 50, _COUNT),
    "load": ("load", 60, StringFormatter),
    "asked": ("asked", 60, _COUNT),
    "answered": ("answered", 70, _COUNT),
    "failed": ("failed", 60, _COUNT),
    "idle": ("idle %", 60, partial(NumberFormatter, format="0", nan_format="–")),
    "memory": ("memory", 70, StringFormatter),
    "message": ("why", 300, StringFormatter),
}


class AgentsTable(RunPlot):
    """One row per agent."""

    columns = tuple(_AGENT_COLUMNS)

    def build(self, **kwargs: Any) -> Any:
        """Return the table."""
        return _table(self.source, _AGENT_COLUMNS, **kwargs)

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return a row per agent; hosts that agents share stand in the first one's row."""
        posts = {post.post: post for post in run.posts}
        rows = []
        for agent in run.agents:
            post = posts[agent.post]
            hosts, load = f"with {post.agents[0]}", ""
            if agent.agent == post.agents[0]:
                hosts = ", ".join(f"{n} {state}" for state, n in post.hosts.items())
                load = f"{post.in_flight} / {post.window}"
            rows.append(
                asdict(agent)
                | {
                    "capabilities": ", ".join(agent.capabilities),
                    "device": agent.device or agent.engine,
                    "hosts": hosts,
                    "load": load,
                    "agreement": None if agent.agreement is None else 100 * agent.agreement,
                }
            )
        self.root.height = _ROW_PX * (len(rows) + 1) + 5
        return {name: [row[name] for row in rows] for name in self.columns}


class HostsTable(RunPlot):
    """One row per host."""

    columns = (*_HOST_COLUMNS, "colour")

    def build(self, **kwargs: Any) -> Any:
        """Return the table."""
        return _table(self.source, _HOST_COLUMNS, **kwargs)

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return a row per host."""
        rows = [
            asdict(host)
            | {
                "agents": ", ".join(host.agents),
                "colour": STATE_COLOURS[host.state],
                "since_s": int(host.since_s),
                "load": f"{host.in_flight} / {host.window}",
                "idle": 100 * host.idle_s / host.served_s if host.served_s else None,
                "memory": f"{host.peak_memory_bytes / 2**20:,.0f} MiB",
            }
            for host in run.hosts
        ]
        self.root.height = min(400, _ROW_PX * (len(rows) + 1) + 5)
        return {name: [row[name] for row in rows] for name in self.columns}


def _table(source: ColumnDataSource, columns: _Columns, **kwargs: Any) -> DataTable:
    table = DataTable(
        source=source,
        columns=[
            TableColumn(field=name, title=title, width=width, formatter=formatter())
            for name, (title, width, formatter) in columns.items()
        ],
        index_position=None,
        row_height=_ROW_PX,
        # Dask's navigation bar opens above it.
        stylesheets=[".bk-data-table { z-index: 0; }"],
        **kwargs,
    )
    # Bokeh 3.9.1 and 3.9.2 redraw a table only when its number of rows has changed (bokeh #15328).
    redraw = CustomJS(args={"view": table.view}, code="setTimeout(() => view.change.emit())")
    source.js_on_change("data", redraw)
    return table
