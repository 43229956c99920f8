"""What a plan says: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mas_batch.planning.bottleneck import Bottleneck


@dataclass(frozen=True, slots=True)
class Range:
    """Seconds: where eight of ten simulated runs end, and the middle one."""

    p10_s: float
    median_s: float
    p90_s: float


@dataclass(frozen=True, slots=True)
class AgentForecast:
    """What one agent is expected to do in a run."""

    agent_id: str
    replicas: int
    busy_fraction: float
    """Of its replicas' time while answers are asked for."""
    answers: int
    failed_answers: int
    prompt_tokens: int
    completion_tokens: int
    compute_s: float
    transfer_s: float
    processing_s: float
    """T_compute, T_transfer and T_processing, of all its tasks in sum."""
    memory_bytes: int | None
    """Of a replica, at its peak; None: not measured."""


@dataclass(frozen=True, slots=True)
class Option:
    """A setting and how long a run would take with it."""

    replicas: Mapping[str, int]
    max_records: int
    max_tokens: int
    num_partitions: int
    policy: str
    duration: Range

    @property
    def total(self) -> int:
        """Replicas of all agents."""
        return sum(self.replicas.values())


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to set, and why."""

    option: Option
    meets_deadline: bool | None
    """None: there is no deadline."""
    why: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A job's run as predicted."""

    job: str
    source: str
    """What was measured."""
    measuring_s: float
    """What measuring took; 0: it was done before."""
    num_records: int
    num_usable: int
    own: Option
    """The job as it is."""
    phases: Mapping[str, float]
    """Phase → seconds; of the middle one of the simulated runs, as all that is not a range."""
    agents: tuple[AgentForecast, ...]
    bottleneck: Bottleneck
    allocations: tuple[Option, ...]
    """The job with other numbers of replicas, fewest first."""
    sizes: tuple[Option, ...]
    """With other sizes of partitions."""
    policies: tuple[Option, ...]
    recommendation: Recommendation
    notes: tuple[str, ...]
    """What the prediction takes for granted, as far as it matters here."""
