"""Routing on a real cluster in this process: adaptive answers, workers that come and go."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, SpecCluster, Worker

import mas_batch
from mas_batch import pipeline
from mas_batch.agents import host, work
from mas_batch.dask_compat import forget_collections
from mas_batch.errors import JobError, ModelError, OutputError, RunError
from mas_batch.events import (
    AnswerFailed,
    Event,
    HostDraining,
    HostLost,
    HostReady,
    HostsScaled,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
)
from mas_batch.job import Job
from mas_batch.models import ModelFiles, fetch
from mas_batch.routing import upkeep
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from mas_batch.show import answers_saved
from tests.clusters import cluster_of
from tests.test_run import Recorder
from tests.waiting import PATIENCE_S, wait_until

MakeJob = Callable[..., Job]
LABELS = ["x", "y", "z"]


def labelling(error_rates: dict[str, float]) -> dict[str, Any]:
    """Sections of a job of agents that label, some of them often wrong."""
    return {
        "task": {"kind": "classify", "labels": LABELS},
        "agents": [
            {
                "name": name,
                "model": f"echo:{name}",
                "options": {"labels": LABELS, "error_rate": rate},
            }
            for name, rate in error_rates.items()
        ],
        "merge": {"method": "vote"},
    }


def contents(run: Run) -> dict[str, bytes]:
    names = [*run.files("results"), *run.files("failures")]
    return {name: run.store.read_bytes(name) for name in names}


@pytest.fixture
def worker_spec() -> dict[str, Any]:
    return {"cls": Worker, "options": {"nthreads": 3, "resources": {"summarize": 1}}}


@pytest.fixture
def elastic(worker_spec: dict[str, Any]) -> Iterator[SpecCluster]:
    """A cluster of one worker, to which others may be added."""
    with cluster_of({"w-0": worker_spec}) as cluster:
        yield cluster


class Elastic:
    """Adds and takes away workers as the router wants; what a user's scaler would do."""

    def __init__(self, cluster: SpecCluster, spec: dict[str, Any]) -> None:
        self.cluster, self.spec = cluster, spec
        self.retired: list[str] = []

    def scale(self, wanted: Any, retire: Any) -> None:
        spec = self.cluster.worker_spec
        for name in retire:
            self.retired.append(name)
            spec.pop(name, None)
        number = 0
        while len(spec) < sum(wanted.values()):
            spec.setdefault(f"w-{number}", self.spec)
            number += 1
        self.cluster.scale(len(spec))


def test_adaptive_asks_less_and_the_votes_come_out_the_same(
    cluster_client: Client, make_job: MakeJob
) -> None:
    rows = [{"id": f"r{i}", "text": f"some words about {i}"} for i in range(60)]
    sections = labelling({"a": 0.2, "b": 0.2, "c": 0.2})
    for agent, capability in zip(sections["agents"], ("strong", "weak"), strict=False):
        agent["capabilities"] = ["classify", capability]
    sections["agents"][2]["capabilities"] = ["classify"]
    sections["agents"] = sections["agents"][:2]
    fixed = mas_batch.open_run(pipeline.run(make_job(rows, **sections), client=cluster_client).run)
    events = Recorder()
    routing = {"policy": "capability", "adaptive": {"first": 1, "confidence": 0.6}}
    job = make_job(
        rows,
        **{**sections, "merge": {"method": "weighted", "accuracies": {"a": 0.8, "b": 0.8}}},
        routing=routing,
    )
    adaptive = mas_batch.open_run(pipeline.run(job, client=cluster_client, emit=events).run)
    assert len(adaptive.arrow("answers")) < len(fixed.arrow("answers")) == 120
    assert len(adaptive.arrow()) == 60
    assert [run.manifest["repeatable"] for run in (fixed, adaptive)] == [True, True]


def test_adaptive_looks_at_the_first_answers_and_asks_one_more_where_they_differ(
    elastic: SpecCluster, worker_spec: dict[str, Any], make_job: MakeJob
) -> None:
    rows = [{"id": f"r{i}", "text": f"some words about {i}"} for i in range(60)]
    worker_spec["options"]["resources"] = {"classify": 1}
    sections = labelling({"a": 0.2, "b": 0.2, "c": 0.2})
    elastic.worker_spec.update({f"w-{number}": worker_spec for number in (1, 2, 3)})
    elastic.scale(4)
    with Client(elastic) as client:
        client.wait_for_workers(4)
        fixed = pipeline.run(make_job(rows, **sections), client=client)
        events = Recorder()
        job = make_job(rows, **sections, routing={"adaptive": {"first": 2}})
        adaptive = pipeline.run(job, client=client, emit=events)
    assert adaptive.run != fixed.run, "it decides who is asked, so it is another run"
    assert [summary.manifest["repeatable"] for summary in (fixed, adaptive)] == [True, False]
    expected, found = (mas_batch.open_run(s.run).pandas() for s in (fixed, adaptive))
    assert list(found["answer"]) == list(expected["answer"])
    undecided = sum(event.num_undecided for event in events.of(PartitionUndecided))
    assert 0 < undecided < 60
    assert list(expected["num_answers"]) == [3] * 60
    assert sum(found["num_answers"]) == 120 + undecided
    assert answers_saved(job, adaptive.manifest) == pytest.approx((60 - undecided) / 180, abs=1e-3)
    asked = sum(event.num_records for event in events.of(PartitionAnswered))
    assert asked == 120 + undecided, "the third agent is asked about the undecided records alone"


