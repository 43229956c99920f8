"""A cluster on a virtual clock: the project's own dispatcher, agents that only take time.

Deterministic: the same seed gives the same history, so policies are compared on equal work.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Abandon, Ask, Instruction, Merge, Rules, Work
from mas_batch.routing.policies import POLICIES

MERGE_S = 0.01
DEATH_SEEN_S = 1.0
"""How long until the router notices a dead worker."""


@dataclass(frozen=True)
class Worker:
    """A replica: how many tokens a second it makes, and from when to when it is there."""

    name: str
    agent_id: str
    tokens_per_s: float
    joins_s: float = 0.0
    dies_s: float = float("inf")


@dataclass(frozen=True)
class Scenario:
    """Workers and what they have to do."""

    name: str
    workers: tuple[Worker, ...]
    num_partitions: int = 100
    answers_per_record: int = 1
    spread: float = 0.0
    """Standard deviation of the log of a partition's size; 0: all equal."""

    @property
    def agents(self) -> dict[str, int]:
        return {worker.agent_id: 1 for worker in self.workers}

    def plan(self, seed: int) -> list[Work]:
        rng = random.Random(seed)
        return [
            Work(i, max(1, round(1000 * rng.lognormvariate(0.0, self.spread))))
            for i in range(self.num_partitions)
        ]

    def bound_s(self, plan: list[Work]) -> float:
        """No schedule can be faster: all the work, divided at will, by all who are there.

        Where every agent has to answer, the slowest agent's own work bounds it.
        """
        tokens = sum(work.estimated_tokens for work in plan)
        if self.answers_per_record == len(self.agents) > 1:
            return max(
                _fluid_s([w for w in self.workers if w.agent_id == agent], tokens)
                for agent in self.agents
            )
        return _fluid_s(list(self.workers), tokens * self.answers_per_record)


def _fluid_s(workers: list[Worker], tokens: float) -> float:
    times = sorted({t for w in workers for t in (w.joins_s, w.dies_s)})
    for start, end in zip(times, [*times[1:], float("inf")], strict=True):
        rate = sum(w.tokens_per_s for w in workers if w.joins_s <= start < w.dies_s)
        if rate and tokens <= rate * (end - start):
            return start + tokens / rate
        tokens -= rate * (end - start) if rate else 0.0
    raise ValueError("the workers leave before the work is done")


@dataclass
class Cluster:
    """Runs one dispatcher to its end; `makespan_s` is then when the last merge was done."""

    dispatcher: Dispatcher
    workers: dict[str, Worker]
    samples: dict[str, int]
    size_of: Callable[[int], int]
    """Partition → its tokens, for one answer per record."""
    now: float = 0.0
    makespan_s: float = 0.0
    num_asks: int = 0
    num_copies: int = 0
    _events: list[tuple[float, int, Callable[[], list[Instruction]]]] = field(default_factory=list)
    _tie: count[int] = field(default_factory=count)
    _busy_until: dict[str, float] = field(default_factory=dict)
    _dead: set[str] = field(default_factory=set)

    def run(self) -> float:
        for worker in self.workers.values():
            self._at(worker.joins_s, lambda w=worker: self._join(w))
            if worker.dies_s != float("inf"):
                self._at(worker.dies_s, lambda w=worker: self._dead.add(w.name) or [])
                self._at(worker.dies_s + DEATH_SEEN_S, lambda w=worker: self._leave(w))
        self._at(1.0, self._tick)
        while not self.dispatcher.done:
            self.now, _, event = heapq.heappop(self._events)
            self._act(event())
        return self.makespan_s

    def _at(self, when: float, event: Callable[[], list[Instruction]]) -> None:
        heapq.heappush(self._events, (when, next(self._tie), event))

    def _tick(self) -> list[Instruction]:
        self._at(self.now + 1.0, self._tick)
        return self.dispatcher.tick(self.now)

    def _join(self, worker: Worker) -> list[Instruction]:
        return self.dispatcher.replica_joined(worker.name, worker.agent_id, self.now)

    def _leave(self, worker: Worker) -> list[Instruction]:
        return self.dispatcher.replica_left(worker.name, self.now)

    def _act(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._ask(instruction)
                case Merge(partition):
                    self._at(self.now + MERGE_S, lambda p=partition: self._merged(p))
                case Abandon():
                    pass

    def _ask(self, ask: Ask) -> None:
        self.num_asks += 1
        self.num_copies += ask.purpose == "copy"
        worker = self.workers[ask.replica_id]
        start = max(self.now, self._busy_until.get(worker.name, 0.0))
        tokens = self.size_of(ask.partition) * self.samples[ask.agent_id]
        end = start + tokens / worker.tokens_per_s
        self._busy_until[worker.name] = end
        self._at(end, lambda: self._answered(ask))

    def _answered(self, ask: Ask) -> list[Instruction]:
        if ask.replica_id in self._dead:
            return []
        return self.dispatcher.answered(ask.partition, ask.agent_id, ask.replica_id, self.now)

    def _merged(self, partition: int) -> list[Instruction]:
        self.makespan_s = self.now
        return self.dispatcher.merged(partition, self.now)


def simulate(scenario: Scenario, policy: str, *, seed: int = 0, **rules: object) -> Cluster:
    """Run a scenario under a policy."""
    plan = scenario.plan(seed)
    keep = Rules(scenario.answers_per_record, **rules)  # type: ignore[arg-type]
    dispatcher = Dispatcher(scenario.agents, keep, POLICIES[policy](), plan, len(plan))
    cluster = Cluster(
        dispatcher,
        {worker.name: worker for worker in scenario.workers},
        scenario.agents,
        {work.index: work.estimated_tokens for work in plan}.__getitem__,
    )
    cluster.run()
    return cluster


def simulate_many(num_partitions: int, num_workers: int, policy: str) -> Cluster:
    """Run equal partitions that are made one by one, as a run's plan is read: nothing is kept."""
    scenario = Scenario("many", workers(*[FAST] * num_workers), num_partitions)
    plan = (Work(index, 1000) for index in range(num_partitions))
    dispatcher = Dispatcher({"a": 1}, Rules(1), POLICIES[policy](), plan, num_partitions)
    cluster = Cluster(dispatcher, {w.name: w for w in scenario.workers}, {"a": 1}, lambda _: 1000)
    cluster.run()
    return cluster


def workers(*rates: float, agent: str = "a", **times: float) -> tuple[Worker, ...]:
    """Return workers of one agent, of these rates."""
    return tuple(Worker(f"{agent}-{i}", agent, rate, **times) for i, rate in enumerate(rates))


FAST = 1000.0
"""Tokens per second: a partition of average size then takes a second."""

SCENARIOS = (
    Scenario("equal", workers(FAST, FAST, FAST, FAST)),
    Scenario("1/1/1/¼", workers(FAST, FAST, FAST, FAST / 4)),
    Scenario("1/1/1/¼, sizes vary", workers(FAST, FAST, FAST, FAST / 4), spread=0.5),
    Scenario(
        "capability on 2 of 4",
        workers(FAST, FAST, agent="large") + workers(FAST, FAST, agent="small"),
        num_partitions=50,
        answers_per_record=2,
    ),
    Scenario(
        "one dies",
        (*workers(FAST, FAST, FAST), Worker("a-3", "a", FAST, dies_s=10.3)),
    ),
    Scenario(
        "one joins",
        (*workers(FAST, FAST, FAST), Worker("a-3", "a", FAST, joins_s=10.3)),
    ),
)
