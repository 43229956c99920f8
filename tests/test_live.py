"""The live state of runs: what events come to, on both sides of the feed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.events import (
    AgentDraining,
    AgentLoading,
    AgentLost,
    AgentReady,
    AnswerFailed,
    BreakerChanged,
    Escalated,
    Event,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PhaseEnded,
    RunFinished,
    RunStarted,
)
from mas_batch.monitor import board as boards
from mas_batch.monitor.board import TAKEN, WANTED, Board
from mas_batch.monitor.fleet import LiveAgent
from mas_batch.monitor.live import MAX_LOST, LiveRun
from mas_batch.monitor.messages import MAX_TEXT, VERSION, Message, decode, slim
from mas_batch.monitor.overview import Overview, overview, schema
from mas_batch.monitor.rings import MAX_POINTS, WINDOW_S, History, Recent


def new_run(name: str = "run", execution: str = "first") -> LiveRun:
    agents = {agent: LiveAgent(agent, model=f"echo:{agent}") for agent in ("a", "b")}
    return LiveRun(
        name, execution, "job", "classify", "random", 2, 0.0, agents, {}, History(start=0.0)
    )


def started(num_partitions: int = 4, done: int = 0) -> RunStarted:
    return RunStarted("runs/x", num_partitions, 3 * num_partitions, done, 3 * done, 0, 1, (), None)


def asked(partition: int, agent: str = "a", worker: str = "a-0", purpose: str = "answer") -> Event:
    return PartitionAsked(partition, agent, worker, 1, purpose, "random", {}, 0)


def answered(partition: int, agent: str = "a", worker: str = "a-0", failed: int = 0) -> Event:
    return PartitionAnswered(
        partition=partition,
        agent_id=agent,
        worker=worker,
        attempt=1,
        num_records=3,
        num_answers=3 - failed,
        num_failed=failed,
        prompt_tokens=30,
        completion_tokens=6,
        compute_s=0.5,
        transfer_s=0.25,
        processing_s=0.125,
    )


def merged(partition: int, failures: int = 0) -> Event:
    reasons = {"engine_error": failures} if failures else {}
    agreement = {"a": (2, 3)}
    return PartitionMerged(
        partition=partition,
        num_results=3 - failures,
        num_failures=failures,
        reasons=reasons,
        agreement=agreement,
    )


def fold(run: LiveRun, *events: Event, at: float = 1.0) -> LiveRun:
    for event in events:
        run.fold(at, event)
    return run


def test_a_partition_goes_through_its_states_and_is_forgotten() -> None:
    run = fold(new_run(), started(), AgentReady("a", "a-0", 0.1), AgentReady("b", "b-0", 0.1))
    assert run.states == (4, 0, 0, 0)
    fold(run, asked(0), asked(0, "b", "b-0"), asked(1))
    assert run.states == (2, 2, 0, 0)
    assert run.replicas["a-0"].in_flight == 2
    assert run.replicas["a-0"].shown_state == "busy"
    fold(run, answered(0))
    assert run.states == (2, 2, 0, 0)  # b is still at it
    fold(run, answered(0, "b", "b-0"))
    assert run.states == (2, 1, 1, 0)
    fold(run, merged(0, failures=1))
    assert run.states == (2, 1, 0, 1)
    assert list(run.open) == [1]
    assert run.replicas["b-0"].shown_state == "ready"
    assert (run.num_results, run.num_failures, run.reasons) == (2, 1, {"engine_error": 1})
    agent = run.agents["a"]
    assert (agent.num_answers, agent.completion_tokens, agent.compute_s) == (3, 6, 0.5)
    assert (agent.num_agreed, agent.num_compared, agent.asked) == (2, 3, {"answer": 2})


def test_a_copy_that_lost_its_race_is_in_flight_no_more() -> None:
    run = fold(new_run(), started(), asked(0), asked(0, worker="a-1", purpose="copy"), answered(0))
    assert run.replicas["a-1"].in_flight == 0
    assert run.states == (3, 0, 1, 0)


def test_what_a_replica_is_at() -> None:
    run = fold(new_run(), started(), AgentLoading("a", "a-0"))
    states = [run.replicas["a-0"].shown_state]
    for event in (
        AgentReady("a", "a-0", 0.1),
        asked(0),
        BreakerChanged("a", "a-0", "open", "3 failures in a row"),
        BreakerChanged("a", "a-0", "probing", "a probe"),
        asked(1, purpose="probe"),
        BreakerChanged("a", "a-0", "closed", "it answers again"),
        AgentDraining("a", "a-0", "paused"),
        asked(2),  # it was unpaused: that is not an event
        AgentLost("a", "a-0", "the worker was lost"),
    ):
        fold(run, event)
        states.append(run.replicas["a-0"].shown_state)
    assert states == [
        *("loading", "ready", "busy", "breaker open", "probing", "probing", "busy"),
        *("draining", "busy", "lost"),
    ]
    assert run.replicas["a-0"].in_flight == 0
    assert run.states == (1, 0, 3, 0)


def test_a_failed_try_and_the_end_of_a_run() -> None:
    run = fold(new_run(), started(), asked(0), AnswerFailed(0, "a", "a-0", 1, "it broke", True))
    assert (run.agents["a"].num_failed_tries, run.agents["a"].num_given_up) == (1, 1)
    assert run.agents["a"].last_failure == "it broke"
    fold(run, asked(1), PhaseEnded("answering", 0.5, 2.0), PhaseEnded("answering", 3.0, 1.0))
    assert run.phases == {"answering": 3.0}
    run.close(5.0, "RunError: full disk")
    assert (run.stage, run.message, run.ended) == ("failed", "RunError: full disk", 5.0)
    assert run.replicas["a-0"].shown_state == "released"
    assert run.replicas["a-0"].in_flight == 0


def test_a_second_pass_counts_partitions_anew_and_no_record_twice() -> None:
    run = fold(new_run(), started(2), merged(0), merged(1), Escalated("b", 2, 6))
    assert (run.stage, run.states) == ("escalating", (2, 0, 0, 0))
    fold(run, merged(0), merged(1), RunFinished(6, 0, 1.0))
    assert (run.stage, run.num_merged, run.num_results) == ("finished", 2, 6)


def test_a_resumed_run_begins_where_the_last_one_stopped() -> None:
    run = fold(new_run(), started(4, done=3))
    assert run.states == (1, 0, 0, 3)
    row = overview_of(run).runs[0]
    assert (row.progress, row.merged_records, row.records) == (0.75, 9, 12)


def test_only_the_last_lost_replicas_are_kept() -> None:
    run = fold(new_run(), started())
    for number in range(MAX_LOST + 10):
        fold(run, AgentReady("a", f"w{number}", 0.1), at=number)
        fold(run, AgentLost("a", f"w{number}", "gone"), at=number)
    assert list(run.replicas) == [f"w{number}" for number in range(10, MAX_LOST + 10)]


# The feed's messages


def message(run: LiveRun, events: list[tuple[float, Event]], **more: Any) -> bytes:
    sent = {"num_before": 0, "sent_at": 100.0, **more}
    facts = [(at, event.to_dict()) for at, event in events]
    return Message(run=run.name, execution=run.execution, events=facts, **sent).to_json()


def overview_of(run: LiveRun, now: float = 100.0) -> Overview:
    board = Board()
    assert board.receive(VERSION, message(run, [], state=run), now) == TAKEN
    return overview(board, now)


workers = st.sampled_from(["a-0", "a-1", "b-0"])
partitions = st.integers(0, 3)
some_events = st.lists(
    st.tuples(
        st.floats(0, 5000),
        st.one_of(
            st.builds(lambda p, w: asked(p, w[0], w), partitions, workers),
            st.builds(lambda p, w, f: answered(p, w[0], w, f), partitions, workers, st.just(1)),
            st.builds(merged, partitions, st.integers(0, 3)),
            st.builds(lambda w: AgentReady(w[0], w, 0.1, {"device": "cpu"}), workers),
            st.builds(lambda w: AgentLost(w[0], w, "gone"), workers),
            st.builds(lambda w: BreakerChanged(w[0], w, "open", "why"), workers),
            st.builds(
                lambda p, w: AnswerFailed(p, w[0], w, 1, "broke", False), partitions, workers
            ),
            st.just(Escalated("b", 1, 2)),
        ),
    ),
    max_size=40,
)


@given(some_events, st.integers(0, 40), st.integers(0, 40))
def test_events_in_any_batches_and_the_state_in_their_place_come_to_the_same(
    events: list[tuple[float, Event]], first: int, second: int
) -> None:
    cuts = sorted((min(first, len(events)), min(second, len(events))))
    run = fold(new_run(), started())
    board = Board()
    board.receive(VERSION, message(run, [], state=run), 0.0)
    for lower, upper in ((0, cuts[0]), (cuts[0], cuts[1])):
        sent = message(run, events[lower:upper], num_before=1 + lower)
        assert board.receive(VERSION, sent, 0.0) == TAKEN
    assert asdict(board.entries["run"].run) == asdict(folded(events[: cuts[1]]))
    # The last batch is lost; the state is sent in its place.
    assert board.receive(VERSION, message(run, [], state=folded(events)), 0.0) == TAKEN
    assert asdict(board.entries["run"].run) == asdict(folded(events))


def folded(events: list[tuple[float, Event]]) -> LiveRun:
    run = fold(new_run(), started())
    for at, event in events:
        run.fold(at, event)
    return run


@given(some_events)
def test_the_state_stays_small_and_its_counts_add_up(events: list[tuple[float, Event]]) -> None:
    run = folded(events)
    tries = [attempt for each in run.open.values() for attempt in each]
    assert sum(r.in_flight for r in run.replicas.values()) == len(tries)
    assert run.num_answering == sum(bool(each) for each in run.open.values())
    assert all(count >= 0 for count in run.states)
    assert len(run.history.points) <= MAX_POINTS


def test_a_scheduler_that_has_missed_something_asks_for_the_state() -> None:
    run, board = new_run(), Board()
    assert board.receive(VERSION, message(run, [(1.0, started())]), 0.0) == WANTED
    board.receive(VERSION, message(run, [], state=run), 0.0)
    assert board.receive(VERSION, message(run, [(1.0, started())], num_before=7), 0.0) == WANTED
    other = new_run(execution="second")
    assert board.receive(VERSION, message(other, [(1.0, started())]), 0.0) == WANTED
    assert board.receive(VERSION, message(run, [(1.0, started())]), 0.0) == TAKEN
    with pytest.raises(ValueError, match="version 99; allowed: 1"):
        board.receive(99, b"", 0.0)


def test_events_of_another_version_do_no_harm() -> None:
    events = decode([(1.0, {"event": "Unheard", "x": 1}), (2.0, {**asked(3).to_dict(), "new": 0})])
    assert events == [(1.0, Event()), (2.0, asked(3))]


def test_long_and_unencodable_texts_are_sent_all_the_same() -> None:
    lost = "\udc80 \x1b[2J s3://user:secret@bucket/ " + "x" * 10_000
    event = slim(AgentLost("a", "a-0", lost))
    assert isinstance(event, AgentLost)
    assert len(event.message) == MAX_TEXT
    assert event.message.startswith("? \\x1b[2J s3://bucket/ x")
    run = new_run()
    assert board_takes(run, event)
    many = {f"w{n}": {"in_flight": 1.0} for n in range(1000)}
    chosen = PartitionAsked(0, "a", "a-0", 1, "answer", "random", many, 0)
    assert len(message(run, [(0.0, slim(chosen))])) < 500


def board_takes(run: LiveRun, event: Event) -> bool:
    board = Board()
    board.receive(VERSION, message(run, [], state=run), 0.0)
    return board.receive(VERSION, message(run, [(1.0, event)]), 0.0) == TAKEN


def test_runs_that_are_over_go_first_and_success_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boards, "MAX_RUNS", 2)
    board = Board()
    for number, name in enumerate(("long", "done", "new")):
        run = new_run(name)
        events = [RunFinished(1, 0, 1.0)] if name == "done" else []
        board.receive(VERSION, message(fold(run, *events), [], state=run), float(number))
    assert list(board.entries) == ["long", "new"]
    assert board.last_success == {"job": 1.0}


def test_a_process_that_says_nothing_for_long_is_silent_and_clocks_may_differ() -> None:
    board, run = Board(), fold(new_run(), started(), AgentReady("a", "a-0", 0.1), at=100.0)
    fold(run, asked(0), answered(0), at=109.0)
    board.receive(VERSION, message(run, [], state=run, sent_at=110.0), 5110.0)
    row = overview(board, 5111.0).runs[0]
    assert (row.status, row.running_s, row.started) == ("answering", 111.0, 5000.0)
    assert row.agents[0].records_per_s == pytest.approx(3 / 11)
    assert overview(board, 5110.0 + boards.SILENT_S + 1).runs[0].status == "silent"


# Rings


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 9)), max_size=300))
def test_a_history_loses_no_count_and_keeps_its_order(steps: list[tuple[float, int]]) -> None:
    history = History(start=0.0)
    for number, (at, count) in enumerate(sorted(steps)):
        history.note(at, (number, 0, 0, 0), count, 2 * count)
    assert sum(point.num_records for point in history.points) == sum(n for _, n in steps)
    assert len(history.points) <= MAX_POINTS
    indexes = [point.index for point in history.points]
    assert indexes == sorted(set(indexes))
    if steps:
        assert history.points[-1].waiting == len(steps) - 1
        assert indexes[-1] == int(max(at for at, _ in steps) / history.step_s)


def test_rates_are_of_the_last_minute_only() -> None:
    recent = Recent()
    for second in range(600):
        recent.add(float(second), 2, 20)
    assert len(recent.buckets) == 12
    assert recent.rates(600.0) == (pytest.approx(2, rel=0.1), pytest.approx(20, rel=0.1))
    assert recent.rates(600.0 + WINDOW_S) == (0.0, 0.0)


def test_the_schema_of_agents_json_describes_every_field() -> None:
    described = schema()["$defs"]
    assert set(described) == {"AgentRow", "HistoryPoint", "ReplicaRow", "RunRow"}
    row = overview_of(fold(new_run(), started(), asked(0))).runs[0]
    assert set(described["RunRow"]["properties"]) == set(asdict(row))


def test_a_run_with_nobody_to_ask_is_whole_in_the_end() -> None:
    run = fold(new_run(), started(4), RunFinished(7, 1, 1.0))
    assert run.num_merged == 4
    assert (run.num_results, run.num_failures) == (7, 1)
