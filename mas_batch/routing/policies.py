"""Routing policies: pure functions of the agents' state.

A policy is asked only about candidates that may take the partition: capable, not asked
before, with room in their window. Adding one is a class and a line in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a policy may know of one worker that serves an agent."""

    replica_id: str
    agent_id: str
    agent_rank: int
    """Position of the agent in the job file: the user's order of preference."""
    in_flight: int
    """Partitions sent and not yet answered."""
    in_flight_tokens: int
    """Their estimated tokens."""
    num_answered: int


@dataclass(frozen=True, slots=True)
class PartitionView:
    """What a policy may know of the partition to be placed."""

    index: int
    estimated_tokens: int


class Policy(Protocol):
    """Chooses one of the candidates (never empty); deterministic."""

    name: str

    def choose(self, partition: PartitionView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """Return the replica that shall answer the partition."""
        ...


class Capability:
    """The first capable agent in the job's order; its least busy replica."""

    name = "capability"

    def choose(self, partition: PartitionView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """Return the replica that shall answer the partition."""
        return min(
            candidates, key=lambda r: (r.agent_rank, r.in_flight, r.num_answered, r.replica_id)
        )


class LeastLoaded:
    """The replica with the fewest tokens in flight, whoever it serves."""

    name = "least-loaded"

    def choose(self, partition: PartitionView, candidates: Sequence[ReplicaView]) -> ReplicaView:
        """Return the replica that shall answer the partition."""
        # num_answered evens out equals: without it the first name would always win.
        return min(
            candidates,
            key=lambda r: (
                r.in_flight,
                r.in_flight_tokens,
                r.num_answered,
                r.agent_rank,
                r.replica_id,
            ),
        )


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Capability, LeastLoaded)}
