"""Agents that share hosts, on real clusters: one load, one worker, the same answers."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from distributed import Client

from mas_batch import pipeline
from mas_batch.agents import work
from mas_batch.agents.spec import agent_specs
from mas_batch.errors import ModelError
from mas_batch.events import Event, HostLost, HostReady, PartitionAnswered, PartitionAsked
from mas_batch.job import Job
from mas_batch.merging import merge_spec
from mas_batch.routing.hosting import Hosting
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.serving.pool import AgentPool
from tests.clusters import summarizers
from tests.test_run import Recorder
from tests.waiting import PATIENCE_S

MakeJob = Callable[..., Job]
AGENTS: list[dict[str, Any]] = [
    {"name": "plain", "model": "echo:one"},
    {"name": "asked", "model": "echo:one", "prompt": "Say {text}"},
    {"name": "other", "model": "echo:two"},
]


def answers(run: Run) -> list[dict[str, Any]]:
    columns = ["record_id", "agent_id", "family_id", "text"]
    return run.arrow("answers").select(columns).sort_by(
        [("record_id", "ascending"), ("agent_id", "ascending")]
    ).to_pylist()  # fmt: skip


def run_on(client: Client, job: Job) -> tuple[Run, Recorder]:
    events = Recorder()
    summary = pipeline.run(job, client=client, emit=events)
    return open_run(summary.run), events


def test_any_host_of_the_engine_answers_for_its_agents(make_job: MakeJob) -> None:
    with summarizers(2) as client:
        shared, events = run_on(client, make_job(agents=AGENTS))
    hosts = {event.worker: event.agents for event in events.of(HostReady)}
    assert sorted(hosts.values()) == [("other",), ("plain", "asked")]
    for event in events.of(PartitionAnswered):
        assert event.agent_id in hosts[event.worker]
    assert set(shared.manifest["engines"]) == {"plain", "asked", "other"}
    assert shared.manifest["latency"]["hosts"]["num"] == 2
    loads = [row for row in shared.ledger().to_pylist() if row["stage"] == "load"]
    assert sorted((row["agent_id"] or "") for row in loads) == ["", "other"]
    apart = [{**agent, "share": False, "batch_tokens": 4096} for agent in AGENTS]
    with summarizers(3) as client:
        alone, events = run_on(client, make_job(agents=apart, name="alone"))
    assert len(events.of(HostReady)) == 3
    assert answers(shared) == answers(alone)


def test_a_pass_that_asks_some_of_the_agents_keeps_the_hosts(make_job: MakeJob) -> None:
    """The embedded cluster starts and ends workers by the posts of the whole job."""
    agents = [{**agent, "max_count": 2} for agent in AGENTS[:2]]
    routing = {"escalate": {"agent": "asked", "fraction": 0.5}}
    events = Recorder()
    job = make_job(agents=agents, routing=routing, merge={"method": "vote"})
    pipeline.run(job, emit=events)
    assert {event.agents for event in events.of(HostReady)} == {("plain",), ("asked",)}
    assert {event.worker.rpartition("-")[0] for event in events.of(HostReady)} == {"plain+asked"}
    assert not events.of(HostLost)
    assert {event.agent_id for event in events.of(PartitionAnswered)} == {"plain", "asked"}


def test_a_worker_that_is_lost_is_lost_for_all_its_agents(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [{**agent, "count": 2} for agent in AGENTS[:2]]
    events, lost, merge = Recorder(), threading.Event(), work.merge_answers
    with summarizers(2) as client:

        def emit(event: Event) -> None:
            if isinstance(event, PartitionAnswered) and not events.of(PartitionAnswered):
                client.retire_workers(names=[event.worker])
            events(event)
            if isinstance(event, HostLost):
                lost.set()

        def merge_when_lost(*args: Any) -> Any:
            assert lost.wait(PATIENCE_S), "workers are in this process"
            return merge(*args)

        monkeypatch.setattr(work, "merge_answers", merge_when_lost)
        summary = pipeline.run(make_job(agents=agents), client=client, emit=emit)
    assert open_run(summary.run).manifest["counts"]["failures"] == 0
    assert [event.agents for event in events.of(HostReady)] == [("plain", "asked")] * 2
    assert [event.agents for event in events.of(HostLost)] == [("plain", "asked")]


def test_a_pools_agents_share_a_host(make_job: MakeJob) -> None:
    with summarizers(1) as client:
        job = make_job(agents=AGENTS[:2])
        with AgentPool(job, client=client).sync() as pool:
            assert set(pool.ask("some text").agents) == {"plain", "asked"}


def test_a_late_report_of_an_earlier_pass_is_no_load_of_this_one(make_job: MakeJob) -> None:
    """All passes of a run report under one topic."""
    job = make_job(agents=AGENTS[1:2])
    run = RunRef(
        Store(job.output.path), uuid.uuid4().hex, job.task, merge_spec(job), None, (), True
    )
    specs = agent_specs(job, embedded=False, num_cores=1)
    own = {"family_id": "echo:one", "engine": {"engine": "echo"}}
    room = {"concurrent": 1, "max_in_flight": 2, "joins": False, "refused": {}}
    events = Recorder()
    with summarizers(1) as client:
        hosting = Hosting(client, job, run, specs, events, lambda future, handle: None)
        hosting.start()
        (address,) = client.scheduler_info()["workers"]
        hosting.loaded(address, {"load_s": 1.0, **room, "agents": {"plain": own}})
        assert hosting.unserved == {"asked"}
        hosting.loaded(address, {"load_s": 2.0, **room, "agents": {"asked": own}})
        assert hosting.unserved == set()
        hosting.close()
    assert [event.load_s for event in events.of(HostReady)] == [2.0]


def test_a_host_does_without_an_agent_that_its_engine_cannot_answer_for(
    make_job: MakeJob,
) -> None:
    agents = [
        {"name": "plain", "model": "keywords", "options": {"labels": {"x": "number"}}},
        {"name": "asked", "model": "keywords", "options": {"labels": {"x": "number"}}},
    ]
    agents[1]["prompt"] = "Which is {text}?"
    task = {"kind": "classify", "labels": ["x", "y"]}
    sections = {"agents": agents, "task": task, "merge": {"method": "vote"}}
    events = Recorder()
    with summarizers(1, "classify") as client:
        job = make_job(**sections, routing={"answers_per_record": 1})
        pipeline.run(job, client=client, emit=events)
        with pytest.raises(ModelError, match=r"agents\.asked: no worker could load keywords: .*"):
            pipeline.run(make_job(**sections, routing={}, name="both"), client=client)
    assert [event.agents for event in events.of(HostReady)] == [("plain",)]
    assert [event.agents for event in events.of(HostLost)] == [("asked",)]
    assert {event.agent_id for event in events.of(PartitionAnswered)} == {"plain"}


def test_a_slot_is_left_for_merges_however_quick_partitions_are(make_job: MakeJob) -> None:
    """Dask counts what only waits in an executor of ours as executing."""
    agent = {"name": "a", "model": "echo", "options": {"concurrent": 2}}
    job = make_job(agents=[agent], routing={}, partition={"max_records": 1})
    with summarizers(1) as client:
        assert set(client.nthreads().values()) == {3}
        _, events = run_on(client, job)
    seen = [event.candidates["a"]["w-0"]["in_flight"] + 1 for event in events.of(PartitionAsked)]
    assert max(seen) == 2
    (ready,) = events.of(HostReady)
    assert (ready.concurrent, ready.max_in_flight) == (2, 2)
