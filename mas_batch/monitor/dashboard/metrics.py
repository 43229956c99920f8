"""Prometheus metrics of the runs that feed a scheduler, on its own `/metrics`.

Labels are runs (at most `board.MAX_RUNS` at a time), the agents of their jobs, and words of short
fixed lists; never a partition, a worker or a key. Names follow Prometheus' conventions: base units,
`_total` for what only grows while a run is executed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed.http.scheduler.prometheus import core
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mas_batch.errors import Reason
from mas_batch.monitor.board import Board, Entry
from mas_batch.monitor.dashboard.plugin import board_of
from mas_batch.monitor.fleet import LiveAgent, ReplicaState
from mas_batch.monitor.overview import PARTITION_STATES, is_serving, progress, replicas_of

STATUSES = ("starting", "answering", "escalating", "finished", "failed", "silent")
PURPOSES = ("answer", "retry", "careful", "copy", "probe")


def install(scheduler: Any) -> None:
    """Add the metrics to the scheduler's page.

    Dask registers its collectors once per process, at the first scrape, and points them to the
    scheduler that is asked; ours goes the same way.
    """
    handler = core.PrometheusHandler
    if AgentsCollector in core.COLLECTORS:
        return
    core.COLLECTORS = [*core.COLLECTORS, AgentsCollector]
    if handler._collectors:  # there was a scrape before
        ours = AgentsCollector(scheduler)
        handler._collectors = (*handler._collectors, ours)
        core.prometheus_client.REGISTRY.register(ours)


class AgentsCollector(core.PrometheusCollector):  # type: ignore[misc]
    """Reads the board of the scheduler that Dask points it to."""

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; none on a scheduler without a board."""
        board = board_of(self.server)
        if board is not None:
            yield from families(board, time.time())


def families(board: Board, now: float) -> Iterator[Metric]:
    """Yield all metrics of all runs.

    Args:
        now: Unix time on the scheduler's clock.
    """
    entries = list(board.entries.values())
    yield from _progress(entries, now)
    yield from _answers(entries)
    yield from _replicas(entries)
    yield _gauge(
        "last_success_timestamp_seconds",
        "When a run of the job was last finished, as Unix time",
        ["job_name"],
        (((name,), at) for name, at in board.last_success.items()),
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


def _progress(entries: list[Entry], now: float) -> Iterator[Metric]:
    runs = [entry.run for entry in entries]
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
        (((e.run.name, s), float(e.status(now) == s)) for e in entries for s in STATUSES),
    )
    yield _gauge(
        "run_heard_timestamp_seconds",
        "When the submitting process last said something, as Unix time",
        ["run"],
        (((entry.run.name,), entry.heard) for entry in entries),
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


def _answers(entries: list[Entry]) -> Iterator[Metric]:
    pairs = [(entry.run.name, agent) for entry in entries for agent in entry.run.agents.values()]
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


def _replicas(entries: list[Entry]) -> Iterator[Metric]:
    fleets = [
        (run, agent_id, replicas_of(run, agent_id))
        for run in (entry.run for entry in entries)
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
