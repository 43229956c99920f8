"""What a run waits for most, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mas_batch.latency.phases import ANSWERING
from mas_batch.planning.forecast import Forecaster, Outcome, Setting, busy_fractions

Kind = Literal["start", "submitter", "cores", "tail", "agent"]

_FULL = 0.9
"""A share of the time from which on somebody is called fully busy."""
_LONG_TAIL = 0.15
"""Of answering, while a replica of the busiest agent has nothing left to do."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What holds a run up, and what would help."""

    kind: Kind
    agent_id: str | None
    """Where it is one agent."""
    fraction: float
    """Of what `what` says."""
    what: str
    help: str


def find_bottleneck(forecaster: Forecaster, setting: Setting, outcome: Outcome) -> Bottleneck:
    """Name what a simulated run waits for most."""
    answering_s, total_s = outcome.phases[ANSWERING], outcome.duration_s
    rest = 1 - answering_s / total_s
    if rest > 0.5:
        slowest = max(
            (name for name in outcome.phases if name != ANSWERING), key=outcome.phases.__getitem__
        )
        return Bottleneck(
            "start",
            None,
            rest,
            f"{rest:.0%} of the time is spent before and after answering, most of it {slowest}",
            "more records per run: other settings hardly matter here",
        )
    history = outcome.history
    simulated_s = max(1e-9, history.asking_s)
    handling = history.handling_s / simulated_s
    if handling > _FULL:
        return Bottleneck(
            "submitter",
            None,
            handling,
            f"the submitting process is busy {handling:.0%} of the time with its partitions",
            "larger partitions (partition.max_records, partition.max_tokens)",
        )
    busy = busy_fractions(setting, outcome)
    busiest = max(busy, key=lambda name: busy[name])
    if outcome.core_fraction > _FULL:
        return Bottleneck(
            "cores",
            busiest,
            outcome.core_fraction,
            f"this machine's cores are busy {outcome.core_fraction:.0%} of the time, most of it "
            f"with {_hungriest(outcome)}",
            "more or faster cores: a Dask cluster on other machines; more replicas here do not",
        )
    own = [history.ended_s.get(name, history.loaded_s) for name in _names(setting, busiest)]
    tail = (history.makespan_s - min(own)) / simulated_s
    if busy[busiest] < _FULL and tail > _LONG_TAIL:
        return Bottleneck(
            "tail",
            busiest,
            tail,
            f"for the last {tail:.0%} of answering a replica of {busiest} has nothing left to do",
            "smaller partitions, so that all replicas end at the same time",
        )
    return Bottleneck(
        "agent",
        busiest,
        busy[busiest],
        f"{busiest} is busy {busy[busiest]:.0%} of the time",
        f"more replicas of {busiest}",
    )


def _names(setting: Setting, agent_id: str) -> list[str]:
    return [f"{agent_id}-{number}" for number in range(setting.replicas[agent_id])]


def _hungriest(outcome: Outcome) -> str:
    return max(outcome.shares, key=lambda name: outcome.shares[name].own_s)
