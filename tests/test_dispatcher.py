"""The dispatcher without a network: every history of joins, deaths, answers and failures."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.host import Host
from mas_batch.routing.instructions import Abandon, Ask, Merge, Rules, Work
from mas_batch.routing.policies import POLICIES
from mas_batch.routing.speculation import remaining_s
from tests.routing_simulation import Simulation, plan_of


@given(data=st.data())
def test_every_partition_ends_merged_whatever_happens(data: st.DataObject) -> None:
    sim = drawn_simulation(data)
    engines = data.draw(st.sampled_from(["each", "shared", "both"]), label="hosts")
    groups = [(agent,) for agent in sorted(sim.agents)] if engines != "shared" else []
    if engines != "each":
        groups.append(tuple(sorted(sim.agents)))
    for number, agents in enumerate(groups):
        sim.join(f"first{number}", *agents, concurrent=data.draw(st.integers(1, 4)))
    for number in range(data.draw(st.integers(0, 60), label="steps")):
        one_step(sim, data, number, groups)
    # From here on nothing fails: all that is left must be finished.
    for host in sorted(sim.paused):
        sim.pause(host, paused=False)
    for restart in sim.restarts:
        if restart.host_id in sim.hosts:
            sim.leave(restart.host_id)
    for number, agents in enumerate(groups):
        sim.join(f"last{number}", *agents, concurrent=data.draw(st.integers(1, 4)))
    sim.finish()
    if not sim.dispatcher.done:
        assert sim.dispatcher.distrusted_agents(), "nothing is under way and nobody is to blame"
        return
    assert set(sim.merged) == set(sim.answered)
    for index, merged in sim.merged.items():
        least = sim.rules.first or sim.rules.answers_per_record
        enough = sum(sim.agents[a] for a in merged) >= least
        failed = {a for a in sim.agents if sim.failures[index, a] or sim.deaths[index, a]}
        assert enough or set(sim.agents) - set(merged) <= failed


def drawn_simulation(data: st.DataObject) -> Simulation:
    agents = data.draw(
        st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), min_size=1), label="agents"
    )
    answers = data.draw(st.integers(1, sum(agents.values())), label="answers per record")
    first = data.draw(st.none() | st.integers(1, answers), label="first")
    full = sum(agents.values()) if first is None else 0
    plan = [
        Work(
            i,
            data.draw(st.integers(1, 500)),
            data.draw(st.integers(1, 4)),
            frozenset(data.draw(st.sets(st.sampled_from(sorted(agents))))) if full else frozenset(),
        )
        for i in range(data.draw(st.integers(0, 12), label="partitions"))
    ]
    rules = Rules(
        answers,
        first=first,
        window=data.draw(st.none() | st.integers(1, 3), label="window"),
        speculate=data.draw(st.booleans(), label="speculate"),
        timeout_s=data.draw(st.none() | st.just(50.0), label="timeout"),
    )
    policy = data.draw(st.sampled_from(sorted(POLICIES)), label="policy")
    return Simulation(agents, plan, rules, policy=policy)


def one_step(
    sim: Simulation, data: st.DataObject, number: int, groups: list[tuple[str, ...]]
) -> None:
    match data.draw(st.integers(0, 12)):
        case 12 if sim.in_flight:
            after_s = data.draw(st.sampled_from([0.0, 40.0]))
            sim.find_away(data.draw(st.sampled_from(sim.in_flight)), retry_after_s=after_s)
        case 0 if sim.hosts:
            host = data.draw(st.sampled_from(sorted(sim.hosts)))
            sim.leave(host, blamed=data.draw(st.booleans()))
        case 1 if sim.hosts:
            host = data.draw(st.sampled_from(sorted(sim.hosts)))
            sim.pause(host, paused=host not in sim.paused)
        case 2:
            agents = data.draw(st.sampled_from(groups))
            sim.join(f"new{number}", *agents, concurrent=data.draw(st.integers(1, 4)))
        case 3:
            sim.wait(data.draw(st.sampled_from([0.5, 5.0, 100.0])))
        case 4 | 5 if sim.to_merge:
            merge = data.draw(st.sampled_from(sim.to_merge))
            if merge.final or data.draw(st.booleans()):
                sim.merge(merge)
            else:
                sim.find_undecided(merge, 1)
        case 6 | 7 if sim.in_flight:
            sim.fail(data.draw(st.sampled_from(sim.in_flight)))
        case _ if sim.in_flight:
            sim.now += 1.0
            sim.answer(data.draw(st.sampled_from(sim.in_flight)))
        case _:
            sim.wait(1.0)


def test_asks_only_as_many_as_needed() -> None:
    sim = Simulation({"a": 1, "b": 1, "c": 1}, plan_of(6), Rules(2, speculate=False))
    for agent in "abc":
        sim.join(f"{agent}-0", agent)
    sim.finish()
    assert [len(agents) for agents in sim.merged.values()] == [2] * 6
    assert len(sim.asks) == 12


def test_a_dead_workers_partitions_go_to_its_sibling() -> None:
    sim = Simulation({"a": 1}, plan_of(9), Rules(1, window=2))
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    lost = [ask.partition for ask in sim.in_flight if ask.host_id == "a-0"]
    assert len(lost) == 2
    sim.leave("a-0")
    sim.answer(sim.in_flight[0])
    assert len(sim.in_flight) == 1, "it is emptied for the one that must be alone"
    sim.answer(sim.in_flight[0])
    assert [ask.partition for ask in sim.in_flight] == lost[:1]
    assert sim.in_flight[-1].purpose == "careful"
    sim.answer(sim.in_flight[0])
    assert sim.in_flight[0].partition == lost[1]
    assert sim.in_flight[0].purpose == "answer", "an innocent partition is not blamed"
    assert sim.in_flight[0].attempt == 1


def test_what_a_dead_worker_had_committed_is_not_blamed_but_what_it_was_at_then() -> None:
    sim = Simulation({"a": 1}, plan_of(9), Rules(1, window=2))
    sim.join("a-0", "a")
    sim.in_flight.clear()
    sim.take(sim.dispatcher.host_left("a-0", 1.0, committed=[(0, "a")]))
    sim.deaths[1, "a"] += 1
    sim.join("a-1", "a")
    assert [(a.partition, a.purpose) for a in sim.in_flight] == [(1, "careful")]
    sim.answer(sim.in_flight[0])
    assert [(a.partition, a.purpose) for a in sim.in_flight] == [(0, "answer"), (2, "answer")]


def test_a_worker_that_leaves_on_purpose_blames_nothing() -> None:
    sim = Simulation({"a": 1}, plan_of(4), Rules(1))
    sim.join("a-0", "a")
    sim.pause("a-0")
    sim.join("a-1", "a")
    sim.leave("a-0", blamed=False)
    sim.answer(sim.in_flight[0])
    assert [ask.purpose for ask in sim.asks] == ["answer"] * 3
    assert sim.asks[-1].partition == 0


def test_a_worker_that_is_leaving_finishes_what_it_has_and_is_asked_nothing_more() -> None:
    sim = Simulation({"a": 1}, plan_of(4), Rules(1))
    sim.join("a-0", "a")
    sim.pause("a-0")
    sim.answer(sim.in_flight[0])
    assert sim.in_flight == []
    sim.pause("a-0", paused=False)
    assert [ask.partition for ask in sim.in_flight] == [1]


def test_a_worker_killed_by_every_record_is_not_asked_for_ever() -> None:
    sim = Simulation({"a": 1}, [Work(0, 10, num_records=2)], Rules(1, max_attempts=3))
    for number in range(20):
        sim.join(f"a-{number}", "a")
        if not sim.in_flight:
            break
        sim.leave(f"a-{number}")
    assert sim.deaths[0, "a"] == 3 + 2 * 2 + 1
    assert sim.dispatcher.distrusted_agents() == {"a"}


def flaky(num_partitions: int) -> Simulation:
    """Two agents; `flaky` has failed three times on partition 0."""
    sim = Simulation({"good": 1, "flaky": 1}, plan_of(num_partitions), Rules(2, max_attempts=3))
    sim.join("good-0", "good")
    sim.join("flaky-0", "flaky")
    while asks := [a for a in sim.in_flight if (a.agent_id, a.partition) == ("flaky", 0)]:
        sim.fail(asks[0])
    assert sim.failures[0, "flaky"] == 3
    assert sim.dispatcher.given_up(0, "flaky")
    sim.answer(next(a for a in sim.in_flight if (a.agent_id, a.partition) == ("good", 0)))
    return sim


def test_a_partition_that_an_agent_cannot_answer_is_merged_without_it() -> None:
    sim = flaky(2)
    assert sim.to_merge == [], "whether the agent works at all is not known yet"
    sim.answer(next(a for a in sim.in_flight if a.agent_id == "flaky"))
    assert sim.to_merge[0] == Merge(0, ("good",))
    assert sim.dispatcher.distrusted_agents() == set()


def fail_until_distrusted(sim: Simulation) -> None:
    while not sim.dispatcher.distrusted_agents():
        asks = [a for a in sim.in_flight if a.agent_id == "flaky"]
        if asks:
            sim.fail(asks[0])
        else:
            sim.wait(1.0)


def test_an_agent_that_only_ever_fails_is_distrusted_and_nothing_is_merged() -> None:
    sim = flaky(1)
    assert sim.dispatcher.distrusted_agents() == {"flaky"}
    assert sim.to_merge == []
    sim = flaky(9)
    fail_until_distrusted(sim)
    assert len({p for (p, a), n in sim.failures.items() if a == "flaky" and n >= 3}) == 3
    assert sim.now < 10, "a wrong key is found out soon"


def test_an_agent_that_breaks_in_the_middle_stops_the_run_and_degrades_nothing() -> None:
    sim = Simulation({"good": 1, "flaky": 1}, plan_of(20), Rules(2, max_attempts=3))
    sim.join("good-0", "good")
    sim.join("flaky-0", "flaky")
    for _ in range(10):
        sim.answer(sim.in_flight[0])
    while sim.to_merge:
        sim.merge(sim.to_merge[0])
    while not sim.dispatcher.distrusted_agents():
        for ask in list(sim.in_flight):
            (sim.fail if ask.agent_id == "flaky" else sim.answer)(ask)
        sim.wait(1.0)
        while sim.to_merge:
            sim.merge(sim.to_merge[0])
    assert set(sim.merged.values()) == {("good", "flaky")}
    assert len(sim.merged) < 20


def test_a_bad_last_partition_does_not_stop_the_run_of_an_agent_that_works() -> None:
    sim = Simulation({"a": 1}, plan_of(3), Rules(1))
    sim.join("a-0", "a")
    while sim.in_flight:
        ask = sim.in_flight[0]
        (sim.fail if ask.partition == 2 else sim.answer)(ask)
    assert sim.dispatcher.distrusted_agents() == set()
    assert sim.to_merge[-1] == Merge(2, ())


def test_a_host_that_fails_on_everything_is_left_alone_then_probed() -> None:
    sim = Simulation({"a": 1}, plan_of(40), Rules(1))
    sim.join("a-bad", "a")
    sim.join("a-good", "a")
    for _ in range(10):
        for ask in list(sim.in_flight):
            (sim.fail if ask.host_id == "a-bad" else sim.answer)(ask)
    assert sum(ask.host_id == "a-bad" for ask in sim.asks) == 3
    assert sim.news[-1].state == "open"
    assert max(sim.failures.values()) == 1, "the good one answers what the bad one failed on"
    sim.wait(1.5)
    probe = next(ask for ask in sim.in_flight if ask.host_id == "a-bad")
    assert probe.purpose == "probe"
    sim.fail(probe)
    assert sim.news[-1].cool_down_s == 2.0, "the next probe comes later"
    sim.wait(2.5)
    sim.answer(next(ask for ask in sim.in_flight if ask.host_id == "a-bad"))
    assert sim.news[-1].state == "closed"
    assert any(ask.host_id == "a-bad" for ask in sim.in_flight)


def test_what_an_agent_was_given_up_on_during_its_outage_is_asked_again() -> None:
    sim = Simulation({"a": 1}, plan_of(20), Rules(1, max_attempts=1))
    sim.join("a-0", "a")
    sim.answer(sim.in_flight[0])
    sim.merge(sim.to_merge[0])
    while sim.in_flight:
        sim.fail(sim.in_flight[0])
    assert [sim.dispatcher.given_up(p, "a") for p in (1, 2, 3)] == [True] * 3
    sim.wait(1.5)
    sim.answer(sim.in_flight[0])
    assert not any(sim.dispatcher.given_up(p, "a") for p in (1, 2, 3))
    sim.finish()
    assert set(sim.merged.values()) == {("a",)}


def test_a_retry_goes_to_a_sibling_of_the_host_that_failed() -> None:
    sim = Simulation({"a": 1}, plan_of(1), Rules(1, speculate=False))
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    first = sim.in_flight[0]
    sim.fail(first)
    assert sim.in_flight[0].host_id != first.host_id
    sim.fail(sim.in_flight[0])
    assert sim.in_flight[0].attempt == 3, "with nobody fresh left, anyone may try"


def test_many_bad_siblings_do_not_give_up_what_a_healthy_one_has_not_tried() -> None:
    sim = Simulation({"a": 1}, plan_of(12), Rules(1, max_attempts=3, speculate=False))
    for number in range(8):
        sim.join(f"a-{number}", "a")
    for _ in range(60):
        bad = [ask for ask in sim.in_flight if ask.host_id != "a-0"]
        if not bad:
            break
        sim.fail(bad[0])
    assert not any(sim.dispatcher.given_up(p, "a") for p in range(12))
    assert sim.dispatcher.distrusted_agents() == set()
    while good := [ask for ask in sim.in_flight if ask.host_id == "a-0"]:
        sim.answer(good[0])
    assert {merge.agents for merge in sim.to_merge} == {("a",)}
    assert len(sim.to_merge) == 12


def test_one_exception_after_a_death_is_not_the_end() -> None:
    sim = Simulation({"a": 1}, plan_of(2), Rules(1, max_attempts=3))
    sim.join("a-0", "a")
    sim.leave("a-0")
    sim.join("a-1", "a")
    sim.fail(sim.in_flight[0])
    assert not sim.dispatcher.given_up(0, "a")
    assert sim.in_flight[0].purpose == "careful"


def test_an_agent_whose_only_worker_is_paused_is_missing_once_it_is_idle() -> None:
    sim = Simulation({"a": 1}, plan_of(3), Rules(1))
    sim.join("a-0", "a")
    sim.pause("a-0")
    assert sim.dispatcher.missing_agents() == set(), "it is still at work"
    sim.answer(sim.in_flight[0])
    assert sim.dispatcher.missing_agents() == {"a"}


def test_an_agent_in_doubt_that_is_gone_is_missing() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(1), Rules(2, max_attempts=1))
    sim.join("a-0", "a")
    sim.join("b-0", "b")
    sim.answer(next(ask for ask in sim.in_flight if ask.agent_id == "a"))
    sim.fail(next(ask for ask in sim.in_flight if ask.agent_id == "b"))
    sim.leave("b-0")
    assert sim.to_merge == []
    assert sim.dispatcher.missing_agents() == {"b"}


def test_what_an_earlier_execution_knew_of_an_agent_counts() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(1), Rules(2, max_attempts=1))
    sim.dispatcher.trust("b")
    sim.join("a-0", "a")
    sim.join("b-0", "b")
    sim.answer(next(ask for ask in sim.in_flight if ask.agent_id == "a"))
    sim.fail(next(ask for ask in sim.in_flight if ask.agent_id == "b"))
    assert sim.to_merge == [Merge(0, ("a",))], "the last partition cannot hold up every resume"


def test_a_restart_that_came_to_nothing_is_tried_again() -> None:
    sim = Simulation({"a": 1}, plan_of(3), Rules(1, timeout_s=10.0))
    sim.join("a-0", "a")
    sim.wait(11.0)
    sim.wait(121.0)
    assert len(sim.restarts) == 2


def test_a_late_answer_of_an_abandoned_task_counts_once() -> None:
    sim = Simulation({"a": 1}, plan_of(1), Rules(1))
    sim.join("zombie", "a")
    sim.leave("zombie")
    sim.join("a-1", "a")
    assert sim.in_flight[0].host_id == "a-1"
    assert sim.dispatcher.answered(0, "a", "zombie", 1.0) == [Merge(0, ("a",))]
    assert sim.dispatcher.answered(0, "a", "a-1", 2.0) == []


def test_a_silent_host_is_restarted_and_asked_nothing_meanwhile() -> None:
    sim = Simulation({"a": 1}, plan_of(3), Rules(1, timeout_s=10.0))
    sim.join("a-0", "a")
    sim.wait(9.0)
    sim.dispatcher.heard("a-0", sim.now)
    sim.wait(9.0)
    assert sim.restarts == []
    sim.wait(2.0)
    assert [(r.host_id, r.partition, r.silent_s) for r in sim.restarts] == [("a-0", 0, 11.0)]
    sim.wait(20.0)
    assert len(sim.restarts) == 1, "it is given time to come back"


def test_without_a_limit_of_its_own_a_host_goes_by_its_measured_rate() -> None:
    sim = Simulation({"a": 1}, plan_of(3, tokens=1000), Rules(1))
    sim.join("a-0", "a")
    sim.wait(100.0)
    sim.answer(sim.in_flight[0])  # 10 tokens/s: 100 s for the next
    sim.wait(1999.0)
    assert sim.restarts == []
    sim.wait(2.0)
    assert len(sim.restarts) == 1


def speculating(agents: dict[str, int]) -> Simulation:
    """A fast and a slow host, both measured; the slow one has just taken the last partition."""
    sim = Simulation(agents, plan_of(7), Rules(1))
    sim.join("slow", min(agents))
    sim.join("fast", max(agents))
    for _ in range(4):
        sim.now += 1.0
        sim.answer(next(a for a in sim.in_flight if a.host_id == "fast"))
    sim.now = 10.0
    sim.answer(next(a for a in sim.in_flight if a.host_id == "slow"))
    assert sorted(a.partition for a in sim.in_flight) == [5, 6]
    sim.answer(next(a for a in sim.in_flight if a.host_id == "fast"))
    return sim


def test_the_slow_tail_is_copied_and_the_first_answer_counts() -> None:
    sim = speculating({"a": 1})
    slow = next(a for a in sim.in_flight if a.host_id == "slow")
    copy = next(a for a in sim.in_flight if a.host_id == "fast")
    assert (copy.purpose, copy.partition) == ("copy", slow.partition)
    sim.answer(copy)
    assert sim.to_merge[-1].partition == slow.partition
    assert sim.dispatcher.in_flight("slow") == 1, "its worker is still busy with it"
    sim.answer(slow)
    assert sim.dispatcher.in_flight("slow") == 0
    sim.finish()
    assert sim.dispatcher.done


def test_a_copy_that_would_finish_later_is_not_made() -> None:
    sim = Simulation({"a": 1}, plan_of(3), Rules(1))
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    sim.now = 1.0
    sim.answer(sim.in_flight[0])
    sim.answer(sim.in_flight[0])
    sim.wait(0.5)
    assert [ask.purpose for ask in sim.in_flight] == ["answer"]
    sim.wait(2.0)
    assert [ask.purpose for ask in sim.in_flight] == ["answer", "copy"], "it is overdue"


def test_where_not_all_must_answer_another_agent_may_overtake() -> None:
    sim = speculating({"a-slow": 1, "b-fast": 1})
    assert [(a.agent_id, a.purpose) for a in sim.in_flight] == [
        ("a-slow", "answer"),
        ("b-fast", "copy"),
    ]
    sim.answer(sim.in_flight[1])
    assert sim.to_merge[-1].agents == ("b-fast",)
    sim.finish()
    assert sim.dispatcher.done


def test_near_the_end_nothing_waits_at_a_busy_worker() -> None:
    sim = Simulation({"a": 1}, plan_of(100), Rules(1, window=2, speculate=False))
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    while len(sim.merged) < 96:
        sim.answer(sim.in_flight[0])
        sim.merge(sim.to_merge[0])
    assert len(sim.in_flight) <= 3
    sim.answer(sim.in_flight[0])
    assert len({ask.host_id for ask in sim.in_flight}) == len(sim.in_flight)


def test_the_window_goes_by_how_long_a_partition_takes() -> None:
    sim = Simulation({"a": 1}, plan_of(100), Rules(1, window=None))
    sim.join("slow", "a")
    sim.join("quick", "a")
    assert len(sim.in_flight) == 2, "nothing is measured yet"
    sim.now = 0.5
    sim.answer(next(a for a in sim.in_flight if a.host_id == "quick"))
    sim.now = 5.0
    sim.answer(next(a for a in sim.in_flight if a.host_id == "slow"))
    assert sim.dispatcher.in_flight("quick") == 2
    assert sim.dispatcher.in_flight("slow") == 1


def test_a_job_s_word_on_accuracy_is_a_prior_for_reliability() -> None:
    rules = Rules(1, accuracies={"poor": 0.6, "good": 0.9})
    sim = Simulation({"poor": 1, "good": 1}, plan_of(9), rules, policy="reliability")
    sim.join("poor-0", "poor")
    sim.join("good-0", "good")
    sim.answer(sim.in_flight[0])
    views = {view.agent_id: view for ask in sim.asks for view in ask.candidates}
    assert views["poor"].agreement == pytest.approx(0.6)


def test_adaptive_asks_one_more_agent_only_where_records_are_undecided() -> None:
    sim = Simulation(dict.fromkeys("abcd", 1), plan_of(2), Rules(4, first=2, speculate=False))
    for agent in "abcd":
        sim.join(f"{agent}-0", agent)
    assert len(sim.in_flight) == 4
    while sim.in_flight:
        sim.answer(sim.in_flight[0])
    first, second = sim.to_merge
    assert not first.final
    sim.merge(first)
    sim.find_undecided(second, 1)
    (third,) = sim.in_flight
    assert set(third.earlier) == set(second.agents)
    sim.answer(third)
    assert not sim.to_merge[0].final
    sim.find_undecided(sim.to_merge[0], 1)
    (fourth,) = sim.in_flight
    assert len(fourth.earlier) == 3
    sim.answer(fourth)
    assert sim.to_merge[0].final, "nobody is left to ask"
    assert sim.to_merge[0].agents == ("a", "b", "c", "d")


def test_missing_agents_are_named() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(1), Rules(2))
    sim.join("a-0", "a")
    assert sim.dispatcher.missing_agents() == {"b"}
    sim.join("b-0", "b")
    assert sim.dispatcher.missing_agents() == set()


def test_an_agent_that_others_can_stand_in_for_is_not_missing() -> None:
    sim = Simulation({"a": 1, "b": 1, "slow": 1}, plan_of(8), Rules(2))
    for agent in ("a", "b", "slow"):
        sim.join(f"{agent}-0", agent)
    sim.leave("a-0")
    assert sim.dispatcher.missing_agents() == set()


def test_open_partitions_stay_within_the_window_even_with_an_agent_that_never_comes() -> None:
    """The plan is pulled lazily: state must not grow with the corpus."""
    pulled = 0

    def plan() -> object:
        nonlocal pulled
        for work in plan_of(20_000):
            pulled += 1
            yield work

    dispatcher = Dispatcher(
        {"a": 1, "never": 1}, Rules(1), POLICIES["capability"](), plan(), 20_000
    )
    out = dispatcher.host_joined("a-0", "a", 0.0)
    for number in range(5_000):
        assert pulled <= number + 32
        ask = next(i for i in out if isinstance(i, Ask))
        dispatcher.answered(ask.partition, "a", "a-0", 0.0)
        out = dispatcher.merged(ask.partition, 0.0)
        out = out or dispatcher.tick(0.0)
        if not any(isinstance(i, Ask) for i in out):
            break
    heap = dispatcher._waiting._anywhere["never"]
    assert len(heap) < 200


def test_the_backlog_counts_what_each_agent_has_yet_to_answer() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(100), Rules(2))
    sim.join("a-0", "a")
    assert sim.dispatcher.backlog() == {"a": 100, "b": 100}
    sim.answer(sim.in_flight[0])
    assert sim.dispatcher.backlog() == {"a": 99, "b": 100}


def test_every_decision_tells_whom_it_was_made_among() -> None:
    sim = Simulation({"a": 1}, plan_of(9), Rules(1))
    sim.join("a-0", "a")
    sim.join("a-1", "a")
    sim.answer(sim.in_flight[0])
    ask = sim.asks[-1]
    assert [view.host_id for view in ask.candidates] == ["a-0"]
    assert ask.num_busy == 1
    assert Abandon not in map(type, sim.news)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_finishes_equal_work_on_equal_agents_in_turn(policy: str) -> None:
    sim = Simulation({"a": 1}, plan_of(40), Rules(1), policy=policy)
    for number in range(4):
        sim.join(f"a-{number}", "a")
    sim.finish()
    assert sorted(sim.merged) == list(range(40))


def test_a_server_that_is_away_is_probed_at_growing_intervals_and_blames_nothing() -> None:
    sim = Simulation({"a": 1}, plan_of(6), Rules(1))
    sim.join("a-0", "a")
    for cool_down_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        sim.find_away(sim.in_flight[0])
        assert sim.in_flight == []
        assert sim.away_news[-1].cool_down_s == cool_down_s
        sim.wait(cool_down_s - 0.5)
        assert sim.in_flight == []
        sim.wait(1.0)
        assert [(ask.partition, ask.purpose) for ask in sim.in_flight] == [(0, "probe")]
        assert sim.in_flight[0].attempt == 1
    assert sim.away_news[-1].away_s > 120
    sim.answer(sim.in_flight[0])
    assert sim.news[-1].state == "closed"
    sim.find_away(sim.in_flight[0])
    assert sim.away_news[-1].away_s == 0.0, "its time begins anew"
    assert sim.away_news[-1].cool_down_s == 1.0
    sim.finish()
    assert set(sim.merged.values()) == {("a",)}


def test_a_server_is_left_alone_for_as_long_as_it_asks() -> None:
    sim = Simulation({"a": 1}, plan_of(2), Rules(1))
    sim.join("a-0", "a")
    sim.find_away(sim.in_flight[0], retry_after_s=3600.0)
    sim.wait(3599.0)
    assert sim.in_flight == []
    sim.wait(1.5)
    assert sim.in_flight[0].purpose == "probe"


def test_a_server_that_comes_back_broken_is_treated_as_a_host_that_fails() -> None:
    sim = Simulation({"a": 1}, plan_of(9), Rules(1))
    sim.join("a-0", "a")
    sim.find_away(sim.in_flight[0])
    sim.wait(1.5)
    sim.fail(sim.in_flight[0])
    assert sim.news[-1].state == "open"
    sim.wait(2.5)
    sim.finish()
    assert len(sim.merged) == 9


def test_a_sibling_answers_for_a_host_whose_server_is_away() -> None:
    sim = Simulation({"a": 1}, plan_of(4), Rules(1))
    sim.join("a-0", "a")
    sim.find_away(sim.in_flight[0], wait_s=5.0)
    sim.join("a-1", "a")
    sim.now += 6.0  # no tick: it is not probed
    assert sim.in_flight[0].host_id == "a-1"
    assert sim.dispatcher.overdue(sim.now) == {}


def test_an_agent_whose_server_stays_away_does_not_hold_up_the_others() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(200), Rules(2))
    sim.join("a-0", "a")
    sim.join("b-0", "b")
    sim.find_away(next(ask for ask in sim.in_flight if ask.agent_id == "a"), retry_after_s=1e6)
    while sim.in_flight:
        sim.answer(sim.in_flight[0])
    assert sum("b" in answered for answered in sim.answered.values()) == 200
    assert sim.merged == {}


def test_a_server_that_is_away_for_too_long_is_overdue() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(4), Rules(2, speculate=False))
    sim.join("a-0", "a")
    sim.join("b-0", "b")
    sim.find_away(next(ask for ask in sim.in_flight if ask.agent_id == "a"), retry_after_s=1e6)
    sim.wait(599.0)
    assert sim.dispatcher.overdue(sim.now) == {}
    sim.wait(2.0)
    assert sim.dispatcher.overdue(sim.now) == {"a": 601.0}
    assert sim.dispatcher.distrusted_agents() == set()


def test_an_agent_that_nobody_needs_is_not_overdue() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(4), Rules(1, speculate=False))
    sim.join("a-0", "a")
    sim.join("b-0", "b")
    sim.find_away(next(ask for ask in sim.in_flight if ask.agent_id == "a"), retry_after_s=1e6)
    sim.wait(700.0)
    assert sim.dispatcher.overdue(sim.now) == {}
    sim.finish()
    assert set(sim.merged.values()) == {("b",)}


# Hosts of several agents, with several partitions at once


def shared(
    num_hosts: int, num_partitions: int, *, concurrent: int = 1, **rules: object
) -> Simulation:
    """Three agents that share their hosts; every one answers everything."""
    keep = Rules(3, **{"window": None, "speculate": False, **rules})  # type: ignore[arg-type]
    sim = Simulation(dict.fromkeys("abc", 1), plan_of(num_partitions), keep)
    for number in range(num_hosts):
        sim.join(f"h{number}", "a", "b", "c", concurrent=concurrent)
    return sim


def test_a_host_is_sent_as_many_partitions_as_it_works_on_at_once() -> None:
    sim = shared(1, 9, concurrent=4)
    assert [(ask.partition, ask.agent_id) for ask in sim.in_flight] == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "a"),
    ]
    sim.finish()
    assert set(sim.merged.values()) == {("a", "b", "c")}


@pytest.mark.parametrize("concurrent", [1, 4])
def test_the_host_that_has_read_a_partition_goes_on_with_it(concurrent: int) -> None:
    sim = shared(5, 60, concurrent=concurrent)
    chance = random.Random(0)
    while len(sim.merged) < 40:  # the rest is the end, where a second read beats an idle host
        sim.now += 0.3
        sim.merge(sim.to_merge[0]) if sim.to_merge else sim.answer(chance.choice(sim.in_flight))
    readers = {index: {a.host_id for a in sim.asks if a.partition == index} for index in sim.merged}
    assert all(len(hosts) == 1 for hosts in readers.values())


def test_what_a_lost_host_had_read_goes_to_others_at_once() -> None:
    sim = shared(2, 60)
    sim.leave("h0", blamed=False)
    sim.answer(sim.at("h1")[0])
    while sim.at("h1")[0].partition == 1:
        sim.answer(sim.at("h1")[0])
    assert sim.at("h1")[0].partition == 0


def test_near_the_end_an_idle_host_takes_what_another_one_has_read() -> None:
    sim = shared(2, 1)
    assert [(ask.agent_id, ask.host_id) for ask in sim.in_flight] == [("a", "h0"), ("b", "h1")]


def test_agents_that_share_a_host_are_asked_equally_often() -> None:
    sim = Simulation({"a": 1, "b": 1}, plan_of(20), Rules(1))
    sim.join("h", "a", "b")
    sim.finish()
    assert Counter(sim.merged.values()) == {("a",): 10, ("b",): 10}


def test_all_that_a_dead_host_had_begun_is_suspect_and_what_waited_is_not() -> None:
    sim = Simulation({"a": 1}, plan_of(9), Rules(1, window=4))
    sim.join("h0", "a", concurrent=3)
    assert [ask.partition for ask in sim.begun("h0")] == [0, 1, 2]
    sim.in_flight.clear()
    sim.take(sim.dispatcher.host_left("h0", 1.0, committed=[(1, "a")]))
    sim.deaths |= {(0, "a"): 1, (2, "a"): 1, (3, "a"): 1}  # as 1 is done, 3 was begun
    sim.join("h1", "a", concurrent=3)
    alone = []
    while sim.in_flight[0].purpose == "careful":
        assert len(sim.in_flight) == 1
        alone.append(sim.in_flight[0].partition)
        sim.answer(sim.in_flight[0])
    assert alone == [0, 2, 3]


@pytest.mark.parametrize("num_hosts", [1, 3])
@pytest.mark.parametrize("concurrent", [1, 2, 4])
def test_who_kills_is_found_and_no_innocent_is_blamed_twice(
    num_hosts: int, concurrent: int
) -> None:
    """The killer's own record is found by the journal of its second death alone."""
    sim = shared(num_hosts, 30, concurrent=concurrent)
    killer, number = (7, "b"), num_hosts
    while not sim.dispatcher.done:
        killed = next(
            (h for h in sorted(sim.hosts) if killer in {_task(ask) for ask in sim.begun(h)}), None
        )
        if killed is not None and sim.deaths[killer] < 2:
            beside = {_task(ask) for ask in sim.begun(killed)} - {killer}
            assert not (sim.deaths[killer] and beside), "it kills alone, once it is suspected"
            sim.leave(killed)
            sim.join(f"h{number}", "a", "b", "c", concurrent=concurrent)
            number += 1
        elif sim.to_merge:
            sim.merge(sim.to_merge[0])
        else:
            sim.now += 0.3
            sim.answer(sim.in_flight[0])
    assert sim.deaths.pop(killer) == 2
    assert set(sim.deaths.values()) <= {1}
    assert sum(sim.deaths.values()) == concurrent - 1
    assert set(sim.merged.values()) == {("a", "b", "c")}


