"""What the tasks and phases of a planned run take, by what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dask.system import CPU_COUNT

from mas_batch.agents.posts import posts_of
from mas_batch.agents.spec import agent_specs
from mas_batch.engines.job_options import partitions_at_once
from mas_batch.job import Job
from mas_batch.latency.phases import COUNTING, LEARNING, PUBLISHING, READING, STARTING
from mas_batch.planning.measurements import AgentMeasurements, Measurements
from mas_batch.planning.service_time import (
    Floats,
    ServiceTime,
    fit,
    nonnegative_least_squares,
)

HANDLE_S = 0.005
"""Of the submitting process and its scheduler per piece of news: docs/scale.md has 10.5 ms for a
partition of one agent, which makes two."""
_STAGE_RECORD_S = 5e-5
"""Staging a record; docs/scale.md has 0.6 ms for ten."""
_START_WORKER_S = 1.0
"""One more embedded worker process, on one core."""
_PER_PARTITION_S = {READING: 0.003, COUNTING: 0.006, LEARNING: 0.01, PUBLISHING: 1e-5}
"""Phase → seconds per partition, where all runs measured had one number of them; docs/scale.md."""
_MAX_SLOPE_FACTOR = 4.0
"""Two runs of a few partitions measure a slope badly: it is kept within so many times of
`_PER_PARTITION_S`, above and below."""


@dataclass(frozen=True, slots=True, eq=False)
class AgentRates:
    """What one agent's tasks take in the planned run."""

    answer: ServiceTime
    load_s: float
    cores: float
    """Of the shared machine that a host keeps busy; 0: its hardware is its own."""
    concurrent: int
    """Partitions that a host works on at once, as far as the job's window allows."""
    overlap: float
    """Share of a task's time in which the engine can work for others."""


@dataclass(frozen=True, slots=True, eq=False)
class RunRates:
    """What all tasks take in the planned run."""

    agents: Mapping[str, AgentRates]
    merge: ServiceTime
    send_s: float
    num_cores: float
    """Of the machine that hosts share; infinite: they share none."""


def fit_rates(
    job: Job,
    measurements: Measurements,
    hosts: Mapping[str, int],
    *,
    embedded: bool,
) -> RunRates:
    """Fit what tasks take, for so many hosts.

    On the embedded cluster hosts share this machine's cores; elsewhere each is taken to have
    hardware of its own. More threads are taken to make a host faster in proportion.
    """
    planned = with_hosts(job, hosts)
    specs = agent_specs(planned, embedded=embedded, num_cores=CPU_COUNT)
    found = {}
    for agent in job.agents:
        known = measurements.agents[agent.name]
        threads = specs[agent.name].threads
        shares = embedded and known.cores > 0
        faster = threads / known.threads if shares and known.threads and threads else 1.0
        found[agent.name] = AgentRates(
            fit(known.tasks, job.task.max_new_tokens).scaled(1 / faster),
            known.load_s / faster,
            float(threads or 1) if shares else 0.0,
            partitions_at_once(agent, known.engine),
            _overlap(known),
        )
    merges = measurements.merges
    return RunRates(
        found,
        fit(merges, job.task.max_new_tokens) if len(merges) else ServiceTime(),
        measurements.send_s,
        float(CPU_COUNT) if embedded else float("inf"),
    )


def _overlap(known: AgentMeasurements) -> float:
    whole_s = sum(known.parts_s.values())
    if known.engine.computes_elsewhere or not whole_s:
        return 1.0  # what a task takes is no share of the engine's time
    return 1.0 - known.parts_s["compute"] / whole_s


def with_hosts(job: Job, hosts: Mapping[str, int]) -> Job:
    """Return the job with so many hosts of each post."""
    count = {agent: hosts[post.name] for post in posts_of(job) for agent in post.agents}
    agents = tuple(
        agent.with_changes(count=count[agent.name], max_count=None) for agent in job.agents
    )
    return job.with_changes(agents=agents)


def tokens_asked(
    known: AgentMeasurements, num_records: float, text_tokens: float
) -> tuple[int, int]:
    """Return (prompt tokens, completion tokens) of an agent asked about so much."""
    columns = known.tasks[["num_records", "text_tokens"]].to_numpy(float)
    weights = 1 / np.maximum(1.0, columns.sum(axis=1))
    asked = np.array([num_records, text_tokens])
    prompt, completion = (
        nonnegative_least_squares(columns, known.tasks[counts].to_numpy(float), weights) @ asked
        for counts in ("prompt_tokens", "completion_tokens")
    )
    return round(prompt), round(completion)


def other_phases(
    measurements: Measurements,
    *,
    num_partitions: int,
    num_records: int,
    read_s: float,
    num_workers: int,
) -> dict[str, float]:
    """Return the seconds of all phases but those that a simulation has.

    Args:
        num_workers: of the embedded cluster; 0: it is the user's, and there already.
    """
    found = {
        name: _by_partitions(
            [(p, phases[name]) for p, phases in measurements.phases], slope, num_partitions
        )
        for name, slope in _PER_PARTITION_S.items()
        if any(phases[name] for _, phases in measurements.phases)
    }
    found[READING] = found.get(READING, 0.0) + read_s + _STAGE_RECORD_S * num_records
    starts = [phases[STARTING] for _, phases in measurements.phases]
    if starts:
        more = (num_workers - measurements.num_workers) * _START_WORKER_S / CPU_COUNT
        measured = float(np.mean(starts))
        found[STARTING] = max(measured / 3, measured + more) if num_workers else measured
    return found


def _by_partitions(seen: Sequence[tuple[int, float]], prior: float, num_partitions: int) -> float:
    """Extrapolate a phase to a number of partitions, never below its constant part."""
    counts: Floats = np.array([count for count, _ in seen], float)
    seconds: Floats = np.array([spent for _, spent in seen])
    slope = prior
    if counts.max() > counts.min():
        found = float(np.polyfit(counts, seconds, 1)[0])
        slope = float(np.clip(found, prior / _MAX_SLOPE_FACTOR, prior * _MAX_SLOPE_FACTOR))
    constant = max(0.0, float(np.mean(seconds - slope * counts)))
    return constant + slope * num_partitions
