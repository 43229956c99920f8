"""What a merge needs to know of the whole corpus, found when all records are answered.

Every step commits its finding to the run, or takes the one that is committed already, so that an
execution which follows a killed one goes on with the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from distributed import Client

from mas_batch.agents.second_pass import (
    LABELLED,
    confidence_counts,
    corpus_counts,
    labelled_records,
    merge_and_count,
    sample_labels,
    sample_lots,
)
from mas_batch.agents.statistics import COMMITTED, partition_statistics
from mas_batch.aggregate.calibration import Calibrated, learn_from_labels
from mas_batch.aggregate.escalation import (
    CONFIDENCES,
    LABELS,
    SAMPLE,
    Escalation,
    Sample,
    below,
    choose,
    sample_only,
    up_to,
)
from mas_batch.aggregate.guarantee import Place, last_escalated
from mas_batch.aggregate.reductions import Reduction
from mas_batch.aggregate.reliability import History
from mas_batch.aggregate.tree import tree_reduce
from mas_batch.events import Emit, Escalated, EscalationSampled, Learned
from mas_batch.job import Escalate
from mas_batch.merging import check_enough_labels, read_labels
from mas_batch.run_folder.manifest import read_engines
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store

PARTITIONS_PER_LEAF = 16
"""Partitions that one leaf of a tree reads, at least."""

MAX_LEAVES = 1024
"""Leaves of a tree, at most: the scheduler keeps some kB of each until it is done."""


@dataclass(frozen=True, slots=True)
class AllAnswers:
    """All answers of a run, which trees of tasks on the workers read."""

    client: Client
    run: RunRef
    plan: Plan
    agents: tuple[str, ...]
    """Agents whose answers are merged; not every agent need have answered every partition."""
    emit: Emit
    wait_s: float
    """How long the cluster may be without any worker."""

    def reduce(self, leaf: Callable[..., Any], reduction: Reduction) -> Any:
        """Run `leaf(run, partitions, agents)` over the corpus and combine its partials."""
        indices = range(self.plan.num_partitions)
        per_leaf = max(PARTITIONS_PER_LEAF, -(-self.plan.num_partitions // MAX_LEAVES))
        groups = (
            (self.run, indices[first : first + per_leaf], self.agents)
            for first in indices[::per_leaf]
        )
        code, wait_s = self.run.code, self.wait_s
        partial = tree_reduce(self.client, leaf, groups, reduction, wait_s=wait_s, code=code)
        return reduction.combine([]) if partial is None else partial

    def statistics(self, *, merge: bool) -> Any:
        """Count what is committed; with `merge`, first merge the partitions that are not merged."""
        return self.reduce(merge_and_count if merge else partition_statistics, COMMITTED)


def learned(answers: AllAnswers, name: str, prior: History | None = None) -> AllAnswers:
    """Learn what the merge needs from all answers; return them with the merge so completed.

    What is learned is committed to the run as `name`, and what labelled records teach as `name`
    with `calibration` for `learned`. Where the merge needs nothing of the corpus, the answers are
    returned as they are.

    Args:
        prior: for methods that keep a history: what earlier runs have learned.
    """
    run, spec = answers.run, answers.run.merge
    learning = spec.learning
    if learning is None:
        return _calibrated(answers, name)

    def find() -> str:
        counts = answers.reduce(corpus_counts, learning.reduction)
        families = dict(_families(run.store, answers.agents))
        return learning.find(counts, spec, answers.agents, families, prior)

    lesson = learning.read(spec, _read_or_commit(run.merged, name, find))
    warnings = () if spec.calibrate else lesson.spec.warnings  # labels may mend what is wrong
    answers.emit(Learned(spec.method, dict(lesson.accuracies), lesson.why, warnings))
    return _calibrated(replace(answers, run=replace(run, merge=lesson.spec)), name)


def _calibrated(answers: AllAnswers, name: str) -> AllAnswers:
    """Learn from labelled records what to publish and how sure it is, if the job has any.

    Raises:
        JobError: too few of them were answered.
    """
    run, spec = answers.run, answers.run.merge
    if spec.calibrate is None:
        return answers

    def find() -> str:
        labels = read_labels(spec)
        found = answers.reduce(partial(labelled_records, labels), LABELLED)["records"]
        check_enough_labels(spec, labels, len(found), "answered records")
        labelled = [record for _, record in found]
        return learn_from_labels(labelled, spec.method, spec.log_odds).to_json()

    found = Calibrated.from_json(
        _read_or_commit(run.merged, name.replace("learned", "calibration"), find)
    )
    taught = replace(spec, calibrated=found)
    answers.emit(Learned(spec.method, {}, found.why, taught.warnings))
    return replace(answers, run=replace(run, merge=taught))


def sample_to_escalate(answers: AllAnswers, escalate: Escalate, seed: str) -> Escalation:
    """Draw the sample that shows where the threshold is; committed as escalation-sample.json."""
    wanted = Sample(seed, escalate.sample_size)
    drawing = replace(answers.run, escalation=sample_only(escalate.agent, wanted))

    def find() -> str:
        lots = replace(answers, run=drawing).reduce(sample_lots, SAMPLE)["lots"]
        counts = answers.reduce(confidence_counts, CONFIDENCES)
        facts = {"last_lot": lots[-1] if lots else 0.0, "size": len(lots), "of": counts["records"]}
        return json.dumps(facts, indent=1)

    facts = json.loads(_read_or_commit(answers.run.store, "escalation-sample.json", find))
    answers.emit(EscalationSampled(escalate.agent, facts["size"], facts["of"]))
    return sample_only(escalate.agent, replace(wanted, last_lot=facts["last_lot"]))


def guaranteed_escalation(
    answers: AllAnswers, escalate: Escalate, sampled: Escalation
) -> Escalation:
    """Find by the sample's answers which records are escalated; committed as escalation.json."""
    assert escalate.target is not None
    target, delta = escalate.target, escalate.miss_rate
    labelled = replace(answers, run=replace(answers.run, escalation=sampled))

    def find() -> str:
        found = labelled.reduce(sample_labels, LABELS)
        counts = answers.reduce(confidence_counts, CONFIDENCES)
        num_answered = sum(n for number, n in counts["bins"].items() if int(number) >= 0)
        disagreeing = [Place(*place) for place in found["disagreeing"]]
        place = last_escalated(
            disagreeing, num_answered, found["labels"], target=target, delta=delta
        )
        chosen = up_to(escalate.agent, place, sampled.sample)
        facts = {
            "agent_id": escalate.agent,
            "picked": chosen.expected(counts),
            "of": counts["records"],
            "target": target,
            "delta": delta,
            "labels": found["labels"],
            "disagreeing": len(disagreeing),
            "place": place and asdict(place),
        }
        return json.dumps(facts, indent=1)

    facts = json.loads(_read_or_commit(answers.run.store, "escalation.json", find))
    agreed = 1 - facts["disagreeing"] / max(1, facts["labels"])
    why = (
        f"in a sample of {facts['labels']:,} the merged answer is its own for {agreed:.1%}; with "
        f"probability {1 - delta:g}, merged answers then agree with it on {target:.1%} or more"
    )
    answers.emit(Escalated(escalate.agent, facts["picked"], facts["of"], why))
    place = facts["place"] and Place(**facts["place"])
    return up_to(escalate.agent, place, sampled.sample)


