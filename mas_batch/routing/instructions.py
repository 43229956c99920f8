"""What goes into the dispatcher and what comes out of it: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mas_batch.routing.policies import HostView


@dataclass(frozen=True, slots=True)
class Work:
    """A partition that still needs something."""

    index: int
    estimated_tokens: int
    num_records: int = 1
    answered: frozenset[str] = frozenset()
    """Agents whose answers an earlier execution committed."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the dispatcher has to keep to."""

    answers_per_record: int
    """How many answers each record shall get at least, or with `first` at most; an agent that
    is asked always gives all its samples."""
    first: int | None = None
    """Adaptive: so many answers before the first look at which records are undecided."""
    window: int | None = 1
    """Partitions in flight per host; None: as many as it works on at once, and one more where it
    takes less than a second for one."""
    max_attempts: int = 3
    """Tries of one agent on one partition that may fail before it is given up there."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Agent → share of its turns, for policies that go by it."""
    accuracies: Mapping[str, float] = field(default_factory=dict)
    """Agent → how often it is right, as far as the job says, for policies that go by it."""
    ordered: bool = True
    """Whether agents are asked in the policy's order, if it has one; else who is free is asked."""
    speculate: bool = True
    timeout_s: float | None = None
    """Longest silence of a host at work; None: by its measured rate."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the agent about the partition, at the host."""

    partition: int
    agent_id: str
    host_id: str
    attempt: int
    purpose: str
    """`answer`, `retry`, `careful`, `copy` or `probe`; see `monitor.events.PartitionAsked`."""
    earlier: tuple[str, ...]
    """Adaptive: ask only about records that these agents' answers leave undecided; empty: all."""
    candidates: tuple[HostView, ...]
    """Everyone who could have been chosen."""
    num_busy: int
    """Capable hosts, once for each agent, that could not: their windows are full."""


@dataclass(frozen=True, slots=True)
class Merge:
    """The answers that are wanted are committed by these agents: merge the partition."""

    partition: int
    agents: tuple[str, ...]
    final: bool = True
    """False: first see whether records are undecided, and if so say so and do not merge."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Forget the task: its host is gone."""

    partition: int
    agent_id: str
    host_id: str


@dataclass(frozen=True, slots=True)
class Restart:
    """The host has been silent about a partition for too long: end its processes."""

    host_id: str
    agent_id: str
    partition: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class BreakerNews:
    """An agent's breaker at a host has changed; for people to read."""

    host_id: str
    agent_id: str
    state: str
    num_failures: int
    cool_down_s: float


@dataclass(frozen=True, slots=True)
class AwayNews:
    """The server of a host is away: it is waited for; for people to read."""

    host_id: str
    agent_id: str
    partition: int
    """What was asked in vain; it is asked again, of whoever can answer."""
    away_s: float
    """Since it was first found away."""
    cool_down_s: float
    """Until it is asked again."""
    wait_s: float
    """How long it may be away."""


Instruction = Ask | Merge | Abandon | Restart | AwayNews | BreakerNews
