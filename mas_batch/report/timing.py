"""Where a run's time went: what its manifest and its ledger say, as far as it has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.agents.posts import posts_of
from mas_batch.errors import RunError
from mas_batch.report.facts import Activity, Spread, TimeFacts
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.read import Run

NUM_STRETCHES = 80
"""Points of an activity."""
MAX_ACTIVITIES = 16
"""Posts whose hosts' activity is drawn: the busiest."""

MAX_PARTITION_ROWS = 60

HOST_PARTS = ("compute", "load", "idle")
"""All that is a host's: the seconds of tasks run beside these, several at once."""
_WORK = ("answer", "failed answer")


def time_facts(run: Run) -> TimeFacts | None:
    """Return where the time went; None for a run of a version that kept no ledger."""
    facts = run.manifest.get("latency")
    if not facts:
        return None
    hosts = facts.get("hosts") or facts.get("replicas") or {}  # so earlier versions called them
    length_s, activity = _activity(run.ledger(), _sharers(run))
    return TimeFacts(
        wall_s=facts.get("wall_s"),
        phases={name: seconds for name, seconds in facts.get("phases", {}).items() if seconds},
        hosts={part: s for part in HOST_PARTS if (s := hosts.get(f"{part}_s"))},
        num_hosts=hosts.get("num"),
        partitions=tuple((facts.get("per_partition") or [])[:MAX_PARTITION_ROWS]),
        activity_s=length_s,
        activity=activity,
    )


def spreads(run: Run) -> dict[str, Spread]:
    """Return each agent's seconds per answer, as far as the manifest has them."""
    facts = run.manifest.get("latency") or {}
    found: dict[str, dict[str, Any]] = {}
    for row in facts.get("per_record") or []:
        found.setdefault(row["agent_id"], {})[row["part"]] = row
    return {agent: _spread(parts) for agent, parts in found.items()}


def _spread(parts: Mapping[str, Mapping[str, float]]) -> Spread:
    means = {f"{part}_s": parts[part]["mean_s"] for part in ("compute", "transfer", "processing")}
    return Spread(**means, **{q: parts["total"][q] for q in ("p50_s", "p95_s", "p99_s", "max_s")})


def _sharers(run: Run) -> dict[str, tuple[str, ...]]:
    """Return agent → all agents that share its hosts; empty where the job is another version's."""
    try:
        posts = posts_of(read_job(run))
    except RunError:
        return {}
    return {name: post.agents for post in posts for name in post.agents}


def _activity(
    ledger: pa.Table, sharers: Mapping[str, tuple[str, ...]]
) -> tuple[float, tuple[Activity, ...]]:
    """Follow the hosts while the longest execution answers; returns for how long, too."""
    work = ledger.filter(pc.is_in(ledger["stage"], pa.array(_WORK)))
    if not work.num_rows:
        return 0.0, ()
    starts = pc.add(work["at_s"], pc.fill_null(work["queue_s"], 0.0)).to_numpy()
    stops = pc.add(work["at_s"], work["wall_s"]).to_numpy()
    names = ("execution", "agent_id", "worker")
    execution, agent, worker = (work[name].to_numpy() for name in names)
    within = execution == execution[np.argmax(stops)]
    first, last = starts[within].min(), stops[within].max()
    found = []
    for agents in sorted({sharers.get(name, (name,)) for name in set(agent[within])}):
        of_post = within & np.isin(agent, agents)
        own = [of_post & (worker == host) for host in sorted(set(worker[of_post]))]
        spans = [stretches(starts[rows] - first, stops[rows] - first) for rows in own]
        begins, ends = (np.concatenate(side) for side in zip(*spans, strict=True))
        busy = mean_overlap(begins, ends, last - first, NUM_STRETCHES)
        found.append(Activity(agents, len(own), tuple(busy.round(3).tolist())))
    found.sort(key=lambda each: (-sum(each.busy), each.agents))
    return float(last - first), tuple(found[:MAX_ACTIVITIES])


def stretches(
    starts: npt.NDArray[np.float64], stops: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (starts, stops) of when at least one of the intervals is open.

    Args:
        stops: none before its start.
    """
    order = np.argsort(starts, kind="stable")
    starts, reached = starts[order], np.maximum.accumulate(stops[order])
    is_new = np.append(True, starts[1:] > reached[:-1])
    return starts[is_new], reached[np.append(is_new[1:], True)]


def mean_overlap(
    starts: npt.NDArray[np.float64], stops: npt.NDArray[np.float64], length: float, num: int
) -> npt.NDArray[np.float64]:
    """Return how many of the intervals are open on average in each of `num` equal stretches.

    Exact: the integral of the number of open intervals, differenced at the stretches' edges.

    Args:
        starts: in [0, length], as are `stops`, none before its start.
        length: above 0.
    """
    edges = np.linspace(0.0, length, num + 1)
    area = _passed(starts, edges) - _passed(stops, edges)
    return np.maximum(np.diff(area) / (length / num), 0.0).astype(np.float64)


def _passed(
    times: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Integrate, from 0 to every edge, the number of times that have passed."""
    ordered = np.sort(times)
    passed = np.searchsorted(ordered, edges, side="right")
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    return np.asarray(passed * edges - sums[passed], np.float64)
