"""Every routing decision can be explained, from the run's files alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Client
from rich.console import Console

from mas_batch import pipeline
from mas_batch.cli import main
from mas_batch.corpus import CorpusReader
from mas_batch.errors import RunError
from mas_batch.events import (
    AnswerFailed,
    BreakerChanged,
    Event,
    HostDraining,
    HostLost,
    HostReady,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
    ServerAway,
)
from mas_batch.explain import Explanation, explain, find_record, print_explanation, to_json
from mas_batch.explain.story import Decision, News, OutcomeKind, Step, Story
from mas_batch.job import Job
from mas_batch.monitor import event_log
from mas_batch.monitor.event_log import EventLog, LoggedEvent, read_events
from mas_batch.partition import partition
from mas_batch.run_folder.manifest import write_job
from mas_batch.run_folder.names import answers_name, results_name, staged_name
from mas_batch.run_folder.plan import stage
from mas_batch.run_folder.storage import Store

MakeJob = Callable[..., Job]
READY = [HostReady(f"{agent}-{i}", (agent,), 0.1) for agent in ("small", "large") for i in (0, 1)]
START = datetime(2026, 1, 2, 23, 59, 58, tzinfo=UTC)


def asked(worker: str, partition: int = 1, attempt: int = 1, **facts: Any) -> PartitionAsked:
    figures = {
        "in_flight": 0,
        "in_flight_tokens": 0,
        "num_answered": 3,
        "num_asked": 4,
        "tokens_per_s": 41.5,
        "agreement": 0.75,
    }
    candidates: dict[str, dict[str, Any]] = {}
    for name, seen in facts.pop("candidates", {worker: figures}).items():
        candidates.setdefault(name[:5], {})[name] = seen
    return PartitionAsked(
        partition=partition,
        agent_id=worker[:5],
        worker=worker,
        attempt=attempt,
        candidates=candidates,
        **{"purpose": "answer", "policy": "least-loaded", "num_busy": 1, **facts},
    )


def answered(worker: str, partition: int = 1) -> PartitionAnswered:
    return PartitionAnswered(partition, worker[:5], worker, 1, 3, 2, 1, 90, 30, compute_s=1.5)


def failed(worker: str, attempt: int = 1, given_up: bool = False) -> AnswerFailed:
    return AnswerFailed(1, worker[:5], worker, attempt, "EngineError: [no] memory", given_up)


def story(*events: Event) -> list[Step]:
    """Steps of partition 1, from events a second apart."""
    told = Story(1, "x", START)
    for second, event in enumerate(events):
        facts = event.to_dict()
        name = facts.pop("event")
        told.take(LoggedEvent(START + timedelta(seconds=second), "x", name, facts))
    told.end()
    return told.steps


def decisions(steps: list[Step] | tuple[Step, ...]) -> list[Decision]:
    return [step for step in steps if isinstance(step, Decision)]


def news(steps: list[Step]) -> list[str]:
    return [step.message for step in steps if isinstance(step, News)]


@pytest.fixture
def staged(make_job: MakeJob) -> Store:
    """A run of 20 records in 7 partitions whose agents have not been asked yet."""
    job = make_job()
    corpus = CorpusReader(job.corpus)
    store, _ = pipeline.open_store(job, corpus)
    write_job(store, job)
    stage(store, corpus, partition(corpus, max_tokens=1000, max_records=3, tokens_per_record=8))
    return store


def log(store: Store, *events: Event) -> None:
    """Keep events as one execution does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_log, "FLUSH_EVENTS", 2)
        keep = EventLog(store)
        for event in events:
            keep(event)
        keep.flush()


def screen(told: Explanation, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    print_explanation(console, told)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines()[2:])) <= width  # the second line is the run's folder
    return text


# The event log


