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
    answers: int
    failed_answers: int
    prompt_tokens: int
    completion_tokens: int
    compute_s: float
    transfer_s: float
    processing_s: float
    """T_compute, T_transfer and T_processing, of all its tasks in sum; without what they wait for
    others at their hosts."""


@dataclass(frozen=True, slots=True)
class HostsPrediction:
    """The hosts of one engine, and what they are expected to do."""

    post: str
    agents: tuple[str, ...]
    """Those that share them."""
    hosts: int
    needs: Mapping[str, float]
    """Dask resources that each of their workers must declare."""
    busy_fraction: float
    """Of their time while answers are asked for."""
    memory_bytes: int | None
    """Of one, at its peak; None: not measured."""


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
    posts: tuple[HostsPrediction, ...]
    bottleneck: Bottleneck
    allocations: tuple[Allocation, ...]
    """Other numbers of hosts, fewest first."""
    recommendation: Recommendation | None
    """None: no deadline was given."""
    notes: tuple[str, ...]
    """What the prediction takes for granted, as far as it matters here."""
