"""Adds `/agents`, its single plots and `/agents.json` to a scheduler's dashboard."""

from __future__ import annotations

import html
from typing import Any

from bokeh.layouts import column, row
from bokeh.models.widgets import Div, Select
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env, individual_doc
from distributed.dashboard.core import BokehApplication, DaskBokehTornado
from distributed.dashboard.scheduler import applications, template_variables
from distributed.http.utils import RequestHandler
from tornado.ioloop import IOLoop

from mas_batch.monitor.dashboard.base import current
from mas_batch.monitor.dashboard.plots import AgentLatency, Partitions, Rates, Routing
from mas_batch.monitor.dashboard.tables import AgentsTable, ReplicasTable
from mas_batch.monitor.overview import RunRow

_EVERY_MS = 500
_NEWEST = "the newest run"


class AgentsPage:
    """All plots of one run, which the viewer may choose."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._select = Select(value=_NEWEST, width=320)
        self._summary = Div(sizing_mode="stretch_width")
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        agents, replicas = AgentsTable(scheduler, **wide), ReplicasTable(scheduler, **wide)
        charts = [
            Partitions(scheduler, height=240, **wide),
            Rates(scheduler, height=240, **wide),
            Rates(scheduler, name="tokens_per_s", height=240, **wide),
        ]
        means = [
            AgentLatency(scheduler, height=240, **wide),
            Routing(scheduler, height=240, **wide),
        ]
        self._plots = [agents, *charts, *means, replicas]
        self.root = column(
            row(self._select, self._summary, **wide),
            agents.root,
            row([chart.root for chart in charts], **wide),
            row([mean.root for mean in means], **wide),
            replicas.root,
            **wide,
        )

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


def agents_doc(scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
    """Fill a Bokeh document with the page, in Dask's template."""
    page = AgentsPage(scheduler)
    page.update()
    add_periodic_callback(doc, page, _EVERY_MS)
    doc.title = "Dask: Agents"
    doc.add_root(page.root)
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)
    doc.theme = BOKEH_THEME


PAGES = {
    "/agents": agents_doc,
    "/individual-agents": individual_doc(AgentsTable, _EVERY_MS),
    "/individual-agent-replicas": individual_doc(ReplicasTable, _EVERY_MS),
    "/individual-agent-partitions": individual_doc(Partitions, _EVERY_MS),
    "/individual-agent-rates": individual_doc(Rates, _EVERY_MS),
    "/individual-agent-latency": individual_doc(AgentLatency, _EVERY_MS),
    "/individual-agent-routing": individual_doc(Routing, _EVERY_MS),
}


class AgentsJSON(RequestHandler):  # type: ignore[misc]
    """Serves `overview.Overview`."""

    def get(self) -> None:
        """Answer with the state of all runs."""
        self.set_header("Content-Type", "application/json")
        self.write(current(self.server).to_json())


def register() -> None:
    """Have Dask serve the pages on every scheduler that this process starts from now on."""
    applications.update(PAGES)


def install(scheduler: Any) -> None:
    """Add the pages to a scheduler that runs; one without a dashboard gets the JSON only."""
    http = scheduler.http_application
    bokeh = next((app for app in http.applications if isinstance(app, DaskBokehTornado)), None)
    prefix = bokeh.prefix if bokeh is not None else ""
    http.add_handlers(r".*$", [(f"{prefix}/agents.json", AgentsJSON, {"dask_server": scheduler})])
    if bokeh is None:
        return
    variables = template_variables(scheduler)
    if "agents" not in variables["pages"]:
        variables["pages"].insert(variables["pages"].index("workers") + 1, "agents")
    if "/agents" in bokeh.app_paths:
        return  # registered before the dashboard was started
    listed = {plot["url"] for plot in variables["plots"]}
    ours = [path.strip("/") for path in PAGES if path.startswith("/individual")]
    variables["plots"] += [
        {"url": url, "name": url.removeprefix("individual-").replace("-", " ").title()}
        for url in ours
        if url not in listed
    ]
    variables["plots"].sort(key=lambda plot: plot["name"])
    application = BokehApplication(PAGES, scheduler, prefix=prefix, template_variables=variables)
    http.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
