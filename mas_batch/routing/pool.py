"""The workers that serve the agents: who is free, who is failing, how fast they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import ReplicaView
from mas_batch.routing.replica import BreakerState, Replica

_PRIOR = 20
"""Compared answers that a job's word on an agent's accuracy is worth."""


class Pool:
    """All replicas. After changing one, call `update`: who is free is kept, not searched."""

    def __init__(self, agents: Mapping[str, int], rules: Rules) -> None:
        self._rules = rules
        self._rank = {agent_id: rank for rank, agent_id in enumerate(agents)}
        self._replicas: dict[str, Replica] = {}
        self._of: dict[str, dict[str, Replica]] = {agent_id: {} for agent_id in agents}
        self._free: dict[str, dict[str, Replica]] = {agent_id: {} for agent_id in agents}
        self._broken: set[str] = set()
        self._compared: dict[str, tuple[int, int]] = dict.fromkeys(agents, (0, 0))
        self._is_ending = False

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __len__(self) -> int:
        return len(self._replicas)

    def get(self, replica_id: str) -> Replica | None:
        """Return the replica if it is there."""
        return self._replicas.get(replica_id)

    def add(self, replica_id: str, agent_id: str, now: float, *, paused: bool) -> None:
        """A worker serves the agent."""
        replica = self._replicas.setdefault(replica_id, Replica(replica_id, agent_id))
        replica.paused = paused
        self._of[replica.agent_id][replica_id] = replica
        self.update(replica, now)

    def remove(self, replica_id: str) -> Replica | None:
        """A worker is gone."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._of[replica.agent_id].pop(replica_id)
            self._free[replica.agent_id].pop(replica_id, None)
            self._broken.discard(replica_id)
        return replica

    def update(self, replica: Replica, now: float) -> None:
        """Find out whether the replica may be asked something further."""
        free = self._free[replica.agent_id]
        if replica.is_free(self._window(replica), now):
            free[replica.replica_id] = replica
        else:
            free.pop(replica.replica_id, None)
        if replica.breaker.state is BreakerState.CLOSED:
            self._broken.discard(replica.replica_id)
        else:
            self._broken.add(replica.replica_id)

    def update_broken(self, now: float) -> None:
        """Find out who has cooled down and may be probed."""
        for replica_id in sorted(self._broken):
            self.update(self._replicas[replica_id], now)

    def set_ending(self, is_ending: bool, now: float) -> None:
        """Near the end nothing shall wait at a worker that is busy: another may be free sooner."""
        if is_ending != self._is_ending:
            self._is_ending = is_ending
            for replica in self:
                self.update(replica, now)

    def _window(self, replica: Replica) -> int:
        if self._is_ending:
            return 1
        if self._rules.window is None:
            return 2 if replica.is_quick else 1
        return self._rules.window

    def of(self, agent_id: str) -> Mapping[str, Replica]:
        """Return the agent's replicas."""
        return self._of[agent_id]

    def free(self, agent_id: str) -> Mapping[str, Replica]:
        """Return the agent's replicas that may be asked something further."""
        return self._free[agent_id]

    def served(self) -> set[str]:
        """Agents with a replica that is at work or can be asked; a paused one may stay so."""
        return {
            agent_id
            for agent_id, replicas in self._of.items()
            if any(not r.hung and (r.sent or not r.paused) for r in replicas.values())
        }

    def is_failing(self, agent_id: str) -> bool:
        """Whether the agent has replicas and the breaker of every one is open."""
        replicas = self._of[agent_id].values()
        return bool(replicas) and all(r.breaker.state is not BreakerState.CLOSED for r in replicas)

    def is_away(self, agent_id: str) -> bool:
        """Whether the agent has replicas and the server of every one is away."""
        replicas = self._of[agent_id].values()
        return bool(replicas) and all(r.away_since is not None for r in replicas)

    def overdue_s(self, agent_id: str, now: float) -> float | None:
        """Return for how long every server of the agent has been away, if that is too long.

        None while one is there, may still come back, or is being asked.
        """
        away_s = []
        for replica in self._of[agent_id].values():
            if replica.away_since is None or replica.sent:
                return None
            away_s.append(now - replica.away_since)
            if away_s[-1] < replica.wait_s:
                return None
        return min(away_s, default=None)

    def is_in_streak(self, agent_id: str) -> bool:
        """Whether the last that was heard of every replica of the agent is a failure."""
        replicas = self._of[agent_id].values()
        return bool(replicas) and all(replica.breaker.num_failures > 0 for replica in replicas)

    def has_healthy(self, agent_id: str, *, besides: set[str]) -> bool:
        """Whether a replica of the agent, not one of `besides`, can be expected to answer."""
        return any(
            r.replica_id not in besides
            and r.breaker.state is BreakerState.CLOSED
            and not (r.paused or r.hung)
            for r in self._of[agent_id].values()
        )

    def mean_rates(self) -> dict[str, float]:
        """Agent → mean measured rate of its replicas, in estimated tokens per second."""
        rates = {
            agent_id: [r.tokens_per_s for r in replicas.values() if r.tokens_per_s]
            for agent_id, replicas in self._of.items()
        }
        return {agent_id: sum(known) / len(known) for agent_id, known in rates.items() if known}

    def compare(self, agreement: Mapping[str, tuple[int, int]]) -> None:
        """Add up how often the agents' answers were the merged ones: (agreed, compared)."""
        for agent_id, (agreed, compared) in agreement.items():
            before = self._compared[agent_id]
            self._compared[agent_id] = (before[0] + agreed, before[1] + compared)

    def view(self, replica: Replica) -> ReplicaView:
        """Return what a policy may know of the replica."""
        agreed, compared = self._compared[replica.agent_id]
        return ReplicaView(
            replica_id=replica.replica_id,
            agent_id=replica.agent_id,
            agent_rank=self._rank[replica.agent_id],
            in_flight=len(replica.sent),
            in_flight_tokens=sum(replica.sent.values()),
            num_answered=replica.num_answered,
            num_asked=replica.num_asked,
            tokens_per_s=replica.tokens_per_s,
            weight=self._rules.weights.get(replica.agent_id),
            agreement=self._agreement(replica.agent_id, agreed, compared),
            num_compared=compared,
        )

    def _agreement(self, agent_id: str, agreed: int, compared: int) -> float:
        """Mean of the Beta posterior; what the job says of an agent counts as a prior."""
        accuracy = self._rules.accuracies.get(agent_id)
        if accuracy is None:
            return (agreed + 1) / (compared + 2)
        return (agreed + _PRIOR * accuracy) / (compared + _PRIOR)
