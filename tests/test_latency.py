"""The ledger: seconds that add up, and sketches of them that merge in any order."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.corpus import CorpusReader
from mas_batch.errors import RunError
from mas_batch.events import Event, PhaseEnded
from mas_batch.job import Job
from mas_batch.latency import phases
from mas_batch.records import LEDGER
from mas_batch.run_folder.read import Run, read_ledger
from tests.waiting import wait_until

MakeJob = Callable[..., Job]

# --- On a run

NUM_BATCHES = 10
REST_S = {"strong": 0.2, "weak": 0.15}
"""Agent to the seconds that its engine rests in every batch, at least."""
PARTS_OF_TASKS = ("read_s", "write_s", "compute_s", "wait_s", "process_s")


def run_slowly(
    client: Client, make_job: MakeJob, **changes: Any
) -> tuple[float, list[PhaseEnded], Run]:
    """Run a job whose agents rest in every batch; return its wall time, phases and folder."""
    ended: list[PhaseEnded] = []

    def emit(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            ended.append(event)

    agents = [
        {"name": name, "model": f"echo:{name}", "options": {"seconds_per_batch": rest_s}}
        for name, rest_s in REST_S.items()
    ]
    job = make_job(agents=agents, partition={"max_records": 2}, **changes)
    summary = pipeline.run(job, client=client, emit=emit)
    return summary.wall_s, ended, mas_batch.open_run(summary.run)


def total(table: pa.Table, *columns: str) -> float:
    return float(sum(pc.sum(table[column]).as_py() or 0.0 for column in columns))


def test_the_parts_add_up_to_the_wall_time(cluster_client: Client, make_job: MakeJob) -> None:
    start = time.perf_counter()
    wall_s, ended, run = run_slowly(cluster_client, make_job)
    whole_s = time.perf_counter() - start
    ledger = run.ledger()
    assert ledger.schema == LEDGER
    # The submitting process: each of its phases begins where the one before it ends.
    assert {event.phase for event in ended} == set(phases.ALL) - {phases.LEARNING}
    ends = accumulate(event.wall_s for event in ended)
    assert [event.at_s for event in ended] == pytest.approx([0.0, *ends][:-1])
    in_phases = ledger.filter(pc.is_in(ledger["stage"], pa.array(phases.ALL)))
    assert set(in_phases["stage"].to_pylist()) == {event.phase for event in ended}
    assert total(in_phases, "wall_s") == pytest.approx(sum(event.wall_s for event in ended))
    assert total(in_phases, "wall_s") <= wall_s <= whole_s
    # A host: what its engine did and the pauses between follow one another.
    answers = ledger.filter(pc.equal(ledger["stage"], "answer"))
    for agent_id, rest_s in REST_S.items():
        own = answers.filter(pc.equal(answers["agent_id"], agent_id))
        assert own.num_rows == NUM_BATCHES
        assert NUM_BATCHES * rest_s <= total(own, "compute_s")
        assert total(own, "compute_s", "idle_s") <= whole_s
    # A partition: what its task did and how long it waited, from asking to hearing.
    for row in answers.to_pylist():
        parts_s = sum(row[part] for part in (*PARTS_OF_TASKS, "queue_s"))
        assert parts_s == pytest.approx(row["wall_s"])
        assert row["compute_s"] >= REST_S[row["agent_id"]]
    assert pc.min(answers["peak_memory_bytes"]).as_py() > 20_000_000


def test_dasks_own_timings_hold_ours(cluster_client: Client, make_job: MakeJob) -> None:
    """Whatever the load: what a task measures of itself happens within what Dask measures."""
    from distributed import get_task_stream

    with get_task_stream(cluster_client) as stream:
        _, _, run = run_slowly(cluster_client, make_job)
    in_dask = [
        each["stop"] - each["start"]
        for task in stream.data
        if task["key"].startswith("answer_partition")
        for each in task["startstops"]
        if each["action"] == "compute"
    ]
    # Not all: we let go of a task when it has reported, and Dask forgets it if that is first.
    assert 0 < len(in_dask) <= len(REST_S) * NUM_BATCHES
    ours = sorted(
        sum(row[part] for part in PARTS_OF_TASKS)
        for row in run.ledger().to_pylist()
        if row["stage"] == "answer"
    )
    # Each of Dask's has one of ours within it: the n shortest of ours fit into the n of Dask's.
    for own_s, seconds in zip(ours, sorted(in_dask), strict=False):
        assert min(REST_S.values()) <= own_s <= seconds + 0.01, "by two clocks"


def test_fine_performance_metrics_know_the_parts(cluster_client: Client, make_job: MakeJob) -> None:
    """Not all of every task: Dask drops what a task took that we let go of before it has ended."""
    run_slowly(cluster_client, make_job, merge={"method": "vote"})

    def known(dask_scheduler: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for key, value in dask_scheduler.cumulative_worker_metrics.items():
            if isinstance(key, tuple) and str(key[-2]).startswith("mas-batch-"):
                found[key[-2]] = found.get(key[-2], 0.0) + value
        return found

    parts = {"mas-batch-compute", "mas-batch-read", "mas-batch-write"}
    # They come with the workers' heartbeats.
    wait_until(lambda: parts <= cluster_client.run_on_scheduler(known).keys())
    assert cluster_client.run_on_scheduler(known)["mas-batch-compute"] >= min(REST_S.values())


def test_the_manifest_says_where_the_time_went(cluster_client: Client, make_job: MakeJob) -> None:
    wall_s, _, run = run_slowly(cluster_client, make_job, merge={"method": "reliability"})
    latency = run.manifest["latency"]
    assert phases.LEARNING in latency["phases"]
    assert phases.PUBLISHING not in latency["phases"]  # it is not over
    assert latency["wall_s"] == pytest.approx(sum(latency["phases"].values()))
    assert latency["wall_s"] <= wall_s
    hosts = latency["hosts"]
    assert hosts["num"] == 2
    assert hosts["compute_s"] >= NUM_BATCHES * sum(REST_S.values())
    answers = run.ledger().filter(pc.equal(run.ledger()["stage"], "answer"))
    assert answers["cached_tokens"].null_count == len(answers), "echo cannot tell"
    tokens = {"prompt_tokens": total(answers, "prompt_tokens"), "cached_tokens": None}
    assert latency["tokens"] == tokens
    assert hosts["compute_s"] == pytest.approx(total(answers, "compute_s"))
    rows = {(row["agent_id"], row["part"]): row for row in latency["per_record"]}
    shortest_s = REST_S["strong"] / 2  # two to a batch
    assert rows["strong", "compute"]["p50_s"] >= shortest_s * 0.98, "a sketch's figure"
    assert rows["weak", "total"]["count"] == 20
    tasks = {(row["stage"], row["agent_id"]): row for row in latency["per_partition"]}
    assert tasks["answer", "strong"]["wall"]["p50_s"] >= REST_S["strong"] * 0.98
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
