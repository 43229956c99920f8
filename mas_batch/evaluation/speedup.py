"""Speed-up: runs of one job with other numbers of hosts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from mas_batch.agents.posts import posts_of
from mas_batch.errors import RunError
from mas_batch.monitor.event_log import read_events
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.read import Run


@dataclass(frozen=True, slots=True)
class Scale:
    """How fast a run was with its number of hosts."""

    location: str
    hosts: Mapping[str, int]
    """Agent → `count` of the job."""
    num_hosts: int
    num_executions: int
    """More than 1: the run was resumed; their times are added."""
    wall_s: float
    """From the first partition asked to the last one merged."""
    records_per_s: float
    speed_up: float = 1.0
    """Times as fast as the run with the fewest hosts."""
    efficiency: float = 1.0
    """Speed-up ÷ times as many hosts; 1 is linear."""


def scaling(runs: Sequence[Run]) -> tuple[Scale, ...]:
    """Compare runs of one job, fewest hosts first.

    Raises:
        RunError: they are runs of different jobs or corpora, or one has no events.
    """
    names = {run.manifest["run"]: run.store.location("") for run in runs}
    if len(names) > 1:
        listed = ", ".join(f"{name} ({location})" for name, location in sorted(names.items()))
        raise RunError(
            f"only runs of one job on one corpus can be compared; these differ: {listed}"
        )
    measured = sorted((_measured(run) for run in runs), key=lambda m: (m.num_hosts, m.wall_s))
    return tuple(
        replace(
            each,
            speed_up=(speed_up := measured[0].wall_s / each.wall_s),
            efficiency=speed_up * measured[0].num_hosts / each.num_hosts,
        )
        for each in measured
    )


def _measured(run: Run) -> Scale:
    hosts = {post.name: post.wanted for post in posts_of(read_job(run))}
    counts = run.manifest["counts"]
    spans_s = _spans_s(run)
    wall_s = sum(spans_s)
    if wall_s <= 0:
        location = run.store.location("events")
        raise RunError(f"{location}: no event of a partition asked and merged; no time to compare")
    return Scale(
        location=run.store.location(""),
        hosts=hosts,
        num_hosts=sum(hosts.values()),
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
