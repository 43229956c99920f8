"""Speed-up: runs of one job with other numbers of replicas, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import ValidationError

from mas_batch.errors import RunError
from mas_batch.job import Job
from mas_batch.monitor.event_log import read_events
from mas_batch.results import Run, read_job_mapping


@dataclass(frozen=True, slots=True)
class Scale:
    """How fast a run was with its number of replicas."""

    location: str
    replicas: Mapping[str, int]
    """Agent → `count` of the job."""
    num_replicas: int
    num_executions: int
    """More than 1: the run was resumed; their times are added."""
    wall_s: float
    """From the first partition asked to the last one merged."""
    records_per_s: float
    speed_up: float = 1.0
    """Times as fast as the run with the fewest replicas."""
    efficiency: float = 1.0
    """Speed-up ÷ times as many replicas; 1 is linear."""


def read_job(run: Run) -> Job:
    """Return the job of a run.

    Raises:
        RunError: job.yaml is not a job of this version of mas_batch.
    """
    try:
        return Job.model_validate(read_job_mapping(run.store))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        location = run.store.location("job.yaml")
        raise RunError(f"{location}: {key}: {first['msg']}; another version wrote it") from error


def scaling(runs: Sequence[Run]) -> tuple[Scale, ...]:
    """Compare runs of one job, fewest replicas first.

    Raises:
        RunError: they are runs of different jobs or corpora, or one has no events.
    """
    names = {run.manifest["run"]: run.store.location("") for run in runs}
    if len(names) > 1:
        listed = ", ".join(f"{name} ({location})" for name, location in sorted(names.items()))
        raise RunError(
            f"only runs of one job on one corpus can be compared; these differ: {listed}"
        )
    measured = sorted((_measured(run) for run in runs), key=lambda m: (m.num_replicas, m.wall_s))
    return tuple(
        replace(
            each,
            speed_up=(speed_up := measured[0].wall_s / each.wall_s),
            efficiency=speed_up * measured[0].num_replicas / each.num_replicas,
        )
        for each in measured
    )


def _measured(run: Run) -> Scale:
    replicas = {agent.name: agent.count for agent in read_job(run).agents}
    counts = run.manifest["counts"]
    spans_s = _spans_s(run)
    wall_s = sum(spans_s)
    if wall_s <= 0:
        location = run.store.location("events")
        raise RunError(f"{location}: no event of a partition asked and merged; no time to compare")
    return Scale(
        location=run.store.location(""),
        replicas=replicas,
        num_replicas=sum(replicas.values()),
        num_executions=len(spans_s),
        wall_s=wall_s,
        records_per_s=(counts["results"] + counts["failures"]) / wall_s,
    )


def _spans_s(run: Run) -> list[float]:
    """Return each execution's seconds between its first partition asked and its last merged."""
    asked: dict[str, datetime] = {}
    merged: dict[str, datetime] = {}
    for event in read_events(run.store):
        if event.name == "PartitionAsked":
            asked.setdefault(event.execution, event.time)
        elif event.name == "PartitionMerged":
            merged[event.execution] = event.time
    return [
        (merged[execution] - start).total_seconds()
        for execution, start in asked.items()
        if execution in merged
    ]
