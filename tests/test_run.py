"""The whole path of a record, on one in-process cluster with unlike agents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.aggregate.reductions import RUN_STATISTICS, Reduction
from mas_batch.aggregate.tree import tree_reduce
from mas_batch.errors import ExitCode, JobError, ModelError, RunError
from mas_batch.events import (
    AnswerFailed,
    Event,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    RunStarted,
)
from mas_batch.job import Job
from mas_batch.run_folder.manifest import write_job

MakeJob = Callable[..., Job]


class Recorder:
    """Keeps a run's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_every_record_comes_out_once_in_order_with_its_columns(
    cluster_client: Client, make_job: MakeJob
) -> None:
    rows = [
        {"id": f"r{i}", "text": f"some words about {i}", "lang": "en", "n": i} for i in range(20)
    ]
    events = Recorder()
    summary = pipeline.run(make_job(rows), client=cluster_client, emit=events)
    run = mas_batch.open_run(summary.run)
    results = run.pandas()
    assert list(results["record_id"]) == [row["id"] for row in rows]
    assert list(results["n"]) == list(range(20))
    assert results["n"].dtype == "int64"
    assert set(results["lang"]) == {"en"}
    assert list(results["text"]) == [row["text"] for row in rows]
    assert set(results["num_answers"]) == {2}
    answers = run.pandas("answers")
    assert len(answers) == 40
    assert dict(answers.groupby("agent_id")["worker"].first()) == {
        "strong": "strong-0",
        "weak": "weak-0",
    }
    assert summary.exit_code == ExitCode.ANSWERED
    assert run.manifest["counts"]["results"] == 20
    assert len(run.dask().compute()) == 20
    assert {event.worker for event in events.of(PartitionAsked)} == {"strong-0", "weak-0"}
    assert sum(event.num_results for event in events.of(PartitionMerged)) == 20


def test_bad_records_become_failures_and_their_neighbours_are_answered(
    cluster_client: Client, make_job: MakeJob
) -> None:
    rows = [
        {"id": "good", "text": "a fine text"},
        {"id": "empty", "text": ""},
        {"id": "blank", "text": " \u200b\n"},
        {"id": "nul", "text": "a\0b"},
        {"id": "null", "text": None},
        {"id": "number", "text": 7},
        {"id": "surrogate", "text": "\ud800"},
        {"id": "boom", "text": "this one breaks the engine"},
        {"id": "mute", "text": "this one gets no readable answer"},
        {"id": "also-good", "text": "another text"},
    ]
    faults = {"breaks the engine": "error", "no readable answer": "unparsable"}
    agents = [
        {"name": "strong", "model": "echo", "options": {"faults": faults, "labels": ["x", "y"]}}
    ]
    job = make_job(
        rows,
        agents=agents,
        task={"kind": "classify", "labels": ["x", "y"]},
        partition={"max_records": 100},
    )
    summary = pipeline.run(job, client=cluster_client)
    run = mas_batch.open_run(summary.run)
    failures = {
        row["record_id"]: (row["stage"], row["reason"]) for row in run.arrow("failures").to_pylist()
    }
    assert failures == {
        "empty": ("corpus", "empty"),
        "blank": ("corpus", "whitespace"),
        "nul": ("corpus", "nul_character"),
        "null": ("corpus", "missing_text"),
        "number": ("corpus", "not_text"),
        "surrogate": ("corpus", "invalid_utf8"),
        "boom": ("answer", "engine_error"),
        "mute": ("parse", "unparsable_answer"),
    }
    assert list(run.pandas()["record_id"]) == ["good", "also-good"]
    assert summary.exit_code == ExitCode.TOO_MANY_FAILED_RECORDS
    assert run.manifest["counts"]["failures_by_reason"]["engine_error"] == 1


def test_one_agents_failure_costs_no_record(cluster_client: Client, make_job: MakeJob) -> None:
    job = make_job(
        agents=[
            {"name": "strong", "model": "echo:s", "options": {"faults": {"number 7": "error"}}},
            {"name": "weak", "model": "echo:w"},
        ]
    )
    run = mas_batch.open_run(pipeline.run(job, client=cluster_client).run)
    results = run.pandas().set_index("record_id")
    assert len(results) == 20
    assert results.loc["r7", "num_answers"] == 1
    assert results.loc["r8", "num_answers"] == 2