def _task(ask: Ask) -> tuple[int, str]:
    return (ask.partition, ask.agent_id)


def test_many_that_must_be_alone_leave_half_of_the_hosts_to_the_others() -> None:
    sim = Simulation({"a": 1}, plan_of(200), Rules(1, window=None, speculate=False))
    for number in range(5):
        sim.join(f"h{number}", "a", concurrent=8)
    sim.leave("h0")
    chance = random.Random(0)
    emptied = []  # hosts at a time
    num_merged_when_alone = []
    while not sim.dispatcher.done:
        sim.now += 3.0
        if sim.to_merge:
            sim.merge(sim.to_merge[0])
            continue
        ask = chance.choice(sim.in_flight)
        if ask.purpose == "careful":
            num_merged_when_alone.append(len(sim.merged))
        sim.answer(ask)
        if len(sim.merged) < 150:  # then the plan ends, and all are emptied
            emptied.append(sum(len(sim.at(h)) < 7 for h in sim.hosts))
    assert max(emptied) == 2, "of four"
    assert len(num_merged_when_alone) == 8
    assert num_merged_when_alone[0] < 100, "they do not wait for the end"
    assert len(sim.merged) == 200


def test_an_agent_that_only_fails_does_not_take_the_others_of_its_host_with_it() -> None:
    sim = shared(1, 200, max_attempts=3)
    while len([a for a in sim.asks if a.agent_id == "a"]) < 3 or sim.now < 3.0:
        sim.now += 0.05
        ask = sim.in_flight[0] if sim.in_flight else None
        if ask is None:
            sim.wait(1.0)
        else:
            (sim.fail if ask.agent_id == "a" else sim.answer)(ask)
    last = sim.asks[-12:]
    assert {ask.agent_id for ask in last} >= {"b", "c"}
    assert sim.news[-1].agent_id == "a", "the others' breakers are closed by their answers"
    states = {news.agent_id: news.state for news in sim.news}
    assert states.pop("a") == "open"
    assert set(states.values()) <= {"closed"}


