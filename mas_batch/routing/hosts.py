"""The hosts that answer for the agents: who is free, who is failing, how fast they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mas_batch.routing.host import BreakerState, Host
from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import HostView

_PRIOR = 20
"""Compared answers that a job's word on an agent's accuracy is worth."""
_MAX_SET_ASIDE = 16
"""Hosts that are emptied at a time, for tasks that must be alone at one."""


class Hosts:
    """All hosts. After changing one, call `update`: who is free is kept, not searched.

    Args:
        agents: agent → answers per record it gives when asked, in the job's order.
        may_wait: whether a host may be sent more than it begins at once.
    """

    def __init__(self, agents: Mapping[str, int], rules: Rules, *, may_wait: bool = True) -> None:
        self._rules = rules
        self._rank = {agent_id: rank for rank, agent_id in enumerate(agents)}
        self._hosts: dict[str, Host] = {}
        self._of: dict[str, dict[str, Host]] = {agent_id: {} for agent_id in agents}
        self._free: dict[str, dict[str, Host]] = {agent_id: {} for agent_id in agents}
        self._broken: set[str] = set()
        self._set_aside: dict[str, Host] = {}
        self._compared: dict[str, tuple[int, int]] = dict.fromkeys(agents, (0, 0))
        self._may_wait = may_wait
        self._expected: dict[str, int] = {}
        self._shares: dict[str, int] = {}
        """Agent → partitions that one of its hosts may have at most; empty: enough are left."""
        self.concurrent = 0
        """How many partitions all hosts together work on at once."""
        self.max_open = 16
        """Partitions that may be open: each host may be behind by its window, and the plan's end
        must be seen before the windows run dry; more would only use memory."""

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __len__(self) -> int:
        return len(self._hosts)

    def get(self, host_id: str) -> Host | None:
        """Return the host if it is there."""
        return self._hosts.get(host_id)

    def add(
        self,
        host_id: str,
        agents: Sequence[str],
        now: float,
        *,
        concurrent: int,
        max_in_flight: int | None = None,
        paused: bool,
    ) -> None:
        """A host answers for these agents; nothing changes but `paused` if it is there already."""
        host = self._hosts.get(host_id)
        if host is None:
            known = tuple(agent for agent in agents if agent in self._of)
            host = self._hosts[host_id] = Host(host_id, known, max(1, concurrent), max_in_flight)
            self.concurrent += host.concurrent
            self.max_open += self._room(host)
            for agent in known:
                self._of[agent][host_id] = host
        host.paused = paused
        self.update(host, now)

    def remove(self, host_id: str) -> Host | None:
        """A host is gone."""
        host = self._hosts.pop(host_id, None)
        if host is not None:
            self.concurrent -= host.concurrent
            self.max_open -= self._room(host)
            for agent in host.agents:
                self._of[agent].pop(host_id)
                self._free[agent].pop(host_id, None)
            self._broken.discard(host_id)
            self._set_aside.pop(host_id, None)
        return host

    def update(self, host: Host, now: float) -> None:
        """Find out which agents the host may be asked by further."""
        is_free = host.is_free(self.window(host), now)
        is_broken = False
        for agent in host.agents:
            if is_free and host.lets_through(agent, now):
                self._free[agent][host.host_id] = host
            else:
                self._free[agent].pop(host.host_id, None)
            is_broken |= not host.is_closed(agent)
        (self._broken.add if is_broken else self._broken.discard)(host.host_id)

    def update_broken(self, now: float) -> None:
        """Find out who has cooled down and may be probed."""
        for host_id in sorted(self._broken):
            self.update(self._hosts[host_id], now)

    def allow_waiting(self, may_wait: bool, now: float) -> None:
        """Near the end nothing shall wait at a busy host: another may be free sooner."""
        if may_wait != self._may_wait:
            self._may_wait = may_wait
            for host in self:
                self.update(host, now)

    def expect(self, num_hosts: Mapping[str, int]) -> None:
        """Note agent → hosts that answer for it or will soon: those are left their share."""
        self._expected = dict(num_hosts)

    def share_out(self, num_left: int | None, now: float) -> None:
        """Leave every host, also one that is still loading, its share of what is left.

        Args:
            num_left: partitions that are not merged; None: not known.
        """
        shares: dict[str, int] = {}
        if num_left is not None and num_left <= 2 * (
            self.concurrent + sum(self._expected.values())
        ):
            for agent, hosts in self._of.items():
                num_hosts = max(len(hosts), self._expected.get(agent, 0), 1)
                shares[agent] = max(1, -(-num_left // num_hosts))
        changed = [a for a in self._of if shares.get(a) != self._shares.get(a)]
        self._shares = shares
        for agent in changed:
            for host in self._of[agent].values():
                self.update(host, now)

    def window(self, host: Host) -> int:
        """Return how many partitions it may have in flight."""
        window = self._rules.window
        if window is None:
            window = host.concurrent + host.is_quick
        if host.max_in_flight is not None:
            window = min(window, host.max_in_flight)
        if self._shares:
            window = min(window, max(1, sum(self._shares[agent] for agent in host.agents)))
        return window if self._may_wait else min(window, host.concurrent)

    def _room(self, host: Host) -> int:
        return 4 + 2 * (self._rules.window or host.concurrent + 1)

    def set_aside(self, waiting: Sequence[tuple[str, Collection[str]]], now: float) -> bool:
        """Have hosts take nothing further, for tasks that must be alone and find none idle.

        At most half of an agent's hosts, so that its other partitions go on, but at least one.

        Args:
            waiting: agent of each such task, and the hosts that it shall not go to.

        Returns:
            Whether a host that was set aside no longer is.
        """
        if not waiting and not self._set_aside:
            return False
        before, self._set_aside = self._set_aside, {}
        for agent, besides in waiting:
            if len(self._set_aside) == _MAX_SET_ASIDE:
                break
            of_agent = sum(agent in host.agents for host in self._set_aside.values())
            if of_agent >= max(1, len(self._of[agent]) // 2):
                continue
            host = self._emptied_next(agent, besides, before) or self._emptied_next(
                agent, besides, self._of[agent]
            )
            if host is not None:
                self._set_aside[host.host_id] = host
        changed = before.keys() ^ self._set_aside.keys()
        for host_id in sorted(changed):
            host = self._hosts.get(host_id)
            if host is not None:
                host.set_aside = host_id in self._set_aside
                self.update(host, now)
        return bool(before.keys() - self._set_aside.keys())

    def _emptied_next(
        self, agent: str, besides: Collection[str], among: Mapping[str, Host]
    ) -> Host | None:
        able = (
            host
            for host in among.values()
            if agent in host.agents
            and host.host_id not in self._set_aside
            and host.host_id not in besides
            and _is_healthy(host, agent)
        )
        return min(able, key=lambda h: (sum(h.sent.values()), h.host_id), default=None)

    def of(self, agent_id: str) -> Mapping[str, Host]:
        """Return the agent's hosts."""
        return self._of[agent_id]

    def free(self, agent_id: str) -> Mapping[str, Host]:
        """Return the agent's hosts that may be asked something further by it."""
        return self._free[agent_id]

    def served(self) -> set[str]:
        """Agents with a host that is at work or can be asked; a paused one may stay so."""
        return {
            agent_id
            for agent_id, hosts in self._of.items()
            if any(not h.hung and (h.sent or not h.paused) for h in hosts.values())
        }

    def is_failing(self, agent_id: str) -> bool:
        """Whether the agent has hosts and its breaker is open at every one."""
        hosts = self._of[agent_id].values()
        return bool(hosts) and not any(host.is_closed(agent_id) for host in hosts)

    def is_away(self, agent_id: str) -> bool:
        """Whether the agent has hosts and the server of every one is away."""
        hosts = self._of[agent_id].values()
        return bool(hosts) and all(host.away_since is not None for host in hosts)

    def overdue_s(self, agent_id: str, now: float) -> float | None:
        """Return for how long every server of the agent has been away, if that is too long.

        None while one is there, may still come back, or is being asked.
        """
        away_s = []
        for host in self._of[agent_id].values():
            if host.away_since is None or host.sent:
                return None
            away_s.append(now - host.away_since)
            if away_s[-1] < host.wait_s:
                return None
        return min(away_s, default=None)

    def is_in_streak(self, agent_id: str) -> bool:
        """Whether the last that was heard of the agent at every host is a failure."""
        hosts = self._of[agent_id].values()
        return bool(hosts) and all(host.breakers[agent_id].num_failures > 0 for host in hosts)

    def has_healthy(self, agent_id: str, *, besides: Collection[str]) -> bool:
        """Whether a host of the agent, not one of `besides`, can be expected to answer."""
        return any(
            host.host_id not in besides and _is_healthy(host, agent_id)
            for host in self._of[agent_id].values()
        )

    def mean_rates(self) -> dict[str, float]:
        """Agent → mean measured rate of a task at its hosts, in estimated tokens per second."""
        rates = {
            agent_id: [rate for h in hosts.values() if (rate := h.task_tokens_per_s)]
            for agent_id, hosts in self._of.items()
        }
        return {agent_id: sum(known) / len(known) for agent_id, known in rates.items() if known}

    def compare(self, agreement: Mapping[str, tuple[int, int]]) -> None:
        """Add up how often the agents' answers were the merged ones: (agreed, compared)."""
        for agent_id, (agreed, compared) in agreement.items():
            before = self._compared[agent_id]
            self._compared[agent_id] = (before[0] + agreed, before[1] + compared)

    def view(self, host: Host, agent_id: str) -> HostView:
        """Return what a policy may know of the agent at the host."""
        agreed, compared = self._compared[agent_id]
        return HostView(
            host_id=host.host_id,
            agent_id=agent_id,
            agent_rank=self._rank[agent_id],
            concurrent=host.concurrent,
            in_flight=len(host.sent),
            in_flight_tokens=sum(host.sent.values()),
            num_answered=host.num_answered[agent_id],
            num_asked=host.num_asked[agent_id],
            tokens_per_s=host.tokens_per_s,
            weight=self._rules.weights.get(agent_id),
            agreement=self._agreement(agent_id, agreed, compared),
            num_compared=compared,
        )

    def _agreement(self, agent_id: str, agreed: int, compared: int) -> float:
        """Mean of the Beta posterior; what the job says of an agent counts as a prior."""
        accuracy = self._rules.accuracies.get(agent_id)
        if accuracy is None:
            return (agreed + 1) / (compared + 2)
        return (agreed + _PRIOR * accuracy) / (compared + _PRIOR)


def _is_healthy(host: Host, agent_id: str) -> bool:
    is_closed = host.breakers[agent_id].state is BreakerState.CLOSED
    return is_closed and not (host.paused or host.hung)
