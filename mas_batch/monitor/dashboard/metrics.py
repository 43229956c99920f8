"""Prometheus metrics of the runs that feed a scheduler, on its own `/metrics`.

Labels are runs (at most `inbox.MAX_RUNS` at a time), the agents of their jobs, and words of short
fixed lists; never a partition, a worker or a key. Names follow Prometheus' conventions: base units,
`_total` for what only grows while a run is executed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mas_batch.errors import Reason
from mas_batch.monitor.dashboard.inboxes import all_inboxes
from mas_batch.monitor.fleet import LiveAgent, ReplicaState
from mas_batch.monitor.inbox import HeardRun, Inbox
from mas_batch.monitor.overview import (
    PARTITION_STATES,
    PURPOSES,
    is_serving,
    progress,
    replicas_of,
)

STATUSES = ("starting", "answering", "escalating", "finished", "failed", "silent")


class AgentsCollector(Collector):
    """Reads the inboxes of all schedulers of this process; Dask's page shows the one registry."""

    def describe(self) -> Iterable[Metric]:
        """Yield the metrics without a sample."""
        return families([], 0.0)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; none in a process without an inbox."""
        if inboxes := all_inboxes():
            yield from families(inboxes, time.time())


@cache
def install() -> None:
    """Add the metrics to those of this process; another call does nothing."""
    REGISTRY.register(AgentsCollector())


def families(inboxes: Sequence[Inbox], now: float) -> Iterator[Metric]:
    """Yield all metrics of all runs.

    Args:
        now: Unix time on the scheduler's clock.
    """
    by_name = {name: heard for inbox in inboxes for name, heard in inbox.runs.items()}
    heard_runs = list(by_name.values())
    last_success = {job: at for inbox in inboxes for job, at in inbox.last_success.items()}
    yield from _progress(heard_runs, now)
    yield from _answers(heard_runs)
    yield from _replicas(heard_runs)
    yield _gauge(
        "last_success_timestamp_seconds",
        "When a run of the job was last finished, as Unix time",
        ["job_name"],
        (((name,), at) for name, at in last_success.items()),
    )


Samples = Iterable[tuple[tuple[str, ...], float]]
"""(values of the labels, value)."""


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(f"mas_batch_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(f"mas_batch_{name}", text, labels=labels), samples)


def _filled(family: Any, samples: Samples) -> Metric:
    for values, value in samples:
        family.add_metric(values, value)
    metric: Metric = family
    return metric


def _progress(heard_runs: list[HeardRun], now: float) -> Iterator[Metric]:
    runs = [heard.run for heard in heard_runs]
    yield _gauge(
        "run_records", "Records of the corpus", ["run"], (((r.name,), r.num_records) for r in runs)
    )
    yield _gauge(
        "run_progress_ratio",
        "Share of the partitions that are merged",
        ["run"],
        (((run.name,), progress(run)) for run in runs),
    )
    yield _gauge(
        "run_status",
        "1 for the status that the run has, 0 for the others",
        ["run", "status"],
        (((h.run.name, s), float(h.status(now) == s)) for h in heard_runs for s in STATUSES),
    )
    yield _gauge(
        "run_heard_timestamp_seconds",
        "When the submitting process last said something, as Unix time",
        ["run"],
        (((heard.run.name,), heard.heard) for heard in heard_runs),
    )
    yield _gauge(
        "partitions",
        "Partitions by state; those that wait are the queue",
        ["run", "state"],
        (
            ((run.name, state), count)
            for run in runs
            for state, count in zip(PARTITION_STATES, run.states, strict=True)
        ),
    )
    yield _counter(
        "records_merged",
        "Records that this execution has merged, failed ones included",
        ["run"],
        (((run.name,), run.num_results + run.num_failures) for run in runs),
    )
    yield _counter(
        "records_failed",
        "Records that this execution found no answer to, by reason",
        ["run", "reason"],
        (((r.name, reason), r.reasons.get(reason, 0)) for r in runs for reason in Reason),
    )
    yield _counter(
        "records_undecided",
        "Times that one more agent was asked about a record",
        ["run"],
        (((run.name,), run.num_undecided) for run in runs),
    )


def _answers(heard_runs: list[HeardRun]) -> Iterator[Metric]:
    pairs = [(heard.run.name, agent) for heard in heard_runs for agent in heard.run.agents.values()]
    for name, text, count in _COUNTED:
        samples = (((run, agent.agent_id), count(agent)) for run, agent in pairs)
        yield _counter(name, text, ["run", "agent"], samples)
    yield _counter(
        "tokens",
        "Tokens read and generated",
        ["run", "agent", "kind"],
        (
            ((run, agent.agent_id, kind), getattr(agent, f"{kind}_tokens"))
            for run, agent in pairs
            for kind in ("prompt", "completion")
        ),
    )
    yield _counter(
        "agent_seconds",
        "Seconds spent on answers, by part of the latency model T = T_c + T_t + T_p",
        ["run", "agent", "part"],
        (
            ((run, agent.agent_id, part), getattr(agent, f"{part}_s"))
            for run, agent in pairs
            for part in ("compute", "transfer", "processing")
        ),
    )
    yield _counter(
        "partitions_asked",
        "Times that an agent was asked about a partition, by purpose",
        ["run", "agent", "purpose"],
        (
            ((run, agent.agent_id, purpose), agent.asked.get(purpose, 0))
            for run, agent in pairs
            for purpose in PURPOSES
        ),
    )
    yield _gauge(
        "agent_agreement_ratio",
        "Share of the agent's answers that say what was merged",
        ["run", "agent"],
        (
            ((run, agent.agent_id), agent.num_agreed / agent.num_compared)
            for run, agent in pairs
            if agent.num_compared
        ),
    )


_COUNTED: list[tuple[str, str, Callable[[LiveAgent], float]]] = [
    ("answers", "Answers given", lambda agent: agent.num_answers),
    ("answers_failed", "Answers with a reason instead of a text", lambda agent: agent.num_failed),
    (
        "tries_failed",
        "Tries on a partition that came to nothing",
        lambda agent: agent.num_failed_tries,
    ),
    (
        "partitions_given_up",
        "Partitions that an agent is not asked about again",
        lambda agent: agent.num_given_up,
    ),
]


def _replicas(heard_runs: list[HeardRun]) -> Iterator[Metric]:
    fleets = [
        (run, agent_id, replicas_of(run, agent_id))
        for run in (heard.run for heard in heard_runs)
        for agent_id in run.agents
    ]
    yield _gauge(
        "replicas",
        "Workers that serve an agent, by state; of those that are lost, the last twenty",
        ["run", "agent", "state"],
        (
            ((run.name, agent_id, str(state)), count[state])
            for run, agent_id, replicas in fleets
            for count in [Counter(replica.shown_state for replica in replicas)]
            for state in ReplicaState
        ),
    )
    yield _gauge(
        "replicas_wanted",
        "Workers that the job asks for; more may serve an agent",
        ["run", "agent"],
        (((run.name, a), run.agents[a].num_wanted) for run, a, _ in fleets),
    )
    yield _gauge(
        "in_flight_partitions",
        "Partitions at the agent's workers",
        ["run", "agent"],
        (
            ((run.name, agent), sum(r.in_flight for r in replicas))
            for run, agent, replicas in fleets
        ),
    )
    yield _gauge(
        "window_partitions",
        "Partitions that may be at the agent's workers",
        ["run", "agent"],
        (
            ((run.name, agent_id), run.window * sum(is_serving(r) for r in replicas))
            for run, agent_id, replicas in fleets
        ),
    )