def test_events_come_back_in_order_over_files_and_executions(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    log(store, *READY, asked("small-0"))
    log(store, READY[0], answered("small-0"))
    assert len(list(tmp_path.glob("events/*.jsonl"))) == 4
    events = list(read_events(store))
    assert [event.name for event in events] == [
        *["HostReady"] * 4,
        "PartitionAsked",
        "HostReady",
        "PartitionAnswered",
    ]
    assert len({event.execution for event in events}) == 2
    assert events[-1].facts["num_answers"] == 2
    assert events[-1].time.tzinfo is UTC
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_more_files_than_four_digits_can_number_stay_in_order(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in (10_000, 9_999):
        line = {"time": "2026-01-02T00:00:00+00:00", "event": "X", "number": number}
        store.commit(f"events/e-{number:04d}.jsonl", json.dumps(line).encode())
    assert [event.facts["number"] for event in read_events(store)] == [9_999, 10_000]


@pytest.mark.parametrize("message", ["a\u2028b\x85c", "na\udceff", "[red]\n\ttab"])
def test_any_message_survives_the_log(tmp_path: Path, message: str) -> None:
    store = Store(str(tmp_path))
    log(store, HostLost("a-0", ("a",), message))
    assert [event.facts["message"] for event in read_events(store)] == [message]


def test_a_file_is_written_after_a_while_and_not_only_when_it_is_full(tmp_path: Path) -> None:
    store, now = Store(str(tmp_path)), [0.0]
    keep = EventLog(store, clock=lambda: now[0])
    for second in (9.9, 10.0, 10.1, 19.9, 20.0):
        now[0] = second
        keep(READY[0])
    files = sorted(tmp_path.glob("events/*.jsonl"))
    assert [len(file.read_bytes().splitlines()) for file in files] == [2, 3]


def test_a_file_is_bounded_in_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "FLUSH_CHARS", 1000)
    store = Store(str(tmp_path))
    keep = EventLog(store)
    for _ in range(4):
        keep(HostLost("a-0", ("a",), "x" * 500))
    files = list(tmp_path.glob("events/*.jsonl"))
    assert [len(file.read_bytes().splitlines()) for file in files] == [2, 2]


def test_a_last_line_that_is_cut_short_is_reported(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    log(store, READY[0], READY[1])
    log(store, READY[2])
    first, *_ = sorted(tmp_path.glob("events/*.jsonl"))
    first.write_bytes(first.read_bytes()[:-20])
    reported: list[str] = []
    events = list(read_events(store, reported.append))
    assert [event.facts["worker"] for event in events] == ["small-0", "large-0"]
    assert len(reported) == 1
    assert f"{first.name}, line 2: not an event" in reported[0]


def test_a_broken_line_within_a_file_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    log(store, READY[0], READY[1])
    (file,) = tmp_path.glob("events/*.jsonl")
    file.write_bytes(b"{}\n" + file.read_bytes())
    with pytest.raises(RunError, match=r"-0000\.jsonl, line 1: not an event: 'time'"):
        list(read_events(store))


# One partition's steps


def test_a_decision_names_rule_candidates_and_outcome() -> None:
    two = {"small-0": {"in_flight": 1.0}, "large-0": {"in_flight": 0.0}}
    steps = story(
        *READY,
        asked("large-0", candidates=two),
        asked("large-0", partition=2),
        answered("large-0", partition=2),
        answered("large-0"),
    )
    (decision,) = decisions(steps)
    assert decision.time == START + timedelta(seconds=4)
    assert decision.why.startswith("the fewest partitions in flight")
    assert [(c.worker, c.agent_id, c.chosen) for c in decision.candidates] == [
        ("small-0", "small", False),
        ("large-0", "large", True),
    ]
    assert decision.candidates[0].figures == {"in_flight": 1.0}
    outcome = decision.outcome
    assert (outcome.kind, outcome.after_s) == (OutcomeKind.ANSWERED, 3.0)
    assert (outcome.num_answers, outcome.num_failed, outcome.compute_s) == (2, 1, 1.5)


def test_every_failure_stands_with_its_own_try() -> None:
    steps = story(
        asked("small-0"),
        failed("small-0"),
        asked("small-0", attempt=2, purpose="retry"),
        failed("small-0", attempt=2, given_up=True),
    )
    outcomes = [decision.outcome for decision in decisions(steps)]
    assert [outcome.given_up for outcome in outcomes] == [False, True]
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.FAILED}
    assert {outcome.message for outcome in outcomes} == {"EngineError: [no] memory"}


def test_a_lost_worker_is_the_outcome_of_what_it_was_at() -> None:
    steps = story(asked("small-0"), asked("large-0"), HostLost("small-0", ("small",), "was lost"))
    assert [d.outcome.kind for d in decisions(steps)] == [OutcomeKind.LOST, OutcomeKind.OPEN]
    assert news(steps) == []


def test_answers_of_a_worker_that_was_taken_for_lost_count() -> None:
    steps = story(asked("small-0"), HostLost("small-0", ("small",), "silent"), answered("small-0"))
    (decision,) = decisions(steps)
    assert decision.outcome.kind is OutcomeKind.ANSWERED
    assert decision.outcome.message == "after it was taken for lost: silent"


def test_who_is_overtaken_is_told_by_whom() -> None:
    steps = story(
        asked("small-0"),
        asked("small-1", purpose="copy"),
        asked("large-0"),
        answered("small-1"),
        PartitionMerged(1, 3, 0),
    )
    slow, copy, other = decisions(steps)
    assert (slow.outcome.kind, slow.outcome.message) == ("overtaken", "small-1 answered first")
    assert copy.why == "it was idle and should finish clearly before the slow one"
    assert (other.outcome.kind, other.outcome.after_s) == ("overtaken", None)
    assert other.outcome.message == "the answers of others were enough"
    assert news(steps) == ["merged from the answers of small: 3 answered, 0 failed"]


def test_news_of_workers_that_were_asked_is_told_until_the_merge() -> None:
    steps = story(
        asked("small-0"),
        failed("small-0"),
        BreakerChanged("small", "small-0", "open", "3 failures"),
        BreakerChanged("small", "small-1", "open", "a worker that was not asked"),
        HostDraining("small-0", ("small",), "it is paused"),
        HostLost("small-0", ("small",), "the worker left"),
        PartitionUndecided(1, 2, 3),
        PartitionMerged(1, 2, 1),
        BreakerChanged("small", "small-0", "closed", "too late to matter"),
    )
    assert news(steps) == [
        "small on small-0, breaker open: 3 failures",
        "small on small-0 is asked nothing further: it is paused",
        "small on small-0: the worker left",
        "2 of 3 records are undecided: one more agent is asked about them",
        "merged: 2 answered, 1 failed",
    ]


def test_a_try_that_met_no_server_was_put_off() -> None:
    away = ServerAway(1, "small", "small-0", "http://x/v1: refused", 0.0, 1.0, 600.0)
    first, second = decisions(
        story(asked("small-0"), away, asked("small-0", purpose="probe"), answered("small-0"))
    )
    assert (first.outcome.kind, first.outcome.message) == ("put off", "http://x/v1: refused")
    assert second.outcome.kind == "answered"


def test_a_policy_of_another_version_is_named() -> None:
    (decision,) = decisions(story(asked("small-0", policy="by-horoscope")))
    assert decision.why == "by-horoscope"


def test_events_of_an_older_version_are_refused_by_name() -> None:
    told = Story(1, "20250101T000000", START)
    facts = {"partition": 1, "agent_id": "a", "worker": "a-0", "attempt": 1, "candidates": {}}
    with pytest.raises(RunError, match="PartitionAsked has no 'purpose'; an older version"):
        told.take(LoggedEvent(START, "20250101T000000", "PartitionAsked", facts))


# A run's files


def test_executions_are_told_apart_and_idle_ones_left_out(staged: Store) -> None:
    log(staged, READY[0], asked("small-0"))
    log(staged, READY[0], asked("small-0", partition=2))
    log(staged, READY[2], asked("large-0"), answered("large-0"), PartitionMerged(1, 3, 0))
    told = explain(staged, 1)
    assert (told.num_executions, len(told.executions)) == (3, 2)
    (killed,), (decision, _) = (execution.steps for execution in told.executions)
    assert isinstance(killed, Decision)
    assert killed.outcome.kind is OutcomeKind.OPEN
    assert isinstance(decision, Decision)
    assert decision.candidates[0].agent_id == "large"
    assert (told.first_record, told.num_records, told.num_partitions) == (3, 3, 7)


def test_what_a_killed_process_could_not_log_is_said(staged: Store) -> None:
    log(staged, READY[0], asked("small-0"))
    for name in (answers_name(1, "small"), results_name(1)):
        staged.commit(name, b"")
    told = explain(staged, 1)
    assert told.answered_by == ("small",)
    assert told.is_merged
    assert len(told.problems) == 2
    assert "answers of small are committed, but no event" in told.problems[0]
    assert "no event tells of the merge" in told.problems[1]


def test_a_partition_that_nobody_was_asked_about_has_no_steps(staged: Store) -> None:
    log(staged, *READY)
    told = explain(staged, 6)
    assert told.executions == told.answered_by == told.problems == ()
    assert "not merged; no answers are committed" in screen(told, 80)


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_and_shows_what_was_decided(staged: Store, width: int) -> None:
    figures = {"in_flight": 1.0, "in_flight_tokens": 2340.0, "tokens_per_s": 0.0, "mood": 0.5}
    many = {f"small-{i}": figures for i in range(40)}
    log(
        staged,
        *READY,
        asked("small-1", candidates=many, num_busy=3),
        failed("small-1"),
        asked("small-0", attempt=2, purpose="retry"),
        answered("small-0"),
        PartitionMerged(1, 2, 1),
    )
    text = " ".join(screen(explain(staged, 1), width).split())
    assert "partition 1 (0 to 6): records 4 to 6, about" in text
    assert "asked small on small-1 (attempt 1, answer)" in text
    assert "among 40 free workers, 3 busy" in text
    assert "worker agent in flight tokens tok/s mood" in text, (
        "also what is added to the events later"
    )
    assert "→ small-1 small 1 2,340 – 0.5" in text, "the chosen one leads and is marked"
    assert "small-10" not in text
    assert "30 more" in text
    assert "EngineError: [no] memory" in text, "a message is not markup"
    assert "(attempt 2, retry after a failure)" in text
    assert "the only free worker, 1 busy: least-loaded had no choice" in text
    assert "(1.50 s of model time): 2 answers, 1 failed" in text
    assert "merged from the answers of small: 2 answered, 1 failed" in text


# The command


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["explain", *arguments])
    return result.exit_code, result.output


