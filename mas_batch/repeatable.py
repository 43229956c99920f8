"""Whether a job's run can be repeated: the same job on the same corpus, the same to the byte.

Repeatable is what follows from the job and the corpus alone, as long as an engine gives the same
answer to the same record: whose answers a record's result is merged from, and how. What the job
promises is found in its settings; whether the run has kept it, in whose answers were merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import numpy as np

from mas_batch.engine_info import NOT_PROMISED
from mas_batch.job import Job
from mas_batch.registries import POLICIES
from mas_batch.routing.policies import Ordered, order_of
from mas_batch.run_folder.ranges import Ranges, from_ranges


def repeatable_facts(
    job: Job,
    answers: Mapping[str, Ranges],
    num_partitions: int,
    *,
    reuses: bool,
    engines: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Say whether the run can be repeated, and if not, why; for the manifest.

    Args:
        answers: agent → ranges of the partitions whose merge has its answers.
        reuses: whether answers of an earlier run are among them.
        engines: agent → what its engine said of itself; `equal_output` may be "not promised".
    """
    reasons = [*_reasons_of(job, reuses=reuses), *_reasons_of_engines(engines)]
    if not reasons and (count := _num_merged_otherwise(job, answers, num_partitions)):
        reasons = [f"{count} partitions are merged without an agent whose turn it was: it failed"]
    return {"repeatable": not reasons, **({"not_repeatable_because": reasons} if reasons else {})}


def _reasons_of(job: Job, *, reuses: bool) -> Iterator[str]:
    if not _asks_everyone(job):
        if reuses:
            yield "since: answers that were known count, whoever's turn it would have been"
        elif _order(job, 0) is None:
            ordered = ", ".join(n for n in POLICIES if isinstance(POLICIES[n](), Ordered))
            yield (
                f"routing.policy {job.routing.policy}: not every agent is asked about every "
                f"record, and who is asked goes by who is free; it follows from the job with: "
                f"{ordered} (weighted-round-robin with a weight for every agent)"
            )
    if job.merge.history is not None:
        yield "merge.history: what other runs have learned by then is a prior"
    if job.cluster.mixed_versions == "allow":
        yield "cluster.mixed_versions: workers may answer by other code"
    for agent in job.agents:
        info = agent.engine_info
        if info is not None and info.holds == "endpoint":
            yield f"agents.{agent.name}: an endpoint may give another answer the next time"


def _reasons_of_engines(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, facts in engines.items():
        if facts.get("equal_output") == NOT_PROMISED:
            yield (
                f"agents.{name}: the engine {facts.get('engine')} rounds by what else is in a "
                f"batch, with {facts.get('dtype')} on {facts.get('device')}"
            )


def _asks_everyone(job: Job) -> bool:
    possible = sum(agent.samples for agent in job.first_agents)
    return job.routing.adaptive is None and job.answers_per_record >= possible


def _order(job: Job, index: int) -> tuple[str, ...] | None:
    agents = [agent.name for agent in job.first_agents]
    return order_of(POLICIES[job.routing.policy](), index, agents, job.routing.weights)


def _num_merged_otherwise(job: Job, answers: Mapping[str, Ranges], num_partitions: int) -> int:
    """Count the partitions that are merged from other agents' answers than whose turn it was.

    With `adaptive` the last agent that failed cannot be told from one that was not needed.
    """
    samples = {agent.name: agent.samples for agent in job.first_agents}
    has = np.zeros((len(samples), num_partitions), np.bool_)
    for row, agent_id in enumerate(samples):
        has[row, list(from_ranges(answers.get(agent_id, ())))] = True
    if _asks_everyone(job):
        return int((~has.all(axis=0)).sum())
    most = job.answers_per_record
    least = min(most, job.routing.adaptive.first) if job.routing.adaptive else most
    count = 0
    for index in range(num_partitions):
        merged = {agent_id for row, agent_id in enumerate(samples) if has[row, index]}
        turns = tuple(takewhile(merged.__contains__, _order(job, index) or ()))
        enough = sum(samples[a] for a in turns) >= least
        superfluous = bool(turns) and sum(samples[a] for a in turns[:-1]) >= most
        count += len(turns) < len(merged) or not enough or superfluous
    return count