def test_an_agent_that_breaks_on_a_shared_host_stops_the_run_and_degrades_nothing() -> None:
    sim = shared(1, 40)
    for _ in range(12):
        sim.answer(sim.in_flight[0])
    num_whole = len(sim.to_merge)
    while not sim.dispatcher.distrusted_agents():
        if sim.in_flight:
            ask = sim.in_flight[0]
            (sim.fail if ask.agent_id == "a" else sim.answer)(ask)
        else:
            sim.wait(1.0)
    assert sim.dispatcher.distrusted_agents() == {"a"}
    assert {merge.agents for merge in sim.to_merge} == {("a", "b", "c")}
    assert num_whole == 4


def test_an_engine_that_fails_for_all_its_agents_is_left_alone_after_three_partitions() -> None:
    sim = shared(2, 60)
    while bad := sim.at("h0"):
        sim.fail(bad[0])
    failed = [ask.partition for ask in sim.asks if ask.host_id == "h0"]
    assert len(set(failed)) == 3
    assert len(failed) <= 9
    assert {news.agent_id for news in sim.news if news.state == "open"} == set("abc")


def test_a_server_that_is_away_is_probed_for_one_agent_of_its_host() -> None:
    sim = shared(1, 9, concurrent=3)
    while sim.in_flight:
        sim.find_away(sim.in_flight[0])
    sim.wait(1.5)
    assert [ask.purpose for ask in sim.in_flight] == ["probe"]
    sim.now += 2.0
    sim.answer(sim.in_flight[0])
    assert len(sim.in_flight) == 3
    sim.finish()
    assert sim.dispatcher.done


