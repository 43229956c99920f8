"""What a report says, as plain values: bounded, however large the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mas_batch.aggregate.reliability import Reliability
from mas_batch.quality import KeptEvaluation
from mas_batch.report.findings import Finding
from mas_batch.report.label_counts import Confusion, LabelCounts
from mas_batch.report.record_facts import (
    FailedAnswers,
    FailureGroup,
    RecordFacts,
    Scope,
)


@dataclass(frozen=True, slots=True)
class ExitFacts:
    """How the run ended, in the command line's terms."""

    exit_code: int
    meaning: str
    failed_fraction: float
    max_failed_fraction: float
    """`output.max_failed_fraction` of the job."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The run in figures; None: not measured by the version that wrote the run."""

    records: int
    results: int
    failures: int
    ties: int
    abstained: int
    """Results below `merge.abstain_below`."""
    cut: int
    """Published answers that `max_new_tokens` cut off."""
    answers: int
    """Valid answers of all agents."""
    failed_answers: int
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompts' tokens, those that had been read for others."""
    completion_tokens: int
    reused: int
    """Answers that an earlier run had given (`since: last`)."""
    wall_s: float | None
    """All executions, from reading the corpus to publishing."""
    records_per_s: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """An agent's seconds per answer (parts of T: means; T: quantiles)."""

    compute_s: float
    transfer_s: float
    processing_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float

    @property
    def mean_s(self) -> float:
        """T on average."""
        return self.compute_s + self.transfer_s + self.processing_s


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """One agent of the run."""

    agent_id: str
    family: str
    """Its model, or what stands for one."""
    answers: int
    failed_answers: int
    wins: int
    """Records whose published answer is the agent's, word for word."""
    agreement: float | None
    """Share of its answers that say what was published."""
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float | None
    """Completion tokens per second of model time."""
    latency: Spread | None


@dataclass(frozen=True, slots=True)
class Activity:
    """How busy the hosts of one engine were while one execution answered."""

    agents: tuple[str, ...]
    """Those that share them."""
    num_hosts: int
    busy: tuple[float, ...]
    """Mean number of hosts that worked on anything, in each of equal stretches of time."""


@dataclass(frozen=True, slots=True)
class TimeFacts:
    """Where the time went: phases of the submitting process, and the hosts' sum."""

    wall_s: float | None
    phases: Mapping[str, float]
    """Seconds by phase, in order."""
    hosts: Mapping[str, float]
    """Seconds summed over hosts: compute, load, idle."""
    num_hosts: int | None
    partitions: tuple[Mapping[str, Any], ...]
    """Rows of `latency.summary`'s `per_partition`: quantiles of `wall` and of waiting, `queue`."""
    activity_s: float
    """From the first task begun to the last ended, of the execution that `activity` shows."""
    activity: tuple[Activity, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often two agents' answers to a record were merged as the same answer."""

    agents: tuple[str, ...]
    shares: Mapping[tuple[str, str], float | None]
    """By ordered pair; an agent with itself: among its samples. None: never asked together."""
    num_left_out: int
    """Agents beyond those of the matrix."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report says of a run."""

    run: str
    location: str
    finished: str | None
    task: str
    method: str
    policy: str
    outcome: ExitFacts
    findings: tuple[Finding, ...]
    """What is to be read first."""
    totals: Totals
    quality: KeptEvaluation | None
    time: TimeFacts | None
    agents: tuple[AgentFacts, ...]
    num_agents_left_out: int
    labels: LabelCounts | None
    confusion: Confusion | None
    agreement: Agreement | None
    reliability: Reliability | None
    confidence: tuple[int, ...]
    """Results by confidence, in equal bins over [0, 1]; empty: not on that scale."""
    confidence_kind: str | None
    doubtful: tuple[RecordFacts, ...]
    failures: tuple[FailureGroup, ...]
    failed_answers: tuple[FailedAnswers, ...]
    scope: Scope
    job: str
    """job.yaml as the run keeps it."""
    models: tuple[Mapping[str, str | None], ...]
    """See `collect.model`."""
    versions: Mapping[str, str]