def test_only_missing_work_is_done_again(cluster_client: Client, make_job: MakeJob) -> None:
    job = make_job()
    first = pipeline.run(job, client=cluster_client)
    folder = Path(first.run)
    before = {p: p.stat().st_ino for p in folder.rglob("part-*.parquet")}
    bytes_before = {p.name: p.read_bytes() for p in (folder / "results").iterdir()}
    (folder / "manifest.json").unlink()
    (folder / "results/part-000002.parquet").unlink()
    (folder / "results/part-000004.parquet").unlink()
    (folder / "answers/agent=weak/part-000004.parquet").unlink()
    events = Recorder()
    again = pipeline.run(job, client=cluster_client, emit=events)
    assert again.run == first.run
    assert [(e.partition, e.agent_id) for e in events.of(PartitionAnswered)] == [(4, "weak")]
    assert sorted(e.partition for e in events.of(PartitionMerged)) == [2, 4]
    (started,) = events.of(RunStarted)
    assert (started.partitions_done, started.answers_done) == (5, 3)
    kept = {p for p in before if p.exists() and p.stat().st_ino == before[p]}
    assert len(before) - len(kept) <= 3
    assert {p.name: p.read_bytes() for p in (folder / "results").iterdir()} == bytes_before


def test_a_complete_run_starts_nothing(cluster_client: Client, make_job: MakeJob) -> None:
    first = pipeline.run(make_job(), client=cluster_client)
    events = Recorder()
    second = pipeline.run(make_job(), emit=events)  # no client: would have to start a cluster
    assert second.already_complete
    assert second.manifest == first.manifest
    assert events.events == []


def test_a_client_that_is_active_in_the_process_is_used_and_left_open(
    cluster_client: Client, make_job: MakeJob
) -> None:
    summary = pipeline.run(make_job())
    answers = mas_batch.open_run(summary.run).pandas("answers")
    assert set(answers["worker"]) == {"strong-0", "weak-0"}
    assert cluster_client.status == "running"


def test_what_a_killed_writer_left_is_collected(cluster_client: Client, make_job: MakeJob) -> None:
    job = make_job()
    store, _ = pipeline.open_store(job, pipeline.CorpusReader(job.corpus))
    orphan = Path(store.url) / "results/.tmp-dead"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half")
    pipeline.run(job, client=cluster_client)
    assert not orphan.exists()


def test_a_changed_job_or_corpus_is_a_new_run_and_says_so(
    cluster_client: Client, make_job: MakeJob
) -> None:
    first = pipeline.run(make_job(), client=cluster_client)
    events = Recorder()
    changed = make_job(task={"kind": "summarize", "max_new_tokens": 3})
    second = pipeline.run(changed, client=cluster_client, emit=events)
    assert second.run != first.run
    assert events.of(RunStarted)[0].earlier_runs == (Path(first.run).name,)
    third = pipeline.run(make_job([{"id": "x", "text": "new"}]), client=cluster_client)
    assert len({first.run, second.run, third.run}) == 3


