"""The dispatcher without a network: every history of joins, deaths, answers and failures."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_batch.routing.dispatcher import Abandon, Ask, Dispatcher, Instruction, Merge, Work
from mas_batch.routing.policies import POLICIES, PartitionView, ReplicaView


class Simulation:
    """Drives a dispatcher and checks what must hold after every step."""

    def __init__(
        self,
        agents: dict[str, int],
        answers: int,
        plan: list[Work],
        *,
        policy: str = "least-loaded",
        window: int = 2,
        max_attempts: int = 3,
    ) -> None:
        self.agents = agents
        self.window = window
        self.max_attempts = max_attempts
        self.dispatcher = Dispatcher(
            agents,
            answers,
            POLICIES[policy](),
            plan,
            window=window,
            max_attempts=max_attempts,
        )
        self.replicas: dict[str, str] = {}
        self.in_flight: list[Ask] = []
        self.blamed: Counter[tuple[int, str]] = Counter()
        self.answered = {work.index: set(work.answered) for work in plan}
        self.to_merge: list[Merge] = []
        self.merged: dict[int, tuple[str, ...]] = {}

    def take(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._asked(instruction)
                case Merge():
                    self.to_merge.append(instruction)
                case Abandon():
                    self.in_flight = [
                        ask
                        for ask in self.in_flight
                        if (ask.partition, ask.agent_id, ask.replica_id)
                        != (instruction.partition, instruction.agent_id, instruction.replica_id)
                    ]

    def _asked(self, ask: Ask) -> None:
        assert self.replicas[ask.replica_id] == ask.agent_id, "asked an agent's wrong worker"
        assert ask.agent_id not in self.answered[ask.partition], "asked after it had answered"
        assert not any(
            a.partition == ask.partition and a.agent_id == ask.agent_id for a in self.in_flight
        ), "asked twice at once"
        blamed = self.blamed[ask.partition, ask.agent_id]
        assert ask.attempt == blamed + 1 <= self.max_attempts
        assert ask.replica_id in dict(ask.candidates)
        self.in_flight.append(ask)
        load = sum(a.replica_id == ask.replica_id for a in self.in_flight)
        assert load <= self.window, "above the window"

    def join(self, replica: str, agent: str) -> None:
        self.replicas[replica] = agent
        self.take(self.dispatcher.replica_joined(replica, agent))

    def leave(self, replica: str) -> None:
        del self.replicas[replica]
        had = [ask for ask in self.in_flight if ask.replica_id == replica]
        if had:  # only what it was working on can have killed it
            self.blamed[had[0].partition, had[0].agent_id] += 1
        self.take(self.dispatcher.replica_left(replica))
        assert not any(a.replica_id == replica for a in self.in_flight)

    def answer(self, ask: Ask) -> None:
        self.in_flight.remove(ask)
        self.answered[ask.partition].add(ask.agent_id)
        self.take(self.dispatcher.answered(ask.partition, ask.agent_id, ask.replica_id))

    def fail(self, ask: Ask) -> None:
        self.in_flight.remove(ask)
        self.blamed[ask.partition, ask.agent_id] += 1
        self.take(self.dispatcher.failed(ask.partition, ask.agent_id, ask.replica_id))

    def merge(self, merge: Merge) -> None:
        self.to_merge.remove(merge)
        assert merge.partition not in self.merged, "merged twice"
        assert set(merge.agents) == self.answered[merge.partition]
        self.merged[merge.partition] = merge.agents
        self.take(self.dispatcher.merged(merge.partition))


def plan_of(count: int) -> list[Work]:
    return [Work(i, 100 + i) for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_partition_ends_merged_whatever_happens(data: st.DataObject) -> None:
    agents = data.draw(
        st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), min_size=1), label="agents"
    )
    answers = data.draw(st.integers(1, sum(agents.values())), label="answers per record")
    plan = [
        Work(
            i,
            data.draw(st.integers(1, 500)),
            frozenset(data.draw(st.sets(st.sampled_from(sorted(agents))))),
        )
        for i in range(data.draw(st.integers(0, 12), label="partitions"))
    ]
    sim = Simulation(
        agents,
        answers,
        plan,
        policy=data.draw(st.sampled_from(sorted(POLICIES))),
        window=data.draw(st.integers(1, 3)),
    )
    number = 0
    for agent in sorted(agents):
        sim.join(f"{agent}-{number}", agent)
    for _ in range(data.draw(st.integers(0, 40), label="steps")):
        if sim.in_flight and data.draw(st.booleans()):
            ask = data.draw(st.sampled_from(sim.in_flight))
            (sim.answer if data.draw(st.booleans()) else sim.fail)(ask)
        elif sim.to_merge and data.draw(st.booleans()):
            sim.merge(sim.to_merge[0])
        elif sim.replicas and data.draw(st.integers(0, 3)) == 0:
            sim.leave(data.draw(st.sampled_from(sorted(sim.replicas))))
        else:
            number += 1
            agent = data.draw(st.sampled_from(sorted(agents)))
            sim.join(f"{agent}-{number}", agent)
    # From here on nothing fails: all that is left must be finished.
    for agent in sorted(agents):
        sim.join(f"{agent}-last", agent)
    while sim.in_flight or sim.to_merge:
        if sim.in_flight:
            sim.answer(sim.in_flight[0])
        else:
            sim.merge(sim.to_merge[0])
    if not sim.dispatcher.done:
        assert sim.dispatcher.distrusted_agents(), "nothing is under way and nobody is to blame"
        return
    assert set(sim.merged) == {work.index for work in plan}
    for index, merged in sim.merged.items():
        given_up = {a for a in agents if sim.blamed[index, a] >= sim.max_attempts}
        enough = sum(agents[a] for a in merged) >= answers
        assert enough or set(agents) - set(merged) <= given_up


def test_asks_only_as_many_as_needed() -> None:
    sim = Simulation({"a": 1, "b": 1, "c": 1}, 2, plan_of(6))
    for agent in "abc":
        sim.join(f"{agent}-0", agent)
    while sim.in_flight or sim.to_merge:
        if sim.in_flight:
            sim.answer(sim.in_flight[0])
        else:
            sim.merge(sim.to_merge[0])
    assert [len(agents) for agents in sim.merged.values()] == [2] * 6


def test_a_dead_workers_partitions_go_to_its_sibling() -> None:
    sim = Simulation({"a": 1}, 1, plan_of(4), window=2)
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    lost = {ask.partition for ask in sim.in_flight if ask.replica_id == "a-0"}
    assert len(lost) == 2
    sim.leave("a-0")
    sim.answer(sim.in_flight[0])
    assert sim.in_flight[-1].partition == min(lost)
    assert sim.in_flight[-1].attempt == 2
    sim.answer(sim.in_flight[0])
    assert sim.in_flight[-1].partition == max(lost)
    assert sim.in_flight[-1].attempt == 1, "an innocent partition is not blamed"


def flaky(num_partitions: int) -> Simulation:
    """Two agents; `flaky` has failed three times on partition 0."""
    sim = Simulation({"good": 1, "flaky": 1}, 2, plan_of(num_partitions), max_attempts=3)
    sim.join("good-0", "good")
    sim.join("flaky-0", "flaky")
    while asks := [a for a in sim.in_flight if (a.agent_id, a.partition) == ("flaky", 0)]:
        sim.fail(asks[0])
    assert sim.blamed[0, "flaky"] == 3
    assert sim.dispatcher.given_up(0, "flaky")
    sim.answer(next(a for a in sim.in_flight if (a.agent_id, a.partition) == ("good", 0)))
    return sim


def test_a_partition_that_an_agent_cannot_answer_is_merged_without_it() -> None:
    sim = flaky(2)
    assert sim.to_merge == [], "whether the agent works at all is not known yet"
    sim.answer(next(a for a in sim.in_flight if a.agent_id == "flaky"))
    assert sim.to_merge[0] == Merge(0, ("good",))
    assert sim.dispatcher.distrusted_agents() == set()


def test_an_agent_that_only_ever_fails_is_distrusted_and_nothing_is_merged() -> None:
    sim = flaky(1)
    assert sim.dispatcher.distrusted_agents() == {"flaky"}
    assert sim.to_merge == []
    sim = flaky(9)
    while not sim.dispatcher.distrusted_agents():
        sim.fail(next(a for a in sim.in_flight if a.agent_id == "flaky"))
    assert len({p for (p, a), n in sim.blamed.items() if a == "flaky" and n >= 3}) == 3


def test_a_retry_goes_to_a_sibling_of_the_replica_that_failed() -> None:
    sim = Simulation({"a": 1}, 1, plan_of(1), window=1)
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    first = sim.in_flight[0]
    sim.fail(first)
    assert sim.in_flight[0].replica_id != first.replica_id
    sim.fail(sim.in_flight[0])
    assert sim.in_flight[0].attempt == 3, "with nobody fresh left, anyone may try"


def test_a_late_answer_of_an_abandoned_copy_counts_once() -> None:
    sim = Simulation({"a": 1}, 1, plan_of(1))
    sim.join("zombie", "a")
    first = sim.in_flight[0]
    sim.leave("zombie")
    sim.join("a-1", "a")
    assert sim.in_flight[0].replica_id == "a-1"
    out = sim.dispatcher.answered(0, "a", first.replica_id)
    assert out == [Abandon(0, "a", "a-1"), Merge(0, ("a",))]
    assert sim.dispatcher.answered(0, "a", "a-1") == []


def test_missing_agents_are_named() -> None:
    sim = Simulation({"a": 1, "b": 1}, 2, plan_of(1))
    sim.join("a-0", "a")
    assert sim.dispatcher.missing_agents() == {"b"}
    sim.join("b-0", "b")
    assert sim.dispatcher.missing_agents() == set()


def test_an_agent_that_others_can_stand_in_for_is_not_missing() -> None:
    sim = Simulation({"a": 1, "b": 1, "slow": 1}, 2, plan_of(8), window=1)
    for agent in ("a", "b", "slow"):
        sim.join(f"{agent}-0", agent)
    sim.leave("a-0")
    assert sim.dispatcher.missing_agents() == set()


def test_open_partitions_stay_within_the_window() -> None:
    """The plan is pulled lazily: state must not grow with the corpus."""
    pulled = 0

    def plan() -> object:
        nonlocal pulled
        for work in plan_of(100_000):
            pulled += 1
            yield work

    dispatcher = Dispatcher({"a": 1}, 1, POLICIES["capability"](), plan(), window=2, max_attempts=3)
    dispatcher.replica_joined("a-0", "a")
    assert pulled <= 32


def replica(name: str, agent: str = "a", rank: int = 0, **load: int) -> ReplicaView:
    values = {"in_flight": 0, "in_flight_tokens": 0, "num_answered": 0, **load}
    return ReplicaView(name, agent, rank, **values)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [("capability", "preferred-1"), ("least-loaded", "other-0")],
)
def test_policies_choose(policy: str, chosen: str) -> None:
    candidates = [
        replica("preferred-0", rank=0, in_flight=2, in_flight_tokens=50),
        replica("preferred-1", rank=0, in_flight=1, in_flight_tokens=500),
        replica("other-0", agent="b", rank=1, in_flight=1, in_flight_tokens=100),
    ]
    choice = POLICIES[policy]().choose(PartitionView(0, 10), candidates)
    assert choice.replica_id == chosen
    assert POLICIES[policy]().choose(PartitionView(0, 10), candidates[::-1]) == choice
