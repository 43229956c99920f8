"""How many records go on to a further agent: undecided after a look, or escalated in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.agents.encoding import encoder_for
from mas_batch.aggregate.stopping import undecided
from mas_batch.job import Job
from mas_batch.merging import merge_spec, stopping_rule
from mas_batch.planning.survey import evenly_spaced
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.read import Run

_MAX_JUDGED = 1000
"""Records whose answers are judged, of however many there are."""


def undecided_shares(runs: Sequence[Run], job: Job) -> dict[int, float] | None:
    """Return answers per record → share of all records that are undecided with so many.

    A run that was adaptive in the same way shows it by what it asked. A run in which every agent
    answered every record shows it by its answers: they are judged as if each agent in turn had
    been asked first.

    Returns:
        None: no run shows it.
    """
    adaptive = job.routing.adaptive
    if adaptive is None:
        return {}
    for run in runs:
        former = read_job(run)
        if former.routing.adaptive == adaptive and former.merge == job.merge:
            return _asked_further(run, job)
        names = [agent.name for agent in job.first_agents]
        answers = run.arrow("answers")
        if former.routing.adaptive is None and _have_all(answers, names):
            return _judged(answers, job)
    return None


def escalated_share(runs: Sequence[Run], job: Job) -> float:
    """Return which share of all records the last agent is asked about."""
    escalate = job.routing.escalate
    if escalate is None:
        return 0.0
    if escalate.fraction is not None:
        return escalate.fraction
    if escalate.below is None:
        return 1.0  # a sample's answers decide; before, there is no telling
    num_below = num_records = 0
    for run in runs:
        counts, confidence = run.manifest["counts"], run.arrow()["confidence"]
        num_records += counts["results"] + counts["failures"]
        below = pc.sum(pc.less(confidence, escalate.below)).as_py() or 0
        num_below += below + confidence.null_count + counts["failures"]
    return num_below / max(1, num_records)


def _have_all(answers: pa.Table, names: Sequence[str]) -> bool:
    """Whether all of these agents were asked about the same records, as far as numbers tell."""
    counted = answers.group_by(["agent_id"]).aggregate([("record_id", "count_distinct")])
    found = dict(zip(*(counted[name].to_pylist() for name in counted.schema.names), strict=True))
    return len({found.get(name, 0) for name in names}) == 1 and found.get(names[0], 0) > 0


def _asked_further(run: Run, job: Job) -> dict[int, float]:
    """Count what an adaptive run asked about, in the order in which its partitions went on."""
    ledger = run.ledger()
    rows = ledger.filter(pc.equal(ledger["stage"], "answer")).sort_by("at_s")
    names = ["partition", "agent_id", "num_records"]
    open_records: defaultdict[int, int] = defaultdict(int)
    samples = {agent.name: agent.samples for agent in job.agents}
    answers: defaultdict[int, int] = defaultdict(int)  # by partition
    total = 0
    for partition, agent_id, num_records in zip(
        *(rows[name].to_pylist() for name in names), strict=True
    ):
        if answers[partition] == 0:
            total += num_records
        elif answers[partition] >= (job.routing.adaptive.first if job.routing.adaptive else 0):
            open_records[answers[partition]] += num_records
        answers[partition] += samples.get(agent_id, 1)
    return {number: count / max(1, total) for number, count in open_records.items()}


def _judged(answers: pa.Table, job: Job) -> dict[int, float]:
    """Judge all agents' answers as the run would, with each agent in turn as the first."""
    spec, rule = merge_spec(job).first_pass, stopping_rule(job)
    assert rule is not None
    ids = pc.unique(answers["record_id"])
    ids = ids.take(pa.array(evenly_spaced(len(ids), _MAX_JUDGED)))
    answers = answers.filter(pc.is_in(answers["record_id"], ids))
    encode = encoder_for(spec, answers)
    found: defaultdict[int, list[float]] = defaultdict(list)
    for looks in _rotations(job):
        still_open = ids
        for number, names in looks.items():
            records = pa.table({"record_id": still_open, "reason": pa.nulls(len(still_open))})
            given = pc.and_(
                pc.is_in(answers["agent_id"], pa.array(names)),
                pc.is_in(answers["record_id"], still_open),
            )
            still_open = pa.array(
                undecided(records, answers.filter(given), spec, rule, encode), pa.string()
            )
            found[number].append(len(still_open) / len(ids))
    return {number: float(np.mean(shares)) for number, shares in found.items()}


def _rotations(job: Job) -> Iterator[Mapping[int, list[str]]]:
    """Yield, for each agent as the first, answers per record → the agents that gave them."""
    agents = job.first_agents
    first = job.routing.adaptive.first if job.routing.adaptive else 0
    for turn in range(len(agents)):
        looks, names, number = {}, [], 0
        for agent in (*agents[turn:], *agents[:turn]):
            names.append(agent.name)
            number += agent.samples
            if first <= number < job.answers_per_record:
                looks[number] = list(names)
        yield looks
