"""Each policy alone: pure choices among candidates."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.routing.policies import POLICIES, HostView, PartitionView


def host(name: str, rank: int = 0, **facts: Any) -> HostView:
    return HostView(name, f"agent{rank}", rank, **facts)


CANDIDATES = [
    host("first-0", 0, in_flight=2, in_flight_tokens=50, tokens_per_s=1.0, num_asked=9),
    host("first-1", 0, in_flight=1, in_flight_tokens=500, tokens_per_s=1.0, num_asked=8),
    host("second-0", 1, in_flight=1, in_flight_tokens=100, agreement=0.9, tokens_per_s=9.0),
    host("third-0", 2, in_flight=2, in_flight_tokens=40, agreement=0.2, tokens_per_s=200.0),
]


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ("capability", "first-1"),
        ("round-robin", "first-0"),
        ("least-loaded", "second-0"),
        ("throughput", "third-0"),
        ("reliability", "second-0"),
        ("weighted-round-robin", "third-0"),
    ],
)
def test_each_policy_goes_by_its_own_facts(policy: str, chosen: str) -> None:
    assert POLICIES[policy]().choose(PartitionView(0, 10), CANDIDATES).host_id == chosen


views = st.builds(
    HostView,
    host_id=st.text("xyz", min_size=1, max_size=5),
    agent_id=st.sampled_from("ab"),
    agent_rank=st.integers(0, 1),
    in_flight=st.integers(0, 3),
    in_flight_tokens=st.integers(0, 500),
    num_answered=st.integers(0, 9),
    num_asked=st.integers(0, 9),
    tokens_per_s=st.none() | st.floats(0.1, 1e6),
    weight=st.none() | st.floats(0.1, 100),
    agreement=st.floats(0, 1),
    num_compared=st.integers(0, 50),
)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(data=st.data())
def test_a_choice_is_a_candidate_and_does_not_depend_on_their_order(
    name: str, data: st.DataObject
) -> None:
    several = st.lists(views, min_size=1, max_size=6, unique_by=lambda view: view.host_id)
    candidates = data.draw(several)
    shuffled = data.draw(st.permutations(candidates))
    for index in range(3):  # policies that remember must remember the same
        partition = PartitionView(index, 100, num_asks=index)
        policy, twin = POLICIES[name](), POLICIES[name]()
        choice = policy.choose(partition, candidates)
        assert choice in candidates
        assert twin.choose(partition, shuffled) == choice


def turns(policy: str, candidates: list[HostView], count: int) -> list[str]:
    chooser = POLICIES[policy]()
    return [chooser.choose(PartitionView(i, 10), candidates).host_id for i in range(count)]


def test_round_robin_goes_round_and_lets_a_newcomer_in_at_once() -> None:
    chooser = POLICIES["round-robin"]()
    abc = [host(name) for name in "abc"]
    first = [chooser.choose(PartitionView(i, 1), abc).host_id for i in range(6)]
    assert first == list("abcabc")
    then = [chooser.choose(PartitionView(i, 1), [*abc, host("d")]).host_id for i in range(5)]
    assert then == list("dabcd"), "and it does not get all the turns that it has missed"


def test_smooth_weighted_round_robin_gives_the_published_sequence() -> None:
    """5:1:1 gives a a b a c a a: the example of nginx's smooth weighted balancing."""
    candidates = [
        host("a", 0, weight=5.0),
        host("b", 1, weight=1.0),
        host("c", 2, weight=1.0),
    ]
    assert turns("weighted-round-robin", candidates, 14) == list("aabacaa") * 2


def test_without_weights_turns_go_by_the_measured_rates() -> None:
    candidates = [host("slow", tokens_per_s=10.0), host("fast", tokens_per_s=30.0)]
    assert Counter(turns("weighted-round-robin", candidates, 40)) == {"fast": 30, "slow": 10}


def test_random_low_load_leaves_the_loaded_alone() -> None:
    candidates = [host(f"r{i}", in_flight=i) for i in range(5)]
    chosen = Counter(turns("random-low-load", candidates, 200))
    assert set(chosen) == {"r0", "r1"}
    assert min(chosen.values()) > 60


def test_random_reaches_everyone() -> None:
    chosen = Counter(turns("random", [host(f"r{i}") for i in range(4)], 400))
    assert len(chosen) == 4
    assert min(chosen.values()) > 60


def test_throughput_tries_out_who_has_no_measure() -> None:
    candidates = [host("known", tokens_per_s=10.0, in_flight_tokens=1), host("new")]
    assert turns("throughput", candidates, 1) == ["new"]


def test_reliability_keeps_exploring_whom_it_knows_least() -> None:
    candidates = [
        host("trusted", 0, agreement=0.9, num_compared=500),
        host("doubtful", 1, agreement=0.1, num_compared=20),
    ]
    chosen = Counter(turns("reliability", candidates, 1000))
    assert 60 < chosen["doubtful"] < 140, "one in ten"


def test_reliability_waits_for_a_clearly_better_agent_that_is_busy() -> None:
    choose = POLICIES["reliability"]().choose
    worse = host("worse", 1, agreement=0.5, num_compared=40)
    better = host("better", 0, agreement=0.9, num_compared=40, in_flight=1)
    little_known = host("new", 0, agreement=0.9, num_compared=3, in_flight=1)
    partition = PartitionView(1, 10, busy=(better,))
    assert partition.chance().random() > 0.1, "not one that explores"
    assert choose(partition, [worse]) is None
    assert choose(PartitionView(1, 10, busy=(little_known,)), [worse]) == worse
    assert choose(PartitionView(1, 10), [worse]) == worse, "nobody to wait for"


def test_every_policy_has_a_word_of_the_job_and_a_sentence() -> None:
    assert all(POLICIES[name].name == name and POLICIES[name].rule for name in POLICIES)