def test_adaptive_refuses_what_it_cannot_judge(make_job: MakeJob, cluster_client: Client) -> None:
    job = make_job(merge={"method": "mbr"}, routing={"adaptive": {"first": 1}})
    with pytest.raises(JobError, match=r"routing\.adaptive"):
        pipeline.run(job, client=cluster_client)


def test_a_worker_that_appears_under_way_is_used_and_an_idle_one_given_back(
    elastic: SpecCluster, worker_spec: dict[str, Any], make_job: MakeJob
) -> None:
    rows = [{"id": f"r{i}", "text": f"text number {i} of the corpus"} for i in range(60)]
    agents = [
        {
            "name": "w",
            "model": "echo:w",
            "max_count": 3,
            "options": {"seconds_per_batch": 0.4},
        }
    ]
    events = Recorder()
    scaler = Elastic(elastic, worker_spec)
    with Client(elastic) as client:
        pipeline.run(make_job(rows, agents=agents), client=client, scaler=scaler, emit=events)
    assert {event.worker for event in events.of(HostReady)} == {"w-0", "w-1", "w-2"}
    assert {event.worker for event in events.of(PartitionAnswered)} == {"w-0", "w-1", "w-2"}
    assert events.of(HostsScaled)[0].wanted == {"w": 3}


def test_an_agent_without_workers_for_as_long_as_the_job_allows_ends_the_run(
    elastic: SpecCluster, make_job: MakeJob
) -> None:
    def lose_the_worker(event: Event) -> None:
        if isinstance(event, PartitionAnswered):
            elastic.scale(0)

    agents = [{"name": "w", "model": "echo:w", "options": {"seconds_per_batch": 0.2}}]
    job = make_job(agents=agents, cluster={"wait_s": 0.5})
    lost = r"no worker serves agent 'w' for 0\.5 s; what is answered is kept"
    with Client(elastic) as client, pytest.raises(RunError, match=lost):
        pipeline.run(job, client=client, emit=lose_the_worker)


def test_a_worker_that_is_retired_is_drained_and_nothing_is_blamed(
    elastic: SpecCluster, worker_spec: dict[str, Any], make_job: MakeJob
) -> None:
    rows = [{"id": f"r{i}", "text": f"text number {i} of the corpus"} for i in range(45)]
    options = {"seconds_per_batch": 0.2}
    agents = [{"name": "w", "model": "echo:w", "count": 2, "options": options}]
    elastic.worker_spec["w-1"] = worker_spec
    elastic.scale(2)
    events = Recorder()
    with Client(elastic) as client:
        client.wait_for_workers(2)
        busy = next(a for a, w in client.scheduler_info()["workers"].items() if w["name"] == "w-1")

        def retire() -> None:
            while not events.of(PartitionAnswered):
                time.sleep(0.05)
            client.retire_workers([busy])

        thread = threading.Thread(target=retire)
        thread.start()
        summary = pipeline.run(make_job(rows, agents=agents), client=client, emit=events)
        thread.join()
    lost = [event.message for event in [*events.of(HostLost), *events.of(HostDraining)]]
    assert any("the worker left" in message or "closing" in message for message in lost), lost
    assert {event.purpose for event in events.of(PartitionAsked)} <= {"answer", "copy"}
    assert summary.manifest["counts"]["results"] == 45


