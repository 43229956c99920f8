"""Scenarios for the simulator that also plans runs: workers known by their rates.

Deterministic: the same seed gives the same result, so policies are compared on equal work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mas_batch.latency import simulate as simulator
from mas_batch.latency.simulate import Costs, Simulation, SimulationResult
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Rules, Work
from mas_batch.routing.policies import POLICIES

MERGE_S = 0.01


@dataclass(frozen=True)
class Worker:
    """A host: how many tokens a second it makes, and from when to when it is there."""

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


def simulate(
    scenario: Scenario, policy: str, *, seed: int = 0, **rules: object
) -> SimulationResult:
    """Run a scenario under a policy."""
    plan = scenario.plan(seed)
    keep = Rules(scenario.answers_per_record, **rules)  # type: ignore[arg-type]
    dispatcher = Dispatcher(scenario.agents, keep, POLICIES[policy](), plan, len(plan))
    size_of = {work.index: work.estimated_tokens for work in plan}.__getitem__
    return _run(dispatcher, scenario, size_of)


def simulate_many(num_partitions: int, num_workers: int, policy: str) -> SimulationResult:
    """Run equal partitions that are made one by one, as a run's plan is read: nothing is kept."""
    scenario = Scenario("many", workers(*[FAST] * num_workers), num_partitions)
    plan = (Work(index, 1000) for index in range(num_partitions))
    dispatcher = Dispatcher({"a": 1}, Rules(1), POLICIES[policy](), plan, num_partitions)
    return _run(dispatcher, scenario, lambda _: 1000)


def _run(
    dispatcher: Dispatcher, scenario: Scenario, size_of: Callable[[int], int]
) -> SimulationResult:
    rates = {worker.name: worker.tokens_per_s for worker in scenario.workers}
    costs = Costs(
        answer_s=lambda worker, ask, share: size_of(ask.partition) / rates[worker.name],
        merge_s=lambda partition: MERGE_S,
    )
    simulated = [
        simulator.Worker(w.name, (w.agent_id,), joins_s=w.joins_s, dies_s=w.dies_s)
        for w in scenario.workers
    ]
    return Simulation(dispatcher, simulated, costs, samples=scenario.agents).run()


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
