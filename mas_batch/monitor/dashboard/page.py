"""Adds `/agents`, its single plots and `/agents.json` to a scheduler's dashboard."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.layouts import column, row
from bokeh.models.widgets import Div, Select
from tornado.web import RequestHandler

from mas_batch.dask_compat import (
    Page,
    add_pages,
    add_pages_to_new_schedulers,
    add_url,
    allowed_origins,
    use_dasks_template,
    use_dasks_theme,
)
from mas_batch.monitor.dashboard.base import RunPlot, add_to, current
from mas_batch.monitor.dashboard.plots import (
    LatencyPlot,
    PartitionsPlot,
    RatesPlot,
    RoutingPlot,
    TokenRatesPlot,
)
from mas_batch.monitor.dashboard.tables import AgentsTable, HostsTable
from mas_batch.monitor.overview import RunRow

_NEWEST = "the newest run"


class AgentsPage:
    """All plots of one run, which the viewer may choose."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._select = Select(value=_NEWEST, width=320)
        self._summary = Div(sizing_mode="stretch_width", align="center")
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        agents, hosts = AgentsTable(scheduler, **wide), HostsTable(scheduler, **wide)
        charts: list[RunPlot] = [
            PartitionsPlot(scheduler, height=240, **wide),
            RatesPlot(scheduler, height=240, **wide),
            TokenRatesPlot(scheduler, height=240, **wide),
            LatencyPlot(scheduler, height=240, **wide),
            RoutingPlot(scheduler, height=240, **wide),
        ]
        self._plots = [agents, *charts, hosts]
        self.root = column(
            row(self._select, self._summary, **wide),
            agents.root,
            row([chart.root for chart in charts[:3]], **wide),
            row([chart.root for chart in charts[3:]], **wide),
            hosts.root,
            Div(text=_openness(allowed_origins(scheduler)), **wide),
            **wide,
        )

    @without_property_validation  # type: ignore[untyped-decorator]
    def update(self) -> None:
        """Show the run as it is now."""
        runs = current(self._scheduler).runs
        options: list[Any] = [_NEWEST, *(run.run for run in runs)]
        if self._select.options != options:
            self._select.options = options
        chosen = [run for run in runs if self._select.value in (_NEWEST, run.run)]
        shown = chosen[0] if chosen else None
        self._summary.text = _summary(shown)
        for plot in self._plots:
            plot.show(shown)


def _summary(run: RunRow | None) -> str:
    if run is None:
        return "No run has fed this scheduler yet."
    failed = sum(run.failed_records.values())
    facts = [
        f"<b>{html.escape(run.run)}</b>: {run.status}",
        f"{100 * run.progress:.0f} % of {sum(run.partitions.values()):,} partitions",
        f"{run.merged_records:,} of {run.records:,} records",
        f"{failed:,} without an answer" if failed else "",
        f"{run.undecided:,} asked further" if run.undecided else "",
        f"{run.records_per_s:,.1f} records/s",
        f"policy {html.escape(run.policy)}",
        f"{run.running_s:,.0f} s",
        html.escape(run.message),
    ]
    return " · ".join(filter(None, facts))


def _openness(origins: set[str]) -> str:
    """Say which sites' pages can read this one in a viewer's browser."""
    if "*" in origins:
        return (
            "<small>Any other site's page in your browser can read this one: Dask's setting <code>"
            "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin</code>"
            " is <code>*</code>, its default.</small>"
        )
    own = ", ".join(map(html.escape, sorted(origins)))
    return f"<small>Only pages of these hosts can read this one: {own}.</small>"


def agents_doc(scheduler: Any, extra: Mapping[str, Any], doc: Any) -> None:
    """Fill a Bokeh document with the page, in Dask's template."""
    doc.title = "Dask: Agents"
    use_dasks_template(doc, extra)
    use_dasks_theme(doc)
    add_to(doc, AgentsPage(scheduler))


def _plot_doc(title: str, plot: Callable[..., RunPlot]) -> Page:
    """Return what fills a Bokeh document with one plot, as large as the window."""

    def fill(scheduler: Any, extra: Mapping[str, Any], doc: Any) -> None:
        doc.title = f"Dask: {title}"
        use_dasks_theme(doc)
        add_to(doc, plot(scheduler, sizing_mode="stretch_both"))

    return fill


PAGES: dict[str, Page] = {
    "/agents": agents_doc,
    "/individual-agents": _plot_doc("Agents", AgentsTable),
    "/individual-agent-hosts": _plot_doc("Agent Hosts", HostsTable),
    "/individual-agent-partitions": _plot_doc("Agent Partitions", PartitionsPlot),
    "/individual-agent-rates": _plot_doc("Agent Rates", RatesPlot),
    "/individual-agent-latency": _plot_doc("Agent Latency", LatencyPlot),
    "/individual-agent-routing": _plot_doc("Agent Routing", RoutingPlot),
}


class AgentsJSON(RequestHandler):
    """Serves `overview.Overview`."""

    def initialize(self, scheduler: Any) -> None:
        """Take the scheduler whose runs are shown."""
        self._scheduler = scheduler

    def get(self) -> None:
        """Answer with the state of all runs."""
        self.set_header("Content-Type", "application/json")
        self.write(current(self._scheduler).to_json())


def register() -> None:
    """Have Dask serve the pages on every scheduler that this process starts from now on."""
    add_pages_to_new_schedulers(PAGES)


def install(scheduler: Any) -> None:
    """Add the pages to a scheduler that runs; one without a dashboard gets the JSON only."""
    add_url(scheduler, "/agents.json", AgentsJSON, {"scheduler": scheduler})
    add_pages(scheduler, PAGES, listed="agents", after="workers")
