"""Routing policies: small objects that choose among the agents' hosts by their state.

A policy is asked only about candidates that may take the partition: capable, not asked
before, with room in their window, not paused and not failing. It sees facts and returns one
of them: no clock, no network, no chance that a second run would not repeat. Adding one is a
class and a line in `registries.POLICIES`.

Which worker is free when is different in every run. So a policy that is to ask the same agents
in every run (`Ordered`) says their order by the partition's number alone; it then only chooses
among the workers of the agents whose turn it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from mas_batch import registries
from mas_batch.registry import Registry


@dataclass(frozen=True, slots=True)
class HostView:
    """What a policy may know of one agent at one of its hosts.

    A host that answers for several agents has a view for each; what is in flight there is in all
    of them, whichever agent was asked.
    """

    host_id: str
    agent_id: str
    agent_rank: int
    """Position of the agent in the job file: the user's order of preference."""
    concurrent: int = 1
    """Partitions that the host works on at once."""
    in_flight: int = 0
    """Partitions sent and not yet answered, of any agent."""
    in_flight_tokens: int = 0
    """Their estimated tokens."""
    num_answered: int = 0
    """Of this agent at this host, as is `num_asked`."""
    num_asked: int = 0
    tokens_per_s: float | None = None
    """Measured rate of the host, in estimated tokens; None before it has answered."""
    weight: float | None = None
    """Share that the job gives its agent; None leaves it to the measured rate."""
    agreement: float = 0.5
    """How often its agent's answers were the merged ones: mean of the Beta(1, 1) posterior."""
    num_compared: int = 0
    """Answers of its agent that `agreement` rests on."""

    @property
    def key(self) -> tuple[str, str]:
        """Agent and host; no other view has it."""
        return (self.agent_id, self.host_id)

    @property
    def load(self) -> tuple[float, int]:
        """Sort key of how busy it is: partitions in flight per one that it works on at once."""
        return (self.in_flight / self.concurrent, self.in_flight_tokens)

    @property
    def turn(self) -> tuple[int, int, str]:
        """Sort key that evens out equals: without it the first name would always win."""
        return (self.num_asked, self.agent_rank, self.host_id)


@dataclass(frozen=True, slots=True)
class PartitionView:
    """What a policy may know of the partition to be placed."""

    index: int
    estimated_tokens: int
    num_asks: int = 0
    """How often it has been placed before, with whichever agent."""
    busy: tuple[HostView, ...] = ()
    """Hosts that may take it when they have finished what they are at. Where there is none,
    a policy may not wait."""

    def chance(self) -> random.Random:
        """Return a stream of its own: the same decisions in every execution and order."""
        return random.Random(f"{self.index}.{self.num_asks}")


class Policy(Protocol):
    """Chooses one of the candidates (never empty), whatever their order."""

    name: str
    rule: str
    """The choice in one sentence, for people who ask why."""
    # A policy that may return None says so by a true attribute `waits`.

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView | None:
        """Return which agent shall be asked where; None to wait for a busy host."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A policy that asks the same agents in every run of a job."""

    def order(
        self, index: int, agents: Sequence[str], weights: Mapping[str, float]
    ) -> Sequence[str] | None:
        """Return all agents in the order in which they are asked about the partition.

        Args:
            index: the partition's number.
            agents: in the job's order.
            weights: agent → its share, as far as the job gives shares.

        Returns:
            None where the job does not say enough: then whoever is free is asked.
        """
        ...


def order_of(
    policy: Policy, index: int, agents: Sequence[str], weights: Mapping[str, float]
) -> tuple[str, ...] | None:
    """Return the agents in the order in which they are asked; None: it goes by who is free."""
    order = policy.order(index, agents, weights) if isinstance(policy, Ordered) else None
    return None if order is None else tuple(order)


class Capability:
    """The first capable agent in the job's order; its least busy host."""

    name = "capability"
    rule = "the agent that comes first in the job, at its least busy worker"

    def order(
        self, index: int, agents: Sequence[str], weights: Mapping[str, float]
    ) -> Sequence[str]:
        """Return the job's order."""
        return agents

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        return min(candidates, key=lambda r: (r.agent_rank, r.load, r.turn))


class RoundRobin:
    """One after the other."""

    name = "round-robin"
    rule = "the worker whose last turn is longest ago"

    def __init__(self) -> None:
        self._turn = 0
        self._last: dict[tuple[str, str], int] = {}

    def order(
        self, index: int, agents: Sequence[str], weights: Mapping[str, float]
    ) -> Sequence[str]:
        """Return the job's order, begun one agent later for every partition."""
        first = index % len(agents)
        return [*agents[first:], *agents[:first]]

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        chosen = min(
            candidates,
            key=lambda r: (self._last.get(r.key, 0), r.agent_rank, r.host_id),
        )
        self._turn += 1
        self._last[chosen.key] = self._turn
        return chosen


class Random:
    """Any of them."""

    name = "random"
    rule = "any agent, by lot; the lot is the partition's number"

    def order(
        self, index: int, agents: Sequence[str], weights: Mapping[str, float]
    ) -> Sequence[str]:
        """Return the agents in an order by lot, which is the same in every version of Python."""
        return sorted(agents, key=lambda agent: blake2b(f"{index}.{agent}".encode()).digest())

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        return partition.chance().choice(
            sorted(candidates, key=lambda r: (r.host_id, r.agent_rank))
        )


