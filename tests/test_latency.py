"""The ledger: seconds that add up, and sketches of them that merge in any order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.corpus import CorpusReader
from mas_batch.errors import RunError
from mas_batch.events import AgentReady, Event, PartitionAnswered
from mas_batch.job import Job
from mas_batch.latency import phases
from mas_batch.records import LEDGER
from mas_batch.run_folder.read import Run, read_ledger

MakeJob = Callable[..., Job]

# --- On a run

PARTS_OF_TASKS = ("read_s", "write_s", "compute_s", "process_s")


class Heard:
    """When this process heard of what."""

    def __init__(self) -> None:
        self.ready: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        match event:
            case AgentReady():
                self.ready[event.worker] = now
            case PartitionAnswered():
                self.last[event.worker] = now


def run_slowly(client: Client, make_job: MakeJob, **changes: Any) -> tuple[Heard, Run]:
    heard = Heard()
    agents = [
        {"name": "strong", "model": "echo:s", "options": {"seconds_per_batch": 0.2}},
        {"name": "weak", "model": "echo:w", "options": {"seconds_per_batch": 0.15}},
    ]
    job = make_job(agents=agents, partition={"max_records": 2}, **changes)
    summary = pipeline.run(job, client=client, emit=heard)
    heard.seconds["wall"] = summary.wall_s
    return heard, mas_batch.open_run(summary.run)


def total(table: pa.Table, *columns: str) -> float:
    return float(sum(pc.sum(table[column]).as_py() or 0.0 for column in columns))


def test_the_parts_add_up_to_the_wall_time(cluster_client: Client, make_job: MakeJob) -> None:
    heard, run = run_slowly(cluster_client, make_job)
    ledger = run.ledger()
    assert ledger.schema == LEDGER
    # The submitting process: its phases, against a clock of its own.
    in_phases = ledger.filter(pc.is_in(ledger["stage"], pa.array(phases.ALL)))
    assert total(in_phases, "wall_s") == pytest.approx(heard.seconds["wall"], rel=0.02)
    assert set(in_phases["stage"].to_pylist()) == set(phases.ALL) - {phases.LEARNING}
    # A replica: all that it did and the pauses between, against when we heard of it.
    answers = ledger.filter(pc.equal(ledger["stage"], "answer"))
    for worker, ready in heard.ready.items():
        own = answers.filter(pc.equal(answers["worker"], worker))
        assert own.num_rows == 10
        assert total(own, *PARTS_OF_TASKS, "idle_s") == pytest.approx(
            heard.last[worker] - ready, rel=0.02, abs=0.06
        )
    # A partition: what its task did and how long it waited, against asking and hearing.
    for row in answers.to_pylist():
        parts_s = sum(row[part] for part in (*PARTS_OF_TASKS, "queue_s"))
        assert parts_s == pytest.approx(row["wall_s"], rel=0.02)
    assert pc.min(answers["peak_memory_bytes"]).as_py() > 20_000_000
    assert total(answers, "compute_s") == pytest.approx(10 * 0.2 + 10 * 0.15, rel=0.05)


def test_dasks_own_timings_say_the_same(cluster_client: Client, make_job: MakeJob) -> None:
    from distributed import get_task_stream

    with get_task_stream(cluster_client) as stream:
        _, run = run_slowly(cluster_client, make_job)
    in_dask = [
        each["stop"] - each["start"]
        for task in stream.data
        if task["key"].startswith("answer_partition")
        for each in task["startstops"]
        if each["action"] == "compute"
    ]
    # Not all: we let go of a task when it has reported, and Dask forgets it if that is first.
    assert in_dask
    ours = [
        sum(row[part] for part in PARTS_OF_TASKS)
        for row in run.ledger().to_pylist()
        if row["stage"] == "answer"
    ]
    for seconds in in_dask:
        nearest = min(ours, key=lambda our, seconds=seconds: abs(our - seconds))
        assert seconds == pytest.approx(nearest, rel=0.02, abs=0.005)


def test_fine_performance_metrics_know_the_parts(cluster_client: Client, make_job: MakeJob) -> None:
    _, run = run_slowly(cluster_client, make_job, merge={"method": "vote"})

    def known(dask_scheduler: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for key, value in dask_scheduler.cumulative_worker_metrics.items():
            if isinstance(key, tuple) and str(key[-2]).startswith("mas-batch-"):
                found[key[-2]] = found.get(key[-2], 0.0) + value
        return found

    deadline = time.monotonic() + 20
    wanted = total(run.ledger(), "compute_s")
    while (found := cluster_client.run_on_scheduler(known)).get("mas-batch-compute", 0) < wanted:
        assert time.monotonic() < deadline, found  # they come with the workers' heartbeats
        time.sleep(0.1)
    assert {"mas-batch-read", "mas-batch-write"} <= found.keys()


def test_the_manifest_says_where_the_time_went(cluster_client: Client, make_job: MakeJob) -> None:
    heard, run = run_slowly(cluster_client, make_job, merge={"method": "reliability"})
    latency = run.manifest["latency"]
    assert phases.LEARNING in latency["phases"]
    assert phases.PUBLISHING not in latency["phases"]  # it is not over
    assert latency["wall_s"] == pytest.approx(heard.seconds["wall"], rel=0.1)
    replicas = latency["replicas"]
    assert replicas["num"] == 2
    assert replicas["compute_s"] == pytest.approx(3.5, rel=0.05)
    rows = {(row["agent_id"], row["part"]): row for row in latency["per_record"]}
    assert rows["strong", "compute"]["p50_s"] == pytest.approx(0.1, rel=0.1)  # two to a batch
    assert rows["weak", "total"]["count"] == 20
    tasks = {(row["stage"], row["agent_id"]): row for row in latency["per_partition"]}
    assert tasks["answer", "strong"]["wall"]["p50_s"] >= 0.2
    assert tasks["merge", None]["count"] == 10


def test_a_failed_try_is_in_the_ledger(cluster_client: Client, make_job: MakeJob) -> None:
    agents = [
        {"name": "strong", "model": "echo:s", "options": {"fail_after": 2}},
        {"name": "weak", "model": "echo:w"},
    ]
    job = make_job(agents=agents, partition={"max_records": 4}, routing={"max_attempts": 1})
    with pytest.raises(RunError):
        pipeline.run(job, client=cluster_client)
    store, _ = pipeline.open_store(job, CorpusReader(job.corpus))
    ledger = read_ledger(store)  # kept although the run has failed
    failed = ledger.filter(pc.equal(ledger["stage"], "failed answer"))
    assert failed.num_rows > 0
    assert set(failed["agent_id"].to_pylist()) == {"strong"}
