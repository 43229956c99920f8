"""What a plan says: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mas_batch.planning.bottleneck import Bottleneck


@dataclass(frozen=True, slots=True)
class AgentPrediction:
    """What one agent is expected to do in a run."""

    agent_id: str
    post: str
    """Whose hosts answer for it; several agents may share them."""
    hosts: int
    busy_fraction: float
    """Of its hosts' time while answers are asked for, by all agents that share them."""
    answers: int
    failed_answers: int
    prompt_tokens: int
    completion_tokens: int
    compute_s: float
    transfer_s: float
    processing_s: float
    """T_compute, T_transfer and T_processing, of all its tasks in sum."""
    memory_bytes: int | None
    """Of a host, at its peak; None: not measured."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Numbers of hosts, and how long a run takes with them."""

    hosts: Mapping[str, int]
    """By post."""
    duration_s: float

    @property
    def total(self) -> int:
        """Hosts of all posts."""
        return sum(self.hosts.values())


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Numbers of hosts for a deadline, and why these."""

    allocation: Allocation
    meets_deadline: bool
    """Even if the run takes longer by the worst error that was measured."""
    why: str


@dataclass(frozen=True, slots=True)
class RunPrediction:
    """A job's run as predicted."""

    job: str
    source: str
    """What was measured."""
    measuring_s: float
    """What measuring took; 0: it was done before."""
    num_records: int
    num_usable: int
    num_partitions: int
    policy: str
    own: Allocation
    """The job's own numbers of hosts."""
    median_error: float
    """Of predictions in the project's benchmark, of the measured time; docs/planner.md."""
    worst_error: float
    phases: Mapping[str, float]
    """Phase → seconds."""
    agents: tuple[AgentPrediction, ...]
    bottleneck: Bottleneck
    allocations: tuple[Allocation, ...]
    """Other numbers of hosts, fewest first."""
    recommendation: Recommendation | None
    """None: no deadline was given."""
    notes: tuple[str, ...]
    """What the prediction takes for granted, as far as it matters here."""