def test_an_agent_that_cannot_load_is_done_without_where_others_are_enough(
    cluster_client: Client, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [
        {"name": "strong", "model": "echo:s"},
        {"name": "weak", "model": "echo:w", "options": {"fail_to_load": True}},
    ]
    events, lost, answer = Recorder(), threading.Event(), work.answer_records

    def emit(event: Event) -> None:
        events(event)
        if isinstance(event, HostLost):
            lost.set()

    def answer_when_lost(*args: Any) -> Any:
        assert lost.wait(PATIENCE_S), "workers are in this process"
        return answer(*args)

    monkeypatch.setattr(work, "answer_records", answer_when_lost)
    job = make_job(agents=agents, routing={"answers_per_record": 1})
    pipeline.run(job, client=cluster_client, emit=emit)
    assert {event.agent_id for event in events.of(PartitionAnswered)} == {"strong"}
    assert [agent for event in events.of(HostLost) for agent in event.agents] == ["weak"]
    with pytest.raises(ModelError, match=r"agents\.weak: no worker could load echo:w"):
        pipeline.run(make_job(agents=agents), client=cluster_client)


def test_an_output_that_cannot_be_written_is_no_agents_fault(
    cluster_client: Client, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = make_job()
    events = Recorder()

    def emit(event: Event) -> None:
        events(event)
        if isinstance(event, PartitionMerged):  # workers are in this process
            monkeypatch.setattr(Store, "_write_temporary", full)

    with pytest.raises(OutputError, match=r"part-\d+.parquet cannot be written: .*No space left"):
        pipeline.run(job, client=cluster_client, emit=emit)
    assert events.of(AnswerFailed) == []
    monkeypatch.undo()
    assert pipeline.run(job, client=cluster_client).manifest["counts"]["results"] == 20


def test_a_worker_without_a_nanny_that_hangs_is_cut_off(
    elastic: SpecCluster, worker_spec: dict[str, Any], make_job: MakeJob
) -> None:
    """Its sibling does its work; the thread that hangs ends with the test's process."""
    asked: list[str] = []

    def hang_once(*args: Any) -> Any:
        if not asked:
            asked.append(threading.current_thread().name)
            release.wait(PATIENCE_S)
        return answer_records(*args)

    release = threading.Event()
    answer_records = work.answer_records
    elastic.worker_spec["w-1"] = worker_spec
    elastic.scale(2)
    agents = [{"name": "w", "model": "echo:w", "count": 2}]
    events = Recorder()
    with Client(elastic) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "answer_records", hang_once)  # workers are in this process
        client.wait_for_workers(2)
        job = make_job(agents=agents, routing={"timeout_s": 1.0, "speculate": False})
        summary = pipeline.run(job, client=client, emit=events)
        release.set()
    assert summary.manifest["counts"]["results"] == 20
    (draining,) = events.of(HostDraining)
    assert "silent about partition" in draining.message
    assert [event.message for event in events.of(HostLost)] == ["the worker was lost"]
    assert "careful" in {event.purpose for event in events.of(PartitionAsked)}


def test_a_download_that_hangs_is_given_up_and_its_worker_cut_off(
    elastic: SpecCluster, make_job: MakeJob
) -> None:
    release = threading.Event()

    def hang(source: str) -> ModelFiles:
        release.wait(PATIENCE_S)
        return fetch(source)

    events = Recorder()
    agents = [{"name": "w", "model": "echo:w"}]
    job = make_job(agents=agents, routing={"load_timeout_s": 0.5})
    with Client(elastic) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "fetch", hang)  # workers are in this process
        client.wait_for_workers(1)
        (address,) = client.scheduler_info(n_workers=-1)["workers"]
        try:
            with pytest.raises(ModelError, match=r"not loaded within 0\.5 s .*load_timeout_s"):
                pipeline.run(job, client=client, emit=events)
            wait_until(lambda: address not in client.scheduler_info(n_workers=-1)["workers"])
        finally:
            release.set()
    assert [agent for event in events.of(HostLost) for agent in event.agents] == ["w"]


def spans_of(dask_scheduler: Any) -> list[tuple[tuple[str, ...], int]]:
    """Name every span that the scheduler knows, with its number of collections."""
    spans = dask_scheduler.extensions["spans"].spans.values()
    return [(span.name, len((span.metadata or {}).get("collections", []))) for span in spans]


def test_a_run_is_one_span(cluster_client: Client, make_job: MakeJob) -> None:
    before = cluster_client.run_on_scheduler(spans_of)
    summary = pipeline.run(make_job(), client=cluster_client)
    name = summary.manifest["run"]
    new = cluster_client.run_on_scheduler(spans_of)[len(before) :]
    assert [span for span, _ in new] == [(f"mas-batch {name}",)]


def test_upkeep_that_fails_ends_no_run(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidy, calls = upkeep.Upkeep(cluster_client), []

    def fail(function: Any, **arguments: Any) -> None:
        calls.append(function)
        raise AttributeError("this scheduler has no spans")

    monkeypatch.setattr(cluster_client, "run_on_scheduler", fail)
    tidy()
    assert not calls, "it is not time"
    monkeypatch.setattr(upkeep, "EVERY_S", 0.0)
    tidy()
    assert calls == [forget_collections]
