"""Predicts a job's run, compares numbers of hosts, and says which meet a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dask.system import CPU_COUNT
from distributed import Client

from mas_batch import cluster
from mas_batch.agents.posts import posts_of
from mas_batch.job import Job
from mas_batch.planning.bottleneck import find_bottleneck
from mas_batch.planning.forecast import Forecast, Forecaster
from mas_batch.planning.measurements import gather
from mas_batch.planning.prediction import (
    AgentPrediction,
    Allocation,
    HostsPrediction,
    Recommendation,
    RunPrediction,
)
from mas_batch.planning.sampling import OtherPrograms, other_programs, sampled
from mas_batch.planning.shares import escalated_share, undecided_shares
from mas_batch.planning.survey import Survey, survey
from mas_batch.run_folder.read import Run, open_run

MEDIAN_ERROR, WORST_ERROR = 0.01, 0.22
"""How far predictions were off in the nine runs of docs/planner.md, of the measured time."""
_QUIET = 0.1
"""Share of the cores that other programs may take without being mentioned."""


def plan(
    job: Job,
    *,
    former: str | None = None,
    num_sampled: int = 64,
    deadline_s: float | None = None,
    hosts: tuple[int, int] | None = None,
    client: Client | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> RunPrediction:
    """Predict a run of the job.

    Args:
        former: a published run to learn from, of this job or one with the same agents; None: a
            sample of the corpus is run first.
        num_sampled: records of that sample.
        deadline_s: for the recommendation: the fewest hosts that end by then, even if the run
            takes longer by `WORST_ERROR`.
        hosts: the fewest and the most of each post to look at; None: 1 to 4, or twice the
            job's.
        client: as `pipeline.run` takes it.
        tell: called with a line for people before anything that takes long.

    Raises:
        JobError: the job cannot run as written, its corpus has no usable record, or `former`
            does not know one of its agents.
        MasBatchError: the sample could not be run.
    """
    tell("reading the corpus")
    seen = survey(job, num_sampled)
    embedded = cluster.is_embedded(job.cluster, client or cluster.current_client())
    bounds = hosts or (1, max(4, 2 * max(agent.most for agent in job.agents)))
    if former is not None:
        forecaster = _learn([open_run(former)], job, former, seen, embedded)
        tell("simulating")
        return predict(forecaster, bounds, deadline_s=deadline_s)
    start = time.perf_counter()
    with other_programs() as others, sampled(job, seen.sample, client, tell) as runs:
        source = f"a sample of {len(seen.sample)} records"
        forecaster = _learn(runs, job, source, seen, embedded)
    measuring_s = time.perf_counter() - start
    tell("simulating")
    found = predict(forecaster, bounds, deadline_s=deadline_s)
    notes = found.notes + (_others_note(others) if embedded else ())
    return replace(found, measuring_s=measuring_s, notes=notes)


def predict(
    forecaster: Forecaster, bounds: tuple[int, int], *, deadline_s: float | None = None
) -> RunPrediction:
    """Predict the run with the job's own hosts and with other numbers; see `plan`.

    Args:
        bounds: the fewest and the most hosts of each post.
    """
    job, seen = forecaster.job, forecaster.survey
    own = forecaster.forecast({post.name: post.most for post in posts_of(job)})
    others = list(_growing(forecaster, *bounds))
    return RunPrediction(
        job=job.name,
        source=forecaster.measurements.source,
        measuring_s=0.0,
        num_records=seen.num_records,
        num_usable=seen.num_usable,
        num_partitions=seen.num_partitions,
        policy=job.routing.policy,
        own=_allocation(own),
        median_error=MEDIAN_ERROR,
        worst_error=WORST_ERROR,
        phases=own.phases,
        agents=tuple(_agents(forecaster, own)),
        posts=tuple(_posts(forecaster, own)),
        bottleneck=find_bottleneck(own),
        allocations=tuple(map(_allocation, others)),
        recommendation=None if deadline_s is None else _recommend(others, bounds, deadline_s),
        notes=tuple(_notes(forecaster)),
    )


def _learn(runs: list[Run], job: Job, source: str, seen: Survey, embedded: bool) -> Forecaster:
    return Forecaster(
        job=job,
        measurements=gather(runs, job, source, embedded=embedded),
        survey=seen,
        undecided=undecided_shares(runs, job),
        escalated=escalated_share(runs, job),
        embedded=embedded,
    )


def _growing(forecaster: Forecaster, fewest: int, most: int) -> Iterator[Forecast]:
    """Yield ever more hosts: each time one more of the post that is busiest."""
    hosts = {post.name: fewest for post in posts_of(forecaster.job)}
    while True:
        forecast = forecaster.forecast(dict(hosts))
        yield forecast
        growing = [name for name in hosts if hosts[name] < most]
        if not growing:
            return
        busy = forecast.busy_fractions()
        hosts[max(growing, key=lambda name: busy[name])] += 1


def _allocation(forecast: Forecast) -> Allocation:
    return Allocation(forecast.hosts, forecast.duration_s)


def _agents(forecaster: Forecaster, forecast: Forecast) -> Iterator[AgentPrediction]:
    posts = {name: post.name for post in posts_of(forecaster.job) for name in post.agents}
    for agent in forecaster.job.agents:
        measured = forecaster.measurements.agents[agent.name]
        totals = forecast.totals.get(agent.name)
        asked = round(totals.num_records * agent.samples) if totals else 0
        failed = round(asked * measured.failed_fraction)
        prompt, completion = forecaster.tokens(forecast, agent.name)
        yield AgentPrediction(
            agent_id=agent.name,
            post=posts[agent.name],
            answers=asked - failed,
            failed_answers=failed,
            prompt_tokens=prompt,
            completion_tokens=completion,
            **forecaster.parts_s(forecast, agent.name),
        )


def _posts(forecaster: Forecaster, forecast: Forecast) -> Iterator[HostsPrediction]:
    busy = forecast.busy_fractions()
    for post in posts_of(forecaster.job):
        # Measured agents may have had hosts of their own; one that has both needs the larger.
        peaks = [forecaster.measurements.agents[name].peak_memory_bytes for name in post.agents]
        yield HostsPrediction(
            post=post.name,
            agents=post.agents,
            hosts=forecast.hosts[post.name],
            needs=post.needs,
            busy_fraction=busy[post.name],
            memory_bytes=max((peak for peak in peaks if peak is not None), default=None),
        )


def _recommend(
    forecasts: Sequence[Forecast], bounds: tuple[int, int], deadline_s: float
) -> Recommendation:
    for forecast in forecasts:
        if forecast.duration_s * (1 + WORST_ERROR) <= deadline_s:
            why = f"the fewest hosts that are in time even if it takes {WORST_ERROR:.0%} longer"
            return Recommendation(_allocation(forecast), True, why)
    fastest = min(forecasts, key=lambda forecast: forecast.duration_s)
    if fastest.duration_s <= deadline_s:
        why = f"in time, but not if it takes {WORST_ERROR:.0%} longer"
    else:
        why = f"no number of hosts from {bounds[0]} to {bounds[1]} is in time"
    why = f"{why}: {find_bottleneck(fastest).what}"
    return Recommendation(_allocation(fastest), False, why)


def _notes(forecaster: Forecaster) -> Iterator[str]:
    job = forecaster.job
    if forecaster.embedded:
        yield (
            "hosts share this machine's cores: more of them are faster only where an agent "
            "waits for something else"
        )
    else:
        yield "every host is taken to have hardware of its own, like the measured one"
    largest = forecaster.survey.usable_records.max()
    if forecaster.measurements.largest_records < 0.5 * largest:
        yield (
            f"measured partitions had at most {forecaster.measurements.largest_records} records, "
            f"the job's have {largest:.0f}: a larger --sample measures them"
        )
    if any(agent.max_count for agent in job.agents):
        yield "agents with max_count are taken to have so many hosts from the start"
    if forecaster.undecided is None:
        yield "how many records stay undecided is not known: all are taken to"
    if job.routing.policy == "reliability":
        yield "agents are taken to agree with the merged answers equally often"


def _others_note(others: OtherPrograms) -> tuple[str, ...]:
    if others.num_cores < _QUIET * CPU_COUNT:
        return ()
    return (
        f"other programs kept {others.num_cores:.1f} of this machine's {CPU_COUNT} cores busy "
        "while it was measured, and will",
    )
