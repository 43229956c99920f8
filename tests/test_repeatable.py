"""Who is asked about a partition, whoever answers first: what makes a run repeatable."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from mas_batch.job import Job
from mas_batch.registries import POLICIES
from mas_batch.repeatable import repeatable_facts
from mas_batch.routing.instructions import Rules, Work
from mas_batch.routing.policies import Ordered
from tests.routing_simulation import Simulation, plan_of

AGENTS = {"a": 1, "b": 1, "c": 2, "d": 1}
WEIGHTS = {"a": 4.0, "b": 2.0, "c": 1.0, "d": 1.0}
ORDERED = ["capability", "random", "round-robin", "weighted-round-robin"]


def merged_by(policy: str, rules: Rules, seed: int) -> dict[int, tuple[str, ...]]:
    """Return whose answers every partition is merged from, in one of many histories.

    The seed decides which workers there are, what ends first, which worker dies, and where the
    submitting process is killed and started again.
    """
    chance = random.Random(seed)
    plan, merged = plan_of(24), dict[int, tuple[str, ...]]()
    while plan:
        sim = Simulation(AGENTS, plan, rules, policy=policy)
        for host in chance.sample([f"{a}-{i}" for a in AGENTS for i in (0, 1)], 8):
            sim.join(host, host[0])
        for _ in range(chance.randrange(20, 200)):
            if sim.dispatcher.done:
                break
            one_step(sim, chance)
        merged |= sim.merged
        plan = [
            Work(index, 100, answered=frozenset(answered))
            for index, answered in sim.answered.items()
            if index not in merged
        ]
    return dict(sorted(merged.items()))


def one_step(sim: Simulation, chance: random.Random) -> None:
    sim.now += chance.random()
    if chance.random() < 0.03:
        host = chance.choice(sorted(sim.hosts))
        agents = sim.hosts[host]
        sim.leave(host)
        sim.join(f"{host}'", *agents)
    elif sim.to_merge and (not sim.in_flight or chance.random() < 0.5):
        merge = chance.choice(sim.to_merge)
        # Whether answers leave records undecided follows from whose answers they are.
        if not merge.final and random.Random(f"{merge}").random() < 0.5:
            sim.find_undecided(merge, 1)
        else:
            sim.merge(merge)
    else:
        sim.answer(chance.choice(sim.in_flight))


@pytest.mark.parametrize("first", [None, 1, 2])
@pytest.mark.parametrize("policy", ORDERED)
def test_who_is_asked_follows_from_the_partition_alone(policy: str, first: int | None) -> None:
    rules = Rules(2 if first is None else 5, first=first, weights=WEIGHTS)
    runs = [merged_by(policy, rules, seed) for seed in range(10)]
    assert runs == [runs[0]] * 10


def test_every_other_policy_goes_by_who_is_free() -> None:
    ordered = {name for name in POLICIES if isinstance(POLICIES[name](), Ordered)}
    assert ordered == set(ORDERED)


@pytest.mark.parametrize("policy", ["random", "round-robin", "weighted-round-robin"])
def test_turns_are_as_many_as_they_should_be(policy: str) -> None:
    chooser = POLICIES[policy]()
    weights = WEIGHTS if policy == "weighted-round-robin" else dict.fromkeys(AGENTS, 2.0)
    orders = [chooser.order(index, list(AGENTS), weights) for index in range(800)]
    assert all(sorted(order) == sorted(AGENTS) for order in orders)
    firsts = Counter(order[0] for order in orders)
    assert firsts == {a: pytest.approx(100 * w, abs=30) for a, w in weights.items()}


def test_weights_that_the_job_does_not_give_are_measured_so_nothing_is_said() -> None:
    assert POLICIES["weighted-round-robin"]().order(0, ["a", "b"], {"a": 1.0}) is None


def test_an_agent_that_is_given_up_makes_room_for_the_next() -> None:
    sim = Simulation(AGENTS, plan_of(1), Rules(1, max_attempts=1), policy="capability")
    for agent in AGENTS:
        sim.join(f"{agent}-0", agent)
    assert [ask.agent_id for ask in sim.asks] == ["a"], "the others stay idle"
    sim.fail(sim.in_flight[0])
    assert [ask.agent_id for ask in sim.asks] == ["a", "b"]


def test_an_agent_that_has_its_turn_and_no_worker_is_missing() -> None:
    sim = Simulation(AGENTS, plan_of(1), Rules(1), policy="capability")
    sim.join("b-0", "b")
    assert sim.dispatcher.missing_agents() == {"a"}


def test_the_backlog_knows_who_is_never_asked() -> None:
    sim = Simulation(AGENTS, plan_of(100), Rules(1), policy="capability")
    assert sim.dispatcher.backlog() == {"a": 100, "b": 0, "c": 0, "d": 0}


def facts(job: Job, merged: list[str], *, reuses: bool = False) -> list[str]:
    """Return why a run is not repeatable whose partitions have answers of these agents (`ab`)."""
    agents = sorted(set("".join(merged)))
    answers = {a: [[i, i + 1] for i, who in enumerate(merged) if a in who] for a in agents}
    found = repeatable_facts(job, answers, len(merged), reuses=reuses)
    reasons: list[str] = found.get("not_repeatable_because", [])
    assert found["repeatable"] is not bool(reasons)
    return reasons


@pytest.mark.parametrize(("promise", "kept"), [("not promised", False), ("promised", True)])
def test_an_engine_that_rounds_by_the_batch_makes_a_run_unrepeatable(
    make_job: Callable[..., Job], promise: str, kept: bool
) -> None:
    engine = {"engine": "vllm", "dtype": "bfloat16", "device": "cuda", "equal_output": promise}
    found = repeatable_facts(make_job(), {"a": [], "b": []}, 0, reuses=False, engines={"a": engine})
    assert found["repeatable"] is kept
    reason = "agents.a: the engine vllm rounds by what else is in a batch, with bfloat16 on cuda"
    assert found.get("not_repeatable_because", [reason]) == [reason]


@pytest.mark.parametrize(
    ("routing", "merged", "reason"),
    [
        ({}, ["abc", "abc"], None),
        ({}, ["abc", "ab"], "1 partitions are merged without an agent"),
        ({"answers_per_record": 2}, ["ab", "bc"], "routing.policy least-loaded: not every agent"),
        ({"answers_per_record": 2, "policy": "round-robin"}, ["ab", "bc", "ac"], None),
        ({"answers_per_record": 2, "policy": "round-robin"}, ["ab", "ac", "ab"], "2 partitions"),
        ({"adaptive": {"first": 2}, "policy": "capability"}, ["ab", "abc"], None),
        ({"adaptive": {"first": 2}, "policy": "capability"}, ["ab", "a"], "1 partitions"),
        ({"adaptive": {"first": 2}, "policy": "weighted-round-robin"}, ["ab"], "weight for every"),
    ],
)
def test_the_manifest_says_whether_a_run_is_repeatable_and_why_not(
    make_job: Callable[..., Job], routing: dict[str, Any], merged: list[str], reason: str | None
) -> None:
    agents = [{"name": name, "model": f"echo:{name}"} for name in "abc"]
    reasons = facts(make_job(agents=agents, routing=routing, merge={"method": "vote"}), merged)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_what_else_makes_a_run_differ_is_named(make_job: Callable[..., Job]) -> None:
    agents = [
        {"name": "a", "model": "echo:a"},
        {"name": "b", "model": "openai:m", "options": {"base_url": "http://127.0.0.1:9/v1"}},
    ]
    routing = {"answers_per_record": 1, "policy": "random"}
    merge = {"method": "reliability", "history": "h"}
    cluster = {"mixed_versions": "allow"}
    labels = {"task": {"kind": "classify", "labels": ["x", "y"]}}
    job = make_job(agents=agents, routing=routing, merge=merge, cluster=cluster, **labels)
    keys = [reason.partition(":")[0] for reason in facts(job, ["a"], reuses=True)]
    assert keys == ["since", "merge.history", "cluster.mixed_versions", "agents.b"]
