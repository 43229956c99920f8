"""What a run waits for most, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mas_batch.latency.phases import ANSWERING
from mas_batch.planning.forecast import Forecast

Kind = Literal["start", "submitter", "cores", "tail", "agent"]

_FULL = 0.9
"""Share of the time from which on an agent, the cores or the submitter count as fully busy."""
_LONG_TAIL = 0.15
"""Share of answering in which a host of the busiest agent has nothing left to do."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What a run waits for most, and what would help."""

    kind: Kind
    post: str | None
    """Where it is the agents of one post."""
    fraction: float
    """Of what `what` says."""
    what: str
    help: str


def find_bottleneck(forecast: Forecast) -> Bottleneck:
    """Name what a predicted run waits for most."""
    phases, result = forecast.phases, forecast.result
    rest = 1 - phases[ANSWERING] / forecast.duration_s
    if rest > 0.5:
        slowest = max((name for name in phases if name != ANSWERING), key=phases.__getitem__)
        return Bottleneck(
            "start",
            None,
            rest,
            f"{rest:.0%} of the time is spent before and after answering, most of it {slowest}",
            "more records per run: other settings hardly matter here",
        )
    asking_s = max(1e-9, result.asking_s)
    handling = result.handling_s / asking_s
    if handling > _FULL:
        return Bottleneck(
            "submitter",
            None,
            handling,
            f"the submitting process is busy {handling:.0%} of the time with its partitions",
            "larger partitions (partition.max_records, partition.max_tokens)",
        )
    busy = forecast.busy_fractions()
    busiest = max(busy, key=busy.__getitem__)
    if forecast.core_fraction > _FULL:
        largest = max(forecast.totals, key=lambda name: forecast.totals[name].own_s)
        return Bottleneck(
            "cores",
            busiest,
            forecast.core_fraction,
            f"this machine's cores are busy {forecast.core_fraction:.0%} of the time, most of it "
            f"with {largest}",
            "more or faster cores: a Dask cluster on other machines; more hosts here do not",
        )
    hosts = [f"{busiest}-{number}" for number in range(forecast.hosts[busiest])]
    first_ended_s = min(result.ended_s.get(name, result.loaded_s) for name in hosts)
    tail = (result.makespan_s - first_ended_s) / asking_s
    if busy[busiest] < _FULL and tail > _LONG_TAIL:
        return Bottleneck(
            "tail",
            busiest,
            tail,
            f"for the last {tail:.0%} of answering a host of {busiest} has nothing left to do",
            "smaller partitions, so that all hosts end at the same time",
        )
    return Bottleneck(
        "agent",
        busiest,
        busy[busiest],
        f"{busiest} is busy {busy[busiest]:.0%} of the time",
        f"more hosts of {busiest}",
    )
