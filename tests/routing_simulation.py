"""Drives a dispatcher through a history and checks what must hold after every step."""

from __future__ import annotations

from collections import Counter

from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import (
    Abandon,
    Ask,
    AwayNews,
    BreakerNews,
    Instruction,
    Merge,
    Restart,
    Rules,
    Work,
)
from mas_batch.routing.policies import POLICIES


class Simulation:
    """Agents that do what the test says, on a clock that the test moves."""

    def __init__(
        self,
        agents: dict[str, int],
        plan: list[Work],
        rules: Rules,
        *,
        policy: str = "least-loaded",
    ) -> None:
        self.agents = agents
        self.rules = rules
        self.now = 0.0
        self.dispatcher = Dispatcher(agents, rules, POLICIES[policy](), plan, len(plan))
        self.hosts: dict[str, tuple[str, ...]] = {}
        self.concurrent: dict[str, int] = {}
        self.paused: set[str] = set()
        self.in_flight: list[Ask] = []
        self.failures: Counter[tuple[int, str]] = Counter()
        self.deaths: Counter[tuple[int, str]] = Counter()
        self.answered = {work.index: set(work.answered) for work in plan}
        self.num_records = {work.index: work.num_records for work in plan}
        self.to_merge: list[Merge] = []
        self.merged: dict[int, tuple[str, ...]] = {}
        self.restarts: list[Restart] = []
        self.news: list[BreakerNews] = []
        self.away_news: list[AwayNews] = []
        self.asks: list[Ask] = []

    def take(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._asked(instruction)
                case Merge():
                    self._asked_to_merge(instruction)
                case Abandon():
                    key = (instruction.partition, instruction.agent_id, instruction.host_id)
                    assert not any(_key(a) == key for a in self.in_flight), "abandoned after all"
                case Restart():
                    self.restarts.append(instruction)
                case BreakerNews():
                    self.news.append(instruction)
                case AwayNews():
                    self.away_news.append(instruction)

    def _asked(self, ask: Ask) -> None:
        assert ask.agent_id in self.hosts[ask.host_id], "asked an agent's wrong worker"
        assert ask.host_id not in self.paused, "asked a worker that is leaving"
        assert ask.partition not in self.merged, "asked after the merge"
        assert ask.agent_id not in self.answered[ask.partition], "asked after it had answered"
        twins = [
            a for a in self.in_flight if (a.partition, a.agent_id) == (ask.partition, ask.agent_id)
        ]
        assert len(twins) <= (ask.purpose == "copy"), "asked twice at once"
        assert all(twin.host_id != ask.host_id for twin in twins)
        if not self.news:  # a host that recovers is pardoned its failures
            key = (ask.partition, ask.agent_id)
            assert ask.attempt == self.failures[key] + self.deaths[key] + 1
        assert (ask.agent_id, ask.host_id) in {view.key for view in ask.candidates}
        assert (ask.purpose == "careful") == bool(self.deaths[ask.partition, ask.agent_id])
        self.asks.append(ask)
        self.in_flight.append(ask)
        beside = self.at(ask.host_id)
        assert len(beside) <= (self.rules.window or self.concurrent[ask.host_id] + 1), "too many"
        assert len(beside) == 1 or all(a.purpose != "careful" for a in beside), "not alone"

    def _asked_to_merge(self, merge: Merge) -> None:
        assert merge.partition not in self.merged, "merged twice"
        assert all(m.partition != merge.partition for m in self.to_merge), "merging twice"
        assert set(merge.agents) <= self.answered[merge.partition]
        self.to_merge.append(merge)

    def at(self, host: str) -> list[Ask]:
        """What the host has in flight, in the order in which it was sent."""
        return [ask for ask in self.in_flight if ask.host_id == host]

    def begun(self, host: str) -> list[Ask]:
        """What the host works on."""
        return self.at(host)[: self.concurrent[host]]

    def join(self, host: str, *agents: str, concurrent: int = 1) -> None:
        self.hosts[host], self.concurrent[host] = agents, concurrent
        joined = self.dispatcher.host_joined
        self.take(joined(host, agents, self.now, concurrent=concurrent))

    def pause(self, host: str, *, paused: bool = True) -> None:
        (self.paused.add if paused else self.paused.discard)(host)
        self.take(self.dispatcher.host_paused(host, paused, self.now))

    def leave(self, host: str, *, blamed: bool = True) -> None:
        begun = self.begun(host)
        del self.hosts[host]
        self.paused.discard(host)
        self.in_flight = [ask for ask in self.in_flight if ask.host_id != host]
        for ask in begun if blamed else ():  # only what it was working on can have killed it
            key = (ask.partition, ask.agent_id)
            alone = not any((a.partition, a.agent_id) == key for a in self.in_flight)
            if alone and self.dispatcher.awaits(*key) and self.is_asked(*key):
                self.deaths[key] += 1
        self.take(self.dispatcher.host_left(host, self.now, blamed=blamed))

    def is_asked(self, partition: int, agent: str) -> bool:
        """Whether the dispatcher still wants what the agent was asked."""
        return agent in self.dispatcher._board.open[partition].asked

    def answer(self, ask: Ask) -> None:
        self.in_flight.remove(ask)
        if self.dispatcher.awaits(ask.partition, ask.agent_id):
            self.answered[ask.partition].add(ask.agent_id)
        out = self.dispatcher.answered(ask.partition, ask.agent_id, ask.host_id, self.now)
        self.take(out)

    def fail(self, ask: Ask) -> None:
        self.in_flight.remove(ask)
        key = (ask.partition, ask.agent_id)
        copies = any((a.partition, a.agent_id) == key for a in self.in_flight)
        if not copies and self.dispatcher.awaits(*key):
            self.failures[key] += 1
        out = self.dispatcher.failed(ask.partition, ask.agent_id, ask.host_id, self.now)
        self.take(out)

    def find_away(self, ask: Ask, *, retry_after_s: float = 0.0, wait_s: float = 600.0) -> None:
        """The server behind the host is away."""
        self.in_flight.remove(ask)
        hints = {"retry_after_s": retry_after_s, "wait_s": wait_s}
        ids = (ask.partition, ask.agent_id, ask.host_id)
        self.take(self.dispatcher.away(*ids, self.now, **hints))

    def merge(self, merge: Merge) -> None:
        self.to_merge.remove(merge)
        self.merged[merge.partition] = merge.agents
        best = min(self.agents)
        agreement = {agent: (20 if agent == best else 5, 20) for agent in merge.agents}
        self.take(self.dispatcher.merged(merge.partition, self.now, agreement))

    def find_undecided(self, merge: Merge, num_undecided: int) -> None:
        assert not merge.final
        self.to_merge.remove(merge)
        self.take(self.dispatcher.undecided(merge.partition, num_undecided, self.now))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.dispatcher.tick(self.now))

    def finish(self) -> None:
        """Answer and merge until nothing is under way; cool breakers down where need be."""
        for _ in range(100_000):
            if self.in_flight:
                self.answer(self.in_flight[0])
            elif self.to_merge:
                self.merge(self.to_merge[0])
            else:
                before = len(self.asks)
                self.wait(61.0)
                if len(self.asks) == before and not self.to_merge:
                    return
        raise AssertionError("it does not end")


def _key(ask: Ask) -> tuple[int, str, str]:
    return (ask.partition, ask.agent_id, ask.host_id)


def plan_of(count: int, tokens: int = 100) -> list[Work]:
    return [Work(i, tokens) for i in range(count)]
