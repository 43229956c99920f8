"""Evaluate a run against its references: what was it worth, and would one agent have done?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from mas_batch.aggregate.method import MergeSpec
from mas_batch.errors import RunError
from mas_batch.evaluation.agreement import AgentPair, pairwise_agreement
from mas_batch.evaluation.confidence import ConfidenceQuality, judge_confidence
from mas_batch.evaluation.gather import EvidenceRequest, gather
from mas_batch.evaluation.metrics import Metrics, SumMetric, metrics_for
from mas_batch.evaluation.scoring import Worth, best_agent, qualities, worth_of
from mas_batch.evaluation.specs import other_specs, own_samples, run_spec
from mas_batch.evaluation.speedup import Scale, scaling
from mas_batch.evaluation.systems import Evidence, oracle
from mas_batch.job import Job
from mas_batch.quality import Kind, Quality
from mas_batch.report.collect import agents_of
from mas_batch.report.facts import AgentFacts
from mas_batch.report.label_counts import Confusion, confusion
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.read import Run


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run was worth. `write` keeps it, `print_evaluation` shows it."""

    run: str
    task: str
    answer_kind: str
    reference: str
    """The column of right answers."""
    goal: str
    """The metric that decides who is best."""
    higher_is_better: bool
    """Of the goal metric."""
    num_records: int
    """Records that are judged."""
    num_without_reference: int
    num_unusable: int
    """Records that no agent was asked about, because they had no usable text."""
    num_resamples: int
    seed: int
    best_agent: str
    verdict: Worth
    """The run's merge against the best single agent."""
    qualities: tuple[Quality, ...]
    skipped: Mapping[str, str]
    """Merge method → why it is not judged."""
    signatures: Mapping[str, str]
    """Metric → version and settings, to be quoted beside a figure."""
    notes: tuple[str, ...]
    confusion: Confusion | None
    """Of labels: what the run published, by the label that is right."""
    agreement: tuple[AgentPair, ...]
    confidences: tuple[ConfidenceQuality, ...]
    costs: tuple[AgentFacts, ...]
    """What the run's manifest says of each agent's answers, tokens and seconds."""
    scaling: tuple[Scale, ...]
    """Empty: there was no other run to compare with."""

    @property
    def merge(self) -> Quality:
        """Return the quality of what the run published."""
        return next(quality for quality in self.qualities if quality.kind is Kind.RUN)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`; what is not defined is None."""
        facts: dict[str, Any] = _plain(asdict(self))
        return facts


def evaluate(
    run: Run,
    reference: str = "reference",
    *,
    methods: Sequence[str] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    compare: Sequence[Run] = (),
    merges: Mapping[str, pa.Table] | None = None,
    spec: MergeSpec | None = None,
) -> Evaluation:
    """Judge the run's agents, its merge, other merges of the same answers, and its confidences.

    No model is asked. All answers are held in memory: 10^6 records of labels or numbers, or
    some 10^5 of texts, fit a few GB.

    Args:
        reference: column of the corpus that holds the right answers.
        methods: merge methods to try on the stored answers; None: all that fit the task.
        num_resamples: of the paired bootstrap; more make p finer.
        compare: runs of the same job with other numbers of hosts.
        merges: name → results table of a merge that was made already.
        spec: how the run was merged; None: what its manifest and job say.

    Raises:
        RunError: an argument or a column is wrong, or no record has a reference.
    """
    if num_resamples < 1:
        raise RunError(f"num_resamples is {num_resamples}; allowed: 1 or more")
    job = read_job(run)
    own = spec or run_spec(run, job)
    others, skipped = other_specs(run, own, job, methods)
    agents = tuple(agent.name for agent in job.agents)
    alone = own_samples(own, job)
    asked = _always_asked(job)
    request = EvidenceRequest(reference, own, others, merges or {}, alone, agents, asked)
    evidence = gather(run, request)
    metrics = metrics_for(job.task, own.answer_kind, evidence)
    baseline = best_agent(evidence.of(Kind.AGENT), metrics.goal)
    systems = [*evidence.systems, oracle(evidence, metrics.goal.losses)]
    judged = qualities(evidence, systems, baseline, metrics, num_resamples, seed)
    (merged,) = (quality for quality in judged if quality.kind is Kind.RUN)
    return Evaluation(
        run=run.store.location(""),
        task=job.task.kind,
        answer_kind=own.answer_kind,
        reference=reference,
        goal=metrics.goal.name,
        higher_is_better=metrics.goal.perfect > 0,
        num_records=evidence.num_records,
        num_without_reference=evidence.num_without_reference,
        num_unusable=evidence.num_unusable,
        num_resamples=num_resamples,
        seed=seed,
        best_agent=baseline.name,
        verdict=worth_of(merged, metrics.goal),
        qualities=judged,
        skipped={**skipped, **evidence.skipped},
        signatures=metrics.signatures,
        notes=(
            *metrics.notes,
            *_notes(own, metrics, judged),
            *_better_alone(judged, alone, metrics.goal),
        ),
        confusion=_confusion(evidence, job),
        agreement=pairwise_agreement(evidence, own.answer_kind, seed),
        confidences=_confidences(evidence, metrics, seed),
        costs=agents_of(run),
        scaling=scaling([run, *compare]) if compare else (),
    )


def _confusion(evidence: Evidence, job: Job) -> Confusion | None:
    (run,) = evidence.of(Kind.RUN)
    pairs = Counter(
        (evidence.references[record], evidence.answers[candidate] or "")
        for record, candidate in zip(run.records.tolist(), run.candidates.tolist(), strict=True)
    )
    return confusion(pairs, job.task.labels or ())


def _always_asked(job: Job) -> frozenset[str]:
    """Name the agents that were asked about every record."""
    first = job.first_agents
    all_asked = job.answers_per_record >= sum(agent.samples for agent in first)
    if job.routing.adaptive is not None or not all_asked:
        return frozenset()
    return frozenset(agent.name for agent in first)


def _confidences(evidence: Evidence, metrics: Metrics, seed: int) -> tuple[ConfidenceQuality, ...]:
    judged = (
        judge_confidence(system, evidence.confidences[system.key], metrics.goal, seed)
        for system in evidence.systems
        if system.key in evidence.confidences
    )
    return tuple(each for each in judged if each is not None)


def _notes(own: MergeSpec, metrics: Metrics, judged: Sequence[Quality]) -> list[str]:
    notes = []
    if own.rules.uses_utility and (own.utility or "").casefold() == metrics.goal.name.casefold():
        notes.append(
            f"{own.method} chooses by {metrics.goal.name}, so {metrics.goal.name} flatters it: "
            "look at the other metrics too"
        )
    partly = [q.name for q in judged if q.kind is Kind.AGENT and q.num_records < _most(judged)]
    if partly:
        names = ", ".join(partly)
        notes.append(
            f"{names}: not asked about every record; each is compared with the best agent on the "
            "records that both were asked about"
        )
    return notes


def _better_alone(judged: Sequence[Quality], names: Collection[str], goal: SumMetric) -> list[str]:
    """Say which agent's own samples, merged without the others' answers, are as good or better."""
    sign = 1 if goal.perfect else -1
    (mix,) = (quality.score(goal.name).value for quality in judged if quality.kind is Kind.RUN)
    return [
        f"{quality.name}, without the other agents, are at least as good as the mix"
        for quality in judged
        if quality.kind is Kind.MERGE and quality.name in names
        if sign * ((quality.score(goal.name).value or 0) - (mix or 0)) >= 0
    ]


def _most(judged: Sequence[Quality]) -> int:
    return max(quality.num_records for quality in judged)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