def test_the_command_refuses_in_one_line(staged: Store, tmp_path: Path) -> None:
    run = staged.url
    for arguments, words in {
        (str(tmp_path / "nowhere"), "0"): "no plan.parquet; this is not a run folder",
        (run, "7"): "no partition 7; allowed: 0 to 6",
        (run, "0"): "events: no events are kept: the run has not asked an agent yet, or an older",
        (run, "--record", "r20"): "none of its 20 records has the id 'r20'",
    }.items():
        exit_code, output = call(*arguments)
        assert exit_code == 1
        assert words in output
        assert len(output.splitlines()) == 1
    for wrong in ((run,), (run, "1", "--record", "r1")):
        exit_code, output = call(*wrong)
        assert exit_code == 2
        assert "give either PARTITION or --record ID" in output


def test_a_run_that_is_not_staged_yet_says_so(make_job: MakeJob, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    write_job(store, make_job())
    with pytest.raises(RunError, match="its corpus is not staged yet"):
        explain(store, 0)


def test_a_real_run_is_explained_by_partition_and_by_record(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(
        agents=[
            {"name": "strong", "model": "echo:s", "options": {"faults": {"number 4 ": "error"}}},
            {"name": "weak", "model": "echo:w", "capabilities": ["summarize", "weak"]},
        ]
    )
    summary = pipeline.run(job, client=cluster_client)
    told = explain(Store(summary.run), 1)
    assert told.is_merged
    assert told.answered_by == ("strong", "weak")
    assert told.problems == ()
    (execution,) = told.executions
    asked_about = {d.agent_id: d for d in decisions(execution.steps)}
    assert asked_about.keys() == {"strong", "weak"}
    for decision in asked_about.values():
        assert decision.outcome.kind is OutcomeKind.ANSWERED
        assert [c.worker for c in decision.candidates if c.chosen] == [decision.worker]
        assert {c.agent_id for c in decision.candidates} <= asked_about.keys()
        assert decision.policy == "least-loaded"
    assert asked_about["strong"].outcome.num_failed == 1
    assert isinstance(execution.steps[-1], News)
    assert execution.steps[-1].event == "PartitionMerged"
    exit_code, output = call(summary.run, "--record", "r4", "--json")
    assert exit_code == 0
    assert json.loads(output) == to_json(told)
    exit_code, output = call(summary.run, "1")
    assert exit_code == 0
    assert "asked strong on strong-0" in output


def test_an_object_store_is_explained_too(s3_options: dict[str, Any], staged: Store) -> None:
    remote = Store("s3://bucket/runs/x", s3_options)
    for name in ("plan.parquet", *(staged_name(i) for i in range(7))):
        remote.commit(name, staged.read_bytes(name))
    log(remote, READY[0], asked("small-0"), answered("small-0"))
    assert find_record(remote, "r19") == 6
    told = explain(remote, 1)
    assert [d.outcome.kind for d in decisions(told.executions[0].steps)] == [OutcomeKind.ANSWERED]