def test_the_merged_answers_do_not_depend_on_the_partitions(
    cluster_client: Client, make_job: MakeJob
) -> None:
    tables = []
    for max_records in (1, 4, 100):
        summary = pipeline.run(
            make_job(partition={"max_records": max_records}), client=cluster_client
        )
        tables.append(mas_batch.open_run(summary.run).arrow())
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_fewer_answers_than_agents_are_shared_among_them(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(
        routing={"answers_per_record": 1, "speculate": False}, partition={"max_records": 1}
    )
    run = mas_batch.open_run(pipeline.run(job, client=cluster_client).run)
    answers = run.pandas("answers")
    assert len(answers) == 20
    assert set(answers["agent_id"]) == {"strong", "weak"}


def test_a_capability_that_nobody_has_fails_before_the_first_task(
    cluster_client: Client, make_job: MakeJob
) -> None:
    agents = [{"name": "a", "model": "echo", "resources": {"TPU": 2}}]
    job = make_job(agents=agents, cluster={"wait_s": 0.5})
    events = Recorder()
    with pytest.raises(JobError) as caught:
        pipeline.run(job, client=cluster_client, emit=events)
    assert "TPU=2" in str(caught.value)
    assert "strong-0" in str(caught.value)
    assert events.of(PartitionAsked) == []


def test_a_model_that_cannot_be_loaded_fails_before_the_first_partition(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=[{"name": "a", "model": "echo", "options": {"fail_to_load": True}}])
    events = Recorder()
    with pytest.raises(ModelError):
        pipeline.run(job, client=cluster_client, emit=events)
    assert events.of(PartitionAsked) == []


def test_an_agent_that_fails_on_everything_fails_the_run_and_once_mended_it_resumes(
    cluster_client: Client, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken worker or a wrong key must not become a result."""

    def break_down(*args: object) -> None:
        raise OSError("the disk is gone")

    events = Recorder()
    job = make_job(routing={"max_attempts": 2})
    with monkeypatch.context() as patch:
        patch.setattr("mas_batch.agents.work.answer_records", break_down)  # workers are in-process
        with pytest.raises(RunError, match="failed on all that it was asked lately: OSError"):
            pipeline.run(job, client=cluster_client, emit=events)
    failed = events.of(AnswerFailed)
    assert [e.given_up for e in failed if (e.partition, e.agent_id) == (0, "weak")] == [False, True]
    assert events.of(PartitionMerged) == []
    summary = pipeline.run(job, client=cluster_client)
    assert len(mas_batch.open_run(summary.run).arrow()) == 20


def test_an_engine_that_fails_on_a_whole_partition_is_not_the_records_fault(
    cluster_client: Client, make_job: MakeJob
) -> None:
    faults = {f"number {i} ": "error" for i in range(3)}  # all of partition 0
    agents = [
        {"name": "strong", "model": "echo:s", "options": {"faults": faults}},
        {"name": "weak", "model": "echo:w"},
    ]
    events = Recorder()
    summary = pipeline.run(make_job(agents=agents), client=cluster_client, emit=events)
    assert [(e.partition, e.attempt) for e in events.of(AnswerFailed)] == [(0, 1), (0, 2), (0, 3)]
    answered = mas_batch.open_run(summary.run).pandas()
    assert list(answered["num_answers"]) == [1] * 3 + [2] * 17


def test_a_merge_that_does_not_fit_the_task_is_refused_before_anything_is_read(
    cluster_client: Client, make_job: MakeJob
) -> None:
    agents = [{"name": "a", "model": "echo"}]
    job = make_job(agents=agents, task={"kind": "score"}, merge={"method": "mbr"})
    for start in (pipeline.preview, pipeline.run):
        with pytest.raises(JobError, match=r"merge\.method"):
            start(job)
    assert not Path(job.output.path).exists()


def test_what_an_endpoint_is_told_and_storage_options_stay_out_of_the_run(
    make_job: MakeJob,
) -> None:
    job = make_job(output={"path": make_job().output.path, "storage_options": {"auto_mkdir": True}})
    agent = job.agents[0].model_copy(update={"options": {"extra_body": {"key": "CANARY"}}})
    job = job.model_copy(update={"agents": (agent,)})
    store, _ = pipeline.open_store(job, pipeline.CorpusReader(job.corpus))
    write_job(store, job)
    kept = store.read_bytes("job.yaml")
    assert b"CANARY" not in kept
    assert b"auto_mkdir" not in kept
    assert "CANARY" not in repr(job)


def test_a_run_works_on_object_storage(
    cluster_client: Client, make_job: MakeJob, s3_options: dict[str, Any]
) -> None:
    job = make_job(output={"path": "s3://bucket/runs", "storage_options": s3_options})
    summary = pipeline.run(job, client=cluster_client)
    run = mas_batch.open_run(summary.run, s3_options)
    assert run.pandas()["record_id"].is_unique
    assert len(run.arrow("answers")) == 40
    kept = run.store.read_bytes("job.yaml") + run.store.read_bytes("manifest.json")
    assert b"secret" not in kept


def test_an_unfinished_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no manifest\.json"):
        mas_batch.open_run(str(tmp_path))


def test_events_are_kept_in_the_run(cluster_client: Client, make_job: MakeJob) -> None:
    summary = pipeline.run(make_job(), client=cluster_client)
    (file,) = (Path(summary.run) / "events").iterdir()
    kinds = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert next(kind for kind in kinds if kind != "PhaseEnded") == "RunStarted"
    assert kinds[-1] == "RunFinished"
    assert kinds.count("PartitionAsked") == 14


@pytest.mark.parametrize("split_every", [2, 3, 8])
@pytest.mark.parametrize("num_leaves", [0, 1, 2, 9, 30])
def test_the_tree_adds_up_whatever_its_shape(
    cluster_client: Client, split_every: int, num_leaves: int
) -> None:
    reduction = Reduction("sum", lambda: {}, lambda parts: {"n": sum(p["n"] for p in parts)}, dict)
    result = tree_reduce(
        cluster_client,
        lambda n: {"n": n},
        ((n,) for n in range(num_leaves)),
        reduction,
        wait_s=60,
        split_every=split_every,
        max_in_flight=4,
    )
    assert result == ({"n": sum(range(num_leaves))} if num_leaves else None)


def test_statistics_of_nothing_are_zero() -> None:
    assert RUN_STATISTICS.finalize(RUN_STATISTICS.combine([]))["results"] == 0