def test_the_rate_of_a_host_is_that_of_all_it_works_on_and_a_task_s_its_share() -> None:
    host = Host("h", ("a",), concurrent=4)
    now, number = 0.0, 0
    for _ in range(4):
        host.send((number, "a"), 100, now)
        number += 1
    for _ in range(100):  # four at once, each takes 4 s: one ends each second
        now += 1.0
        host.answered(next(host.begun), now)
        host.send((number, "a"), 100, now)
        number += 1
    assert host.tokens_per_s == pytest.approx(100, rel=0.01)
    assert host.task_tokens_per_s == pytest.approx(25, rel=0.01)
    assert not host.is_quick
    assert remaining_s(next(host.begun), host, {}, now) == pytest.approx(1.0, rel=0.01)
    host.send((number, "a"), 100, now)  # it waits until the first of the four is done
    assert remaining_s((number, "a"), host, {}, now) == pytest.approx(5.0, rel=0.01)


def test_any_sign_of_life_is_the_host_s() -> None:
    sim = shared(1, 9, concurrent=3, timeout_s=10.0)
    for _ in range(5):
        sim.wait(9.0)
        sim.answer(sim.in_flight[-1])  # the first one takes long
    assert sim.restarts == []
    sim.wait(11.0)
    assert len(sim.restarts) == 1


