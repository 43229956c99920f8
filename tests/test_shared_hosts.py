"""Agents that share hosts, on real clusters: one load, one worker, the same answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from distributed import Client

from mas_batch import pipeline
from mas_batch.agents.spec import agent_specs
from mas_batch.events import Event, HostLost, HostReady, PartitionAnswered
from mas_batch.job import Job
from mas_batch.merging import merge_spec
from mas_batch.routing.hosting import Hosting
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.serving.pool import AgentPool
from tests.clusters import summarizers
from tests.test_run import Recorder

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


def test_a_worker_that_is_lost_is_lost_for_all_its_agents(make_job: MakeJob) -> None:
    agents = [{**agent, "count": 2} for agent in AGENTS[:2]]
    events = Recorder()
    with summarizers(2) as client:

        def emit(event: Event) -> None:
            if isinstance(event, PartitionAnswered) and not events.of(PartitionAnswered):
                client.retire_workers(names=[event.worker])
            events(event)

        summary = pipeline.run(make_job(agents=agents), client=client, emit=emit)
    assert open_run(summary.run).manifest["counts"]["failures"] == 0
    assert [event.agents for event in events.of(HostReady)] == [("plain", "asked")] * 2
    assert [event.agents for event in events.of(HostLost)] in ([], [("plain", "asked")])


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
    events = Recorder()
    with summarizers(1) as client:
        hosting = Hosting(client, job, run, specs, events, lambda future, handle: None)
        hosting.start()
        (address,) = client.scheduler_info()["workers"]
        hosting.loaded(address, {"load_s": 1.0, "concurrent": 1, "agents": {"plain": own}})
        assert hosting.unserved == {"asked"}
        hosting.loaded(address, {"load_s": 2.0, "concurrent": 1, "agents": {"asked": own}})
        assert hosting.unserved == set()
        hosting.close()
    assert [event.load_s for event in events.of(HostReady)] == [2.0]
