"""The charts of the agents' page; each is also a plot by itself."""

from __future__ import annotations

from typing import Any

from bokeh.models import DataRange1d, FactorRange, HoverTool
from bokeh.plotting import figure

from mas_batch.monitor.dashboard.base import RunPlot
from mas_batch.monitor.overview import PARTITION_STATES, PURPOSES, RunRow

_PARTITION_COLOURS = ("#e0e0e0", "#fd8d3c", "#9ecae1", "#2171b5")
_PARTS = ("compute", "transfer", "processing", "waiting")
_PART_COLOURS = ("#2171b5", "#fd8d3c", "#9ecae1", "#e0e0e0")


class HistoryPlot(RunPlot):
    """Something over the whole run."""

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return columns of the history."""
        return {name: [getattr(point, name) for point in run.history] for name in self.columns}


class PartitionsPlot(HistoryPlot):
    """Partitions by state, over the whole run."""

    columns = ("at_s", *PARTITION_STATES)

    def build(self, **kwargs: Any) -> Any:
        """Return a stack of areas, what is merged at the bottom."""
        plot = _figure("Partitions", "seconds", **kwargs)
        plot.varea_stack(
            list(reversed(PARTITION_STATES)),
            x="at_s",
            color=list(reversed(_PARTITION_COLOURS)),
            legend_label=list(reversed(PARTITION_STATES)),
            source=self.source,
        )
        plot.legend[0].items.reverse()  # in the order of the stack
        return _with_legend(plot)


class RatesPlot(HistoryPlot):
    """Records merged per second, over the whole run."""

    columns = ("at_s", "records_per_s")
    title = "Records per second"

    def build(self, **kwargs: Any) -> Any:
        """Return a line."""
        rate = self.columns[1]
        plot = _figure(self.title, "seconds", **kwargs)
        plot.line(x="at_s", y=rate, line_width=2, color="#2171b5", source=self.source)
        hover = HoverTool(tooltips=[("at", "@at_s s"), ("per second", f"@{rate}{{0,0.0}}")])
        hover.mode = "vline"
        plot.add_tools(hover)
        return plot


class TokenRatesPlot(RatesPlot):
    """Tokens generated per second, over the whole run."""

    columns = ("at_s", "tokens_per_s")
    title = "Tokens per second"


class LatencyPlot(RunPlot):
    """Seconds per record and agent, by part."""

    columns = ("agent", *_PARTS)

    def build(self, **kwargs: Any) -> Any:
        """Return stacked bars, one per agent."""
        plot = _figure("Seconds per record", "seconds", y_range=FactorRange(factors=[]), **kwargs)
        plot.hbar_stack(
            list(_PARTS),
            y="agent",
            height=0.6,
            color=list(_PART_COLOURS),
            legend_label=list(_PARTS),
            source=self.source,
        )
        plot.add_tools(
            HoverTool(tooltips=[("agent", "@agent"), *((p, f"@{p}{{0.0000}} s") for p in _PARTS)])
        )
        return _with_legend(plot)

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return the means of each agent's records."""
        agents = [agent for agent in reversed(run.agents) if agent.records]
        self.root.y_range.factors = [agent.agent for agent in agents]
        parts = [
            (a.compute_s, a.transfer_s, a.processing_s - a.waiting_s, a.waiting_s) for a in agents
        ]
        means = {
            name: [each[i] / a.records for a, each in zip(agents, parts, strict=True)]
            for i, name in enumerate(_PARTS)
        }
        return {"agent": [agent.agent for agent in agents], **means}


class RoutingPlot(RunPlot):
    """How often each agent was asked, and for what."""

    columns = ("agent", "purpose", "count", "shade")

    def build(self, **kwargs: Any) -> Any:
        """Return a matrix of counts."""
        plot = _figure(
            "Partitions asked, by purpose",
            "",
            x_range=FactorRange(factors=list(PURPOSES)),
            y_range=FactorRange(factors=[]),
            **kwargs,
        )
        place = {"x": "purpose", "y": "agent", "source": self.source}
        fill = {"fill_color": "#6baed6", "line_color": None, "alpha": "shade"}
        plot.rect(width=0.96, height=0.9, **fill, **place)
        centred = {"text_align": "center", "text_baseline": "middle", "text_font_size": "12px"}
        plot.text(text="count", **centred, **place)
        plot.grid.visible = False
        return plot

    def data(self, run: RunRow) -> dict[str, list[Any]]:
        """Return a cell per agent and purpose."""
        self.root.y_range.factors = [agent.agent for agent in reversed(run.agents)]
        cells = [(a.agent, p, a.asked.get(p, 0)) for a in run.agents for p in PURPOSES]
        most = max((count for _, _, count in cells), default=0)
        return {
            "agent": [agent for agent, _, _ in cells],
            "purpose": [purpose for _, purpose, _ in cells],
            "count": [f"{count:,}" if count else "" for _, _, count in cells],
            "shade": [0.15 + 0.6 * count / most if count else 0.04 for _, _, count in cells],
        }


def _figure(title: str, x_title: str, **kwargs: Any) -> Any:
    plot = figure(title=title, tools="", toolbar_location=None, **kwargs)
    plot.xaxis.axis_label = x_title or None
    plot.xaxis.minor_tick_line_alpha = plot.yaxis.minor_tick_line_alpha = 0
    for axis in {"x_range", "y_range"} - set(kwargs):
        setattr(plot, axis, DataRange1d(start=0))
    return plot


def _with_legend(plot: Any) -> Any:
    """Put the legend beside the plot, where it hides nothing."""
    legend = plot.legend[0]
    legend.border_line_color, legend.padding, legend.spacing = None, 0, 2
    legend.label_text_font_size, legend.background_fill_alpha = "11px", 0
    legend.glyph_height = legend.glyph_width = 12
    plot.add_layout(legend, "right")
    return plot