def test_the_tail_of_a_slow_host_is_copied_to_all_that_a_fast_one_has_room_for() -> None:
    sim = Simulation({"a": 1}, plan_of(18), Rules(1, window=3))
    sim.join("fast", "a", concurrent=3)
    sim.join("slow", "a", concurrent=3)
    sim.now = 20.0
    sim.answer(sim.at("slow")[0])
    while any(ask.purpose == "answer" for ask in sim.at("fast")):
        sim.now += 0.1
        sim.answer(sim.at("fast")[0])
    assert [ask.purpose for ask in sim.at("fast")] == ["copy"], "the others should end any moment"
    sim.wait(15.0)
    assert [ask.purpose for ask in sim.at("fast")] == ["copy"] * 3
    assert {ask.partition for ask in sim.at("fast")} == {a.partition for a in sim.at("slow")}


def test_a_late_answer_of_an_agent_of_an_earlier_pass_is_no_news() -> None:
    sim = Simulation({"b": 1}, plan_of(2), Rules(1, speculate=False))
    sim.join("h0", "b")
    assert not sim.dispatcher.awaits(0, "a")
    assert sim.dispatcher.answered(0, "a", "h0", 1.0) == []
    sim.finish()
    assert set(sim.merged.values()) == {("b",)}


def test_a_host_that_is_still_loading_is_left_its_share() -> None:
    dispatcher = Dispatcher(
        {"a": 1},
        Rules(answers_per_record=1, window=None),
        POLICIES["least-loaded"](),
        [Work(index, 100) for index in range(4)],
        4,
    )
    dispatcher.expect({"a": 2})
    first = dispatcher.host_joined("a1", ("a",), 0.0, concurrent=4)
    assert [ask.partition for ask in first if isinstance(ask, Ask)] == [0, 1]
    second = dispatcher.host_joined("a2", ("a",), 1.0, concurrent=4)
    assert [ask.partition for ask in second if isinstance(ask, Ask)] == [2, 3]


def test_where_no_other_host_comes_one_takes_all_that_is_left() -> None:
    dispatcher = Dispatcher(
        {"a": 1},
        Rules(answers_per_record=1, window=None),
        POLICIES["least-loaded"](),
        [Work(index, 100) for index in range(4)],
        4,
    )
    asks = dispatcher.host_joined("a1", ("a",), 0.0, concurrent=4)
    assert sum(isinstance(ask, Ask) for ask in asks) == 4
