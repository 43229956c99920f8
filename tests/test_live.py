"""The live state of runs: what events come to, and what a scheduler keeps of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.events import (
    AnswerFailed,
    BreakerChanged,
    Escalated,
    Event,
    HostDraining,
    HostLoading,
    HostLost,
    HostReady,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PhaseEnded,
    RunFinished,
    RunStarted,
    ServerAway,
)
from mas_batch.monitor import inbox as inboxes
from mas_batch.monitor import snapshot as snapshots
from mas_batch.monitor.fleet import LiveAgent, LivePost
from mas_batch.monitor.fold import MAX_LOST, MAX_TEXT, Fold
from mas_batch.monitor.inbox import Inbox
from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.overview import Overview, overview, schema
from mas_batch.monitor.rings import MAX_POINTS, WINDOW_S, Recent, Timeline
from mas_batch.monitor.snapshot import VERSION, Snapshot, layout_version


def new_fold(name: str = "run", execution: str = "first") -> Fold:
    agents = {agent: LiveAgent(agent, model=f"echo:{agent}") for agent in ("a", "b")}
    posts = {name: LivePost(name, [name], 1) for name in agents}
    history = Timeline(start=0.0)
    run = LiveRun(
        name, execution, "job", "classify", "random", 2, 0.0, posts, agents, {}, history
    )  # fmt: skip
    return Fold(run)


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
        queue_s=0.0625,
        wait_s=0.03125,
        idle_s=0.25,
        peak_memory_bytes=2**20,
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


def take(fold: Fold, *events: Event, at: float = 1.0) -> LiveRun:
    for event in events:
        fold.take(at, event)
    return fold.run


def test_a_partition_goes_through_its_states_and_is_forgotten() -> None:
    fold = new_fold()
    run = take(fold, started(), HostReady("a-0", ("a",), 0.1), HostReady("b-0", ("b",), 0.1))
    assert run.states == (4, 0, 0, 0)
    take(fold, asked(0), asked(0, "b", "b-0"), asked(1))
    assert run.states == (2, 2, 0, 0)
    assert run.hosts["a-0"].in_flight == 2
    assert run.hosts["a-0"].shown_state == "busy"
    take(fold, answered(0))
    assert run.states == (2, 2, 0, 0)  # b is still at it
    take(fold, answered(0, "b", "b-0"))
    assert run.states == (2, 1, 1, 0)
    take(fold, merged(0, failures=1))
    assert run.states == (2, 1, 0, 1)
    assert run.hosts["b-0"].shown_state == "ready"
    assert (run.num_results, run.num_failures, run.reasons) == (2, 1, {"engine_error": 1})
    agent = run.agents["a"]
    assert (agent.num_answers, agent.completion_tokens, agent.compute_s) == (3, 6, 0.5)
    assert (agent.num_agreed, agent.num_compared, agent.asked) == (2, 3, {"answer": 2})


def test_a_copy_that_lost_its_race_is_in_flight_no_more() -> None:
    fold = new_fold()
    run = take(fold, started(), asked(0), asked(0, worker="a-1", purpose="copy"), answered(0))
    assert run.hosts["a-1"].in_flight == 0
    assert run.states == (3, 0, 1, 0)


def test_what_a_host_is_at() -> None:
    fold = new_fold()
    run = take(fold, started(), HostLoading("a-0", ("a",)))
    states = [run.hosts["a-0"].shown_state]
    for event in (
        HostReady("a-0", ("a",), 0.1),
        asked(0),
        BreakerChanged("a", "a-0", "open", "3 failures in a row"),
        BreakerChanged("a", "a-0", "probing", "a probe"),
        asked(1, purpose="probe"),
        BreakerChanged("a", "a-0", "closed", "it answers again"),
        HostDraining("a-0", ("a",), "paused"),
        asked(2),  # it was unpaused: that is not an event
        HostLost("a-0", ("a",), "the worker was lost"),
    ):
        take(fold, event)
        states.append(run.hosts["a-0"].shown_state)
    assert states == [
        *("loading", "ready", "busy", "breaker open", "probing", "probing", "busy"),
        *("draining", "busy", "lost"),
    ]
    assert run.hosts["a-0"].in_flight == 0
    assert run.states == (1, 0, 3, 0)


def test_a_host_says_what_it_waits_for_and_since_when() -> None:
    fold = new_fold()
    take(fold, started(), HostReady("a-0", ("a",), 0.1), asked(0))
    run = take(fold, ServerAway(0, "a", "a-0", "http://x/v1: refused", 0.0, 1.0, 600.0), at=5.0)
    assert (run.num_answering, run.agents["a"].num_failed_tries) == (0, 0)
    again = ServerAway(0, "a", "a-0", "http://x/v1: refused", 1.5, 2.0, 600.0)
    take(fold, asked(0, purpose="probe"), again, at=6.5)
    row = overview_of(run).runs[0].hosts[0]
    assert (row.state, run.hosts["a-0"].since, row.in_flight) == ("server away", 5.0, 0)
    assert row.message == "waits up to 600 s for its server: http://x/v1: refused"
    take(fold, asked(0, purpose="probe"), BreakerChanged("a", "a-0", "closed", "it answers again"))
    assert run.hosts["a-0"].shown_state == "busy"


def test_a_failed_try_and_the_end_of_a_run() -> None:
    fold = new_fold()
    run = take(fold, started(), asked(0), AnswerFailed(0, "a", "a-0", 1, "it broke", True))
    assert (run.agents["a"].num_failed_tries, run.agents["a"].num_given_up) == (1, 1)
    assert run.agents["a"].last_failure == "it broke"
    take(fold, asked(1), PhaseEnded("answering", 0.5, 2.0), PhaseEnded("answering", 3.0, 1.0))
    assert run.phases == {"answering": 3.0}
    fold.close(5.0, "RunError: full disk")
    assert (run.stage, run.message, run.ended) == ("failed", "RunError: full disk", 5.0)
    assert run.hosts["a-0"].shown_state == "released"
    assert run.hosts["a-0"].in_flight == 0


def test_a_second_pass_counts_partitions_anew_and_no_record_twice() -> None:
    fold = new_fold()
    run = take(fold, started(2), merged(0), merged(1), Escalated("b", 2, 6))
    assert (run.stage, run.states) == ("escalating", (2, 0, 0, 0))
    take(fold, merged(0), merged(1), RunFinished(6, 0, 1.0))
    assert (run.stage, run.num_merged, run.num_results) == ("finished", 2, 6)


def test_a_resumed_run_begins_where_the_last_one_stopped() -> None:
    fold = new_fold()
    run = take(fold, started(4, done=3))
    assert run.states == (1, 0, 0, 3)
    row = overview_of(run).runs[0]
    assert (row.progress, row.merged_records, row.records) == (0.75, 9, 12)


def test_late_news_of_a_lost_worker_that_is_forgotten_does_not_bring_it_back() -> None:
    fold = new_fold()
    run = take(fold, started(), HostReady("early", ("a",), 0.1), asked(0, worker="early"))
    take(fold, HostLost("early", ("a",), "gone"), at=0.0)
    for number in range(MAX_LOST):
        take(fold, HostReady(f"w{number}", ("a",), 0.1), HostLost(f"w{number}", ("a",), "gone"))
    assert "early" not in run.hosts
    take(fold, answered(0, worker="early"), AnswerFailed(1, "a", "early", 1, "it broke", False))
    assert "early" not in run.hosts
    assert (run.agents["a"].num_answers, run.agents["a"].num_failed_tries) == (3, 1)


def test_only_the_last_lost_hosts_are_kept() -> None:
    fold = new_fold()
    run = take(fold, started())
    for number in range(MAX_LOST + 10):
        take(fold, HostReady(f"w{number}", ("a",), 0.1), at=number)
        take(fold, HostLost(f"w{number}", ("a",), "gone"), at=number)
    assert list(run.hosts) == [f"w{number}" for number in range(10, MAX_LOST + 10)]


# What is sent, and what the scheduler keeps of it


def sent(run: LiveRun, number: int = 1, sent_at: float = 100.0) -> bytes:
    return Snapshot(number, sent_at, run).to_json()


def overview_of(run: LiveRun, now: float = 100.0) -> Overview:
    inbox = Inbox()
    inbox.receive(VERSION, sent(run), now)
    return overview(inbox, now)


workers = st.sampled_from(["a-0", "a-1", "b-0"])
partitions = st.integers(0, 3)
some_events = st.lists(
    st.tuples(
        st.floats(0, 5000),
        st.one_of(
            st.builds(lambda p, w: asked(p, w[0], w), partitions, workers),
            st.builds(lambda p, w, f: answered(p, w[0], w, f), partitions, workers, st.just(1)),
            st.builds(merged, partitions, st.integers(0, 3)),
            st.builds(lambda w: HostReady(w, (w[0],), 0.1, {"device": "cpu"}), workers),
            st.builds(lambda w: HostLost(w, (w[0],), "gone"), workers),
            st.builds(lambda w: BreakerChanged(w[0], w, "open", "why"), workers),
            st.builds(
                lambda p, w: AnswerFailed(p, w[0], w, 1, "broke", False), partitions, workers
            ),
            st.builds(
                lambda p, w: ServerAway(p, w[0], w, "refused", 1.0, 2.0, 9.0), partitions, workers
            ),
            st.just(Escalated("b", 1, 2)),
        ),
    ),
    max_size=40,
)


def folded(events: list[tuple[float, Event]]) -> Fold:
    fold = new_fold()
    take(fold, started())
    for at, event in events:
        fold.take(at, event)
    return fold


@given(some_events)
def test_a_snapshot_says_all_there_is(events: list[tuple[float, Event]]) -> None:
    run = folded(events).run
    snapshot = Snapshot.from_json(sent(run, 7))
    assert (snapshot.number, asdict(snapshot.run)) == (7, asdict(run))


@given(some_events)
def test_the_state_stays_small_and_its_counts_add_up(events: list[tuple[float, Event]]) -> None:
    fold = folded(events)
    run = fold.run
    tries = [attempt for each in fold._open.values() for attempt in each]
    asked_workers = [worker for _, worker in tries if worker in run.hosts]
    assert sum(r.in_flight for r in run.hosts.values()) == len(asked_workers) == len(tries)
    assert run.num_open == len(fold._open)
    assert run.num_answering == sum(bool(each) for each in fold._open.values())
    assert all(count >= 0 for count in run.states)
    assert len(run.history.points) <= MAX_POINTS


def test_a_snapshot_is_of_bounded_size_however_long_the_run() -> None:
    def size(num_workers: int, num_partitions: int) -> int:
        fold = new_fold()
        take(fold, started(num_partitions))
        for number in range(num_workers):
            take(fold, HostReady(f"w{number}", ("a",), 0.1))
        for partition in range(num_partitions):
            worker, at = f"w{partition % num_workers}", float(partition)
            take(fold, asked(partition, worker=worker), answered(partition, worker=worker), at=at)
            take(fold, AnswerFailed(partition, "a", worker, 1, "x" * 1000, False), at=at)
            take(fold, merged(partition), at=at)
        return len(sent(fold.run))

    assert size(1, 4000) < size(1, 1000) + 2 * MAX_POINTS  # more digits, but no more values
    assert size(200, 1000) < size(1, 1000) + 200 * 300


def test_a_snapshot_that_is_overtaken_changes_nothing() -> None:
    fold, inbox = new_fold(), Inbox()
    inbox.receive(VERSION, sent(take(fold, started()), 1), 0.0)
    early = sent(fold.run, 2)
    inbox.receive(VERSION, sent(take(fold, RunFinished(12, 0, 1.0)), 3), 1.0)
    inbox.receive(VERSION, early, 2.0)
    heard = inbox.runs["run"]
    assert (heard.run.stage, heard.heard, inbox.last_success) == ("finished", 1.0, {"job": 1.0})
    inbox.receive(VERSION, sent(fold.run, 4), 3.0)
    assert inbox.last_success == {"job": 1.0}, "a sign of life is no second success"
    inbox.receive(VERSION, sent(new_fold(execution="second").run, 1), 4.0)
    assert inbox.runs["run"].run.execution == "second"


def test_a_scheduler_takes_its_own_version_only() -> None:
    with pytest.raises(ValueError, match=f"version 1; allowed: {VERSION}"):
        Inbox().receive("1", sent(new_fold().run), 0.0)
    with pytest.raises(ValueError, match="Snapshot"):
        Inbox().receive(VERSION, b"{}", 0.0)


def test_the_version_changes_with_whatever_a_snapshot_holds() -> None:
    class State(StrEnum):
        ON = "on"

    class MoreStates(StrEnum):
        ON = "on"
        OFF = "off"

    def version_of(name: str, kind: Any, nested: Any) -> str:
        inner = dataclass(type("Inner", (), {"__annotations__": {name: kind}}))
        hints = {"inner": dict[str, inner] | None, "state": nested}  # type: ignore[valid-type]
        return layout_version(dataclass(type("Outer", (), {"__annotations__": hints})))

    assert version_of("a", int, State) == version_of("a", int, State)
    versions = {
        version_of("a", int, State),
        version_of("b", int, State),
        version_of("a", float, State),
        version_of("a", int, MoreStates),
    }
    assert len(versions) == 4


def test_every_value_of_a_snapshot_counts_for_its_version() -> None:
    described = "\n".join(snapshots._layout(Snapshot))
    for value in ("sent_at: float", "num_open: int", "breaker open", "step_s: float", "index: int"):
        assert value in described


def test_long_and_unencodable_texts_are_sent_all_the_same() -> None:
    lost = "\udc80 \x1b[2J s3://user:secret@bucket/ " + "x" * 10_000
    run = take(new_fold(), HostReady("a-0", ("a",), 0.1), HostLost("a-0", ("a",), lost))
    message = Snapshot.from_json(sent(run)).run.hosts["a-0"].message
    assert len(message) == MAX_TEXT
    assert message.startswith("? \\x1b[2J s3://bucket/ x")


def test_runs_that_are_over_go_first_and_success_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inboxes, "MAX_RUNS", 2)
    inbox = Inbox()
    for number, name in enumerate(("long", "done", "new")):
        events = [RunFinished(1, 0, 1.0)] if name == "done" else []
        inbox.receive(VERSION, sent(take(new_fold(name), *events)), float(number))
    assert list(inbox.runs) == ["long", "new"]
    assert inbox.last_success == {"job": 1.0}


def test_a_process_that_says_nothing_for_long_is_silent_and_clocks_may_differ() -> None:
    inbox, fold = Inbox(), new_fold()
    take(fold, started(), HostReady("a-0", ("a",), 0.1), at=100.0)
    run = take(fold, asked(0), answered(0), at=109.0)
    inbox.receive(VERSION, sent(run, sent_at=110.0), 5110.0)
    row = overview(inbox, 5111.0).runs[0]
    assert (row.status, row.running_s, row.started) == ("answering", 111.0, 5000.0)
    assert row.agents[0].records_per_s == pytest.approx(3 / 11)
    assert overview(inbox, 5110.0 + inboxes.SILENT_S + 1).runs[0].status == "silent"


# Rings


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 9)), max_size=300))
def test_a_timeline_loses_no_count_and_keeps_its_order(steps: list[tuple[float, int]]) -> None:
    timeline = Timeline(start=0.0)
    for number, (at, count) in enumerate(sorted(steps)):
        timeline.note(at, (number, 0, 0, 0), count, 2 * count)
    assert sum(point.num_records for point in timeline.points) == sum(n for _, n in steps)
    assert len(timeline.points) <= MAX_POINTS
    indexes = [point.index for point in timeline.points]
    assert indexes == sorted(set(indexes))
    if steps:
        assert timeline.points[-1].waiting == len(steps) - 1
        assert indexes[-1] == int(max(at for at, _ in steps) / timeline.step_s)


def test_rates_are_of_the_last_minute_only() -> None:
    recent = Recent()
    for second in range(600):
        recent.add(float(second), 2, 20)
    assert len(recent.buckets) == 12
    assert recent.rates(600.0) == (pytest.approx(2, rel=0.1), pytest.approx(20, rel=0.1))
    assert recent.rates(600.0 + WINDOW_S) == (0.0, 0.0)


def test_what_agents_share_is_counted_once() -> None:
    fold = new_fold()
    fold.run.posts = {"a+b": LivePost("a+b", ["a", "b"], 2)}
    fold.run.window = 0
    ready = HostReady("a+b-0", ("a", "b"), 0.1, {"engine": "echo"}, concurrent=3)
    take(fold, started(), ready, asked(0, "a", "a+b-0"), asked(0, "b", "a+b-0"))
    run = take(fold, asked(1, "b", "a+b-0"), answered(0, "a", "a+b-0"))
    row = overview_of(run).runs[0]
    (post,), (host,) = row.posts, row.hosts
    assert (post.hosts, post.hosts_wanted, post.in_flight, post.window) == ({"busy": 1}, 2, 2, 4)
    assert [(each.post, each.in_flight, each.engine) for each in row.agents] == [
        ("a+b", 0, "echo"), ("a+b", 2, "echo"),
    ]  # fmt: skip
    assert (host.agents, host.in_flight, host.asked, host.answered) == (["a", "b"], 2, 3, 1)
    row = overview_of(take(fold, answered(0, "b", "a+b-0"), at=3.0)).runs[0]
    (post,), (host,) = row.posts, row.hosts
    assert (host.served_s, host.idle_s) == (2.0, 0.5), "of both agents"
    assert host.peak_memory_bytes == post.peak_memory_bytes == 2**20, "of one process"
    assert [(a.processing_s, a.waiting_s) for a in row.agents] == [(0.125, 0.09375)] * 2
    run = take(fold, HostLost("a+b-0", ("a", "b"), "gone"))
    assert [agent.in_flight for agent in run.agents.values()] == [0, 0]
    assert run.num_answering == 0


def test_the_schema_of_agents_json_describes_every_field() -> None:
    described = schema()["$defs"]
    assert set(described) == {"AgentRow", "HistoryPoint", "HostRow", "PostRow", "RunRow"}
    row = overview_of(take(new_fold(), started(), asked(0))).runs[0]
    assert set(described["RunRow"]["properties"]) == set(asdict(row))


def test_a_run_with_nobody_to_ask_is_whole_in_the_end() -> None:
    fold = new_fold()
    run = take(fold, started(4), RunFinished(7, 1, 1.0))
    assert run.num_merged == 4
    assert (run.num_results, run.num_failures) == (7, 1)