class LeastLoaded:
    """The host with the fewest partitions, then tokens, in flight, of whichever agent."""

    name = "least-loaded"
    rule = "the fewest partitions in flight, then the fewest tokens, then the fewest turns"

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        return min(candidates, key=lambda r: (r.load, r.turn))


class RandomLowLoad:
    """Any of the `k` least loaded: many routers over one pool do not all pick the same one.

    Source: k = 2 after Mitzenmacher, "The power of two choices in randomized load balancing",
    2001; here the two are the least loaded, not two at random, because one router sees all.
    """

    name = "random-low-load"
    rule = "one of the two least loaded workers, by lot"

    def __init__(self, k: int = 2) -> None:
        self._k = k

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        least = sorted(candidates, key=lambda r: (r.load, r.turn))[: self._k]
        return partition.chance().choice(least)


class WeightedRoundRobin:
    """Turns in proportion to weights, spread evenly: smooth weighted round robin.

    Each candidate's credit grows by its weight; the richest is chosen and pays the sum. Weights
    come from the job, else from the measured rate; who has neither gets the candidates' mean.

    Source: the algorithm of nginx's upstream balancer, 2012.

    Where the job weighs every agent, which agents are asked goes by a point in [0, 1) instead:
    the partition's number times the golden ratio, of which the whole part is left out. These
    points are evenly spread, whatever the numbers of the partitions that are left to do.
    """

    name = "weighted-round-robin"
    rule = "turns in proportion to the weights, or to the measured rates, spread evenly"

    _GOLDEN_RATIO = 0.6180339887498949

    def __init__(self) -> None:
        self._credit: dict[tuple[str, str], float] = {}

    def order(
        self, index: int, agents: Sequence[str], weights: Mapping[str, float]
    ) -> Sequence[str] | None:
        """Return whose share of [0, 1) the point is in, then the same of the others."""
        if any(agent not in weights for agent in agents):
            return None
        point, order, left = index * self._GOLDEN_RATIO % 1.0, list[str](), list(agents)
        while left:
            point *= sum(weights[agent] for agent in left)
            chosen = left[-1]
            for agent in left:
                if point < weights[agent]:
                    chosen = agent
                    break
                point -= weights[agent]
            point = min(point / weights[chosen], 1.0)  # where in its share, again in [0, 1)
            order.append(chosen)
            left.remove(chosen)
        return order

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        weights = _weights(candidates)
        for key, weight in weights.items():
            self._credit[key] = self._credit.get(key, 0.0) + weight
        chosen = min(candidates, key=lambda r: (-self._credit[r.key], r.turn))
        self._credit[chosen.key] -= sum(weights.values())
        return chosen


class Throughput:
    """Where it should be finished first, by the measured rates.

    Who has no measure counts as as fast as the fastest, so that it gets one.
    """

    name = "throughput"
    rule = "the worker that should finish it first, by its measured rate and what it has in flight"

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView:
        """Return which agent shall be asked where."""
        fastest = max((r.tokens_per_s or 0.0 for r in candidates), default=0.0) or 1.0

        def finish_s(host: HostView) -> float:
            tokens = host.in_flight_tokens + partition.estimated_tokens
            return tokens / (host.tokens_per_s or fastest)

        return min(candidates, key=lambda r: (finish_s(r), r.turn))


class MostReliable:
    """The agent whose answers most often are the merged ones, even if it has to be waited for.

    An agent that is clearly worse than a busy one is not asked: that costs time, and pays where
    fewer answers are asked for than agents could give. One partition in ten goes to the agent
    that is known least: who had a bad start can recover, and who gets worse is found out.
    """

    name = "reliability"
    rule = "the agent that most often agrees with the merged answers; one in ten the least known"
    waits = True
    EXPLORE = 0.1
    MARGIN = 0.1
    """How much better a busy agent must be to be waited for."""
    EVIDENCE = 20
    """Answers that must have been compared before the policy passes an agent over."""

    def choose(self, partition: PartitionView, candidates: Sequence[HostView]) -> HostView | None:
        """Return which agent shall be asked where; None to wait for a better one."""
        if partition.chance().random() < self.EXPLORE:
            return min(candidates, key=lambda r: (r.num_compared, r.load, r.turn))
        best = min(candidates, key=lambda r: (-r.agreement, r.load, r.turn))
        known = [r for r in partition.busy if r.num_compared >= self.EVIDENCE]
        awaited = max((r.agreement for r in known), default=0.0)
        if best.num_compared >= self.EVIDENCE and best.agreement < awaited - self.MARGIN:
            return None
        return best


def _weights(candidates: Sequence[HostView]) -> dict[tuple[str, str], float]:
    """Return the job's weights if any candidate has one, else the rates, in units of their mean."""
    by_job = any(r.weight is not None for r in candidates)
    given = {r.key: r.weight if by_job else r.tokens_per_s for r in candidates}
    known = [weight for weight in given.values() if weight]
    mean = sum(known) / len(known) if known else 1.0
    return {key: (weight or mean) / mean for key, weight in given.items()}


POLICIES: Registry[type[Policy]] = registries.POLICIES
"""The words that a job's `routing.policy` may be."""
