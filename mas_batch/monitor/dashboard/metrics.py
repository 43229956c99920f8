"""Prometheus metrics of the runs that feed a scheduler, on its own `/metrics`.

Labels are runs (at most `inbox.MAX_RUNS` at a time), the agents and posts of their jobs, and words
of short fixed lists; never a partition, a worker or a key. Names follow Prometheus' conventions:
base units, `_total` for what only grows while a run is executed.
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
from mas_batch.monitor.dashboard.inboxes import INBOXES
from mas_batch.monitor.fleet import HostState, LiveAgent, LivePost
from mas_batch.monitor.inbox import HeardRun, Inbox
from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.overview import (
    PARTITION_STATES,
    PURPOSES,
    hosts_of,
    memory_of,
    progress,
    window_of,
)

STATUSES = ("starting", "answering", "escalating", "finished", "failed", "silent")
_PARTS = ("compute", "transfer", "processing", "waiting")


class AgentsCollector(Collector):
    """Reads the inboxes of all schedulers of this process; Dask's page shows the one registry."""

    def describe(self) -> Iterable[Metric]:
        """Yield the metrics without a sample."""
        return families([], 0.0)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; none in a process without an inbox."""
        if inboxes := list(INBOXES.values()):
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
    heard_runs = {name: heard for inbox in inboxes for name, heard in inbox.runs.items()}
    for kind, name, text, labels, read in _OF_RUNS:
        samples: Samples = {
            (run, *values): value
            for run, heard in heard_runs.items()
            for values, value in read(heard, now).items()
        }
        yield _family(kind, name, text, ["run", *labels], samples)
    for kind, name, text, labels, read_agent in _OF_AGENTS:
        samples = {
            (run, agent_id, *values): value
            for run, heard in heard_runs.items()
            for agent_id, agent in heard.run.agents.items()
            for values, value in read_agent(agent, heard.run).items()
        }
        yield _family(kind, name, text, ["run", "agent", *labels], samples)
    for kind, name, text, labels, read_post in _OF_POSTS:
        samples = {
            (run, post.name, *values): value
            for run, heard in heard_runs.items()
            for post in heard.run.posts.values()
            for values, value in read_post(post, heard.run).items()
        }
        yield _family(kind, name, text, ["run", "post", *labels], samples)
    samples = {(job,): at for inbox in inboxes for job, at in inbox.last_success.items()}
    text = "When a run of the job was last finished, as Unix time"
    yield _family(GaugeMetricFamily, "last_success_timestamp_seconds", text, ["job_name"], samples)


Samples = dict[tuple[str, ...], float]
"""Values of the labels → value."""


def _family(kind: Any, name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    family = kind(f"mas_batch_{name}", text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    metric: Metric = family
    return metric


def _by(words: Iterable[str], counts: Iterable[float]) -> Samples:
    return {(word,): count for word, count in zip(words, counts, strict=True)}


def _by_state(post: LivePost, run: LiveRun) -> Samples:
    count = Counter(host.shown_state for host in hosts_of(run, post))
    return {(str(state),): count[state] for state in HostState}


_OF_RUNS: list[tuple[type, str, str, list[str], Callable[[HeardRun, float], Samples]]] = [
    (
        GaugeMetricFamily, "run_records", "Records of the corpus",
        [], lambda heard, now: {(): heard.run.num_records},
    ),
    (
        GaugeMetricFamily, "run_progress_ratio", "Share of the partitions that are merged",
        [], lambda heard, now: {(): progress(heard.run)},
    ),
    (
        GaugeMetricFamily, "run_status", "1 for the status that the run has, 0 for the others",
        ["status"], lambda heard, now: {(s,): float(heard.status(now) == s) for s in STATUSES},
    ),
    (
        GaugeMetricFamily, "run_heard_timestamp_seconds",
        "When the submitting process last said something, as Unix time",
        [], lambda heard, now: {(): heard.heard},
    ),
    (
        GaugeMetricFamily, "partitions", "Partitions by state; those that wait are the queue",
        ["state"], lambda heard, now: _by(PARTITION_STATES, heard.run.states),
    ),
    (
        CounterMetricFamily, "records_merged",
        "Records that this execution has merged, failed ones included",
        [], lambda heard, now: {(): heard.run.num_results + heard.run.num_failures},
    ),
    (
        CounterMetricFamily, "records_failed",
        "Records that this execution found no answer to, by reason",
        ["reason"], lambda heard, now: {(r,): heard.run.reasons.get(r, 0) for r in Reason},
    ),
    (
        CounterMetricFamily, "records_undecided",
        "Times that one more agent was asked about a record",
        [], lambda heard, now: {(): heard.run.num_undecided},
    ),
]  # fmt: skip
_OF_AGENTS: list[tuple[type, str, str, list[str], Callable[[LiveAgent, LiveRun], Samples]]] = [
    (
        CounterMetricFamily, "answers", "Answers given",
        [], lambda agent, run: {(): agent.num_answers},
    ),
    (
        CounterMetricFamily, "answers_failed", "Answers with a reason instead of a text",
        [], lambda agent, run: {(): agent.num_failed},
    ),
    (
        CounterMetricFamily, "tries_failed", "Tries on a partition that came to nothing",
        [], lambda agent, run: {(): agent.num_failed_tries},
    ),
    (
        CounterMetricFamily, "partitions_given_up",
        "Partitions that an agent is not asked about again",
        [], lambda agent, run: {(): agent.num_given_up},
    ),
    (
        CounterMetricFamily, "tokens", "Tokens read and generated",
        ["kind"],
        lambda a, run: _by(("prompt", "completion"), (a.prompt_tokens, a.completion_tokens)),
    ),
    (
        CounterMetricFamily, "agent_seconds",
        "Seconds spent on answers, by part of the latency model T = T_c + T_t + T_p, "
        "T_p without its waiting",
        ["part"],
        lambda a, run: _by(
            _PARTS, (a.compute_s, a.transfer_s, a.processing_s - a.waiting_s, a.waiting_s)
        ),
    ),
    (
        CounterMetricFamily, "partitions_asked",
        "Times that an agent was asked about a partition, by purpose",
        ["purpose"], lambda agent, run: {(p,): agent.asked.get(p, 0) for p in PURPOSES},
    ),
    (
        GaugeMetricFamily, "agent_agreement_ratio",
        "Share of the agent's answers that say what was merged",
        [], lambda a, run: {(): a.num_agreed / a.num_compared} if a.num_compared else {},
    ),
    (
        GaugeMetricFamily, "in_flight_partitions", "The agent's partitions at hosts",
        [], lambda agent, run: {(): agent.in_flight},
    ),
]  # fmt: skip
_OF_POSTS: list[tuple[type, str, str, list[str], Callable[[LivePost, LiveRun], Samples]]] = [
    (
        GaugeMetricFamily, "hosts",
        "Hosts by state, counted once for all agents that share them; of those that are lost, "
        "the last twenty",
        ["state"], _by_state,
    ),
    (
        GaugeMetricFamily, "hosts_wanted", "Hosts that the job asks for; more may be there",
        [], lambda post, run: {(): post.num_wanted},
    ),
    (
        GaugeMetricFamily, "window_partitions", "Partitions that may be at the hosts",
        [], lambda post, run: {(): window_of(run, post)},
    ),
    (
        GaugeMetricFamily, "hosts_peak_memory_bytes",
        "Memory of the hosts' processes at their peaks, in sum",
        [], lambda post, run: {(): memory_of(run, post)},
    ),
]  # fmt: skip