def escalation(answers: AllAnswers, escalate: Escalate) -> Escalation:
    """Decide which records are escalated; the decision is committed as escalation.json."""

    def find() -> str:
        counts = answers.reduce(confidence_counts, CONFIDENCES)
        if escalate.fraction is not None:
            chosen = choose(counts, escalate.agent, escalate.fraction)
        else:
            chosen = below(escalate.agent, escalate.below or 0.0)
        limits = {"below": chosen.below, "share": chosen.share}
        picked = {"picked": chosen.expected(counts), "of": counts["records"]}
        return json.dumps({"agent_id": escalate.agent, **limits, **picked}, indent=1)

    facts = json.loads(_read_or_commit(answers.run.store, "escalation.json", find))
    answers.emit(Escalated(escalate.agent, facts["picked"], facts["of"]))
    return Escalation(escalate.agent, facts["below"], facts["share"])


def _families(store: Store, agents: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (agent, its model's family); an agent that was never loaded is a family of its own."""
    engines = read_engines(store)
    for agent in agents:
        yield agent, engines.get(agent, {}).get("family_id", agent)


def _read_or_commit(store: Store, name: str, find: Callable[[], str]) -> str:
    """Return the JSON that is committed; if there is none, call `find` and commit its result.

    Raises:
        RunError: what is committed is cut or damaged.
    """
    if not store.exists(name):
        store.commit(name, find().encode())
    return store.read_json(name)
