"""A pool on a real cluster: the same answers as a batch run, fast, and what can go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Nanny, Worker

import mas_batch
from mas_batch import AgentPool, cluster
from mas_batch.engines.echo import _hash
from mas_batch.errors import (
    JobError,
    ModelError,
    NoAnswerError,
    PoolBusyError,
    PoolClosedError,
    RecordError,
    RunError,
)
from mas_batch.job import Job
from mas_batch.serving.core import pool_spec
from mas_batch.serving.measure import PoolStats
from mas_batch.serving.reply import Reply
from mas_batch.serving.residence import Residence
from tests.clusters import cluster_of
from tests.waiting import PATIENCE_S

MakeJob = Callable[..., Job]

TEXTS = [f"text number {i} is here, with more words to tell" for i in range(12)]


def agents(
    strong: Mapping[str, Any] | None = None, weak: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Two agents on the workers of `cluster_client`, with these options of their echo engines."""
    return [
        {
            "name": name,
            "model": f"echo:{name}",
            "capabilities": ["summarize", name],
            "options": dict(options or {}),
        }
        for name, options in (("strong", strong), ("weak", weak))
    ]


async def until(pool: AgentPool, condition: Callable[[PoolStats], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition(pool.stats()):
        assert time.monotonic() < deadline, pool.stats()
        await asyncio.sleep(0.02)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["vote", "mbr", "best"])
def test_replies_are_what_a_batch_run_says(
    cluster_client: Client, make_job: MakeJob, method: str
) -> None:
    rows = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
    job = make_job(rows, merge={"method": method}, agents=agents(weak={"words": 3}))
    summary = mas_batch.run(job, client=cluster_client)
    expected = mas_batch.open_run(summary.run).arrow().to_pylist()
    with AgentPool(job, client=cluster_client).sync() as pool:
        replies = pool.ask_many(TEXTS)
    assert len(replies) == len(expected)
    for reply, row in zip(replies, expected, strict=True):
        assert isinstance(reply, Reply)
        names = ("answer", "method", "confidence", "confidence_kind", "margin", "tie", "abstain")
        assert {n: getattr(reply, n) for n in names} == {n: row[n] for n in names}
        assert [s.agents for s in reply.support] == [tuple(s["agents"]) for s in row["support"]]
        assert sorted(reply.agents) == ["strong", "weak"]
        assert reply.failures == ()


def test_the_context_is_shown(cluster_client: Client, make_job: MakeJob) -> None:
    task = {"kind": "summarize", "max_new_tokens": 8, "prompt": "{text} {context}"}
    job = make_job(task=task, agents=agents({"max_context_tokens": 40})[:1])
    with AgentPool(job, client=cluster_client).sync() as pool:
        assert pool.ask("a text", "its context").answer == "a text"
        # A prompt is counted in words: this context leaves no room for any text.
        with pytest.raises(NoAnswerError, match="too_long"):
            pool.ask("a text", "word " * 50)


def test_waiting_texts_reach_the_engine_as_batches(
    cluster_client: Client, make_job: MakeJob
) -> None:
    # After six batches the engine breaks; one by one, forty texts would break it. It takes up
    # nothing while it is busy, so what waits does not go to it in small batches beforehand.
    options = {"seconds_per_batch": 0.05, "fail_after": 6, "concurrent": 2}
    job = make_job(agents=agents(strong=options)[:1])

    async def test() -> None:
        async with AgentPool(job, client=cluster_client, max_batch=10) as pool:
            replies = await asyncio.gather(*(pool.ask(f"text {i}") for i in range(40)))
            assert [reply.answer for reply in replies] == [f"text {i}" for i in range(40)]
            sizes = pool.stats().agents["strong"].batch_sizes
            assert sum(size * times for size, times in sizes.items()) == 40
            assert max(sizes) == 10
            assert sum(sizes.values()) <= 6

    run(test)


def test_a_batch_is_waited_for_where_that_is_wanted(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=agents()[:1])

    async def test() -> None:
        pool = AgentPool(job, client=cluster_client, max_batch=4, max_wait_s=60.0)
        async with pool:
            asked = [asyncio.create_task(pool.ask(f"text {i}")) for i in range(3)]
            await until(pool, lambda stats: stats.agents["strong"].waiting == 3)
            await asyncio.gather(*asked, pool.ask("the fourth"))
            assert pool.stats().agents["strong"].batch_sizes == {4: 1}

    run(test)


def test_the_first_answer_is_not_held_up_by_a_slow_agent(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=agents(weak={"seconds_per_batch": 1.5}))

    async def test() -> None:
        async with AgentPool(job, client=cluster_client, answers="first") as pool:
            reply = await pool.ask("hello")
            assert reply.agents == ("strong",)
            assert pool.stats().agents["weak"].in_flight == 1, "the slow one is still at it"
            assert (await pool.ask("hello", answers=2)).agents == ("strong", "weak")

    run(test)


def test_only_the_agents_that_are_named_are_asked(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(routing={"answers_per_record": 1, "policy": "capability"}, agents=agents())
    with AgentPool(job, client=cluster_client).sync() as pool:
        assert pool.ask("text").agents == ("strong",), "the policy's choice"
        assert pool.ask("text", agents=["weak"]).agents == ("weak",)
        assert sorted(pool.ask("text", agents=["weak", "strong"]).agents) == ["strong", "weak"]
        with pytest.raises(
            JobError, match="agents: 'nobody' is not allowed; allowed: strong, weak"
        ):
            pool.ask("text", agents=["nobody"])
        with pytest.raises(
            JobError, match="answers: 3 is not allowed; allowed: 'first', or 1 to 2"
        ):
            pool.ask("text", answers=3)
        with pytest.raises(RecordError, match="empty: the text is empty"):
            pool.ask("")


def test_a_text_that_no_agent_can_answer_does_not_spoil_the_others(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=agents({"faults": {"BAD": "error"}})[:1])
    with AgentPool(job, client=cluster_client).sync() as pool:
        good, bad, empty, last = pool.ask_many(["good", "BAD", "", "last"])
        assert isinstance(good, Reply)
        assert isinstance(last, Reply)
        assert "strong: engine_error: EngineError" in str(bad)
        assert isinstance(empty, RecordError)


def test_cancelling_frees_the_place(cluster_client: Client, make_job: MakeJob) -> None:
    job = make_job(agents=agents({"seconds_per_batch": 0.4})[:1])

    async def test() -> None:
        pool = AgentPool(job, client=cluster_client, max_batch=1, max_pending=2)
        async with pool:
            first = asyncio.create_task(pool.ask("first"))
            second = asyncio.create_task(pool.ask("second"))
            await until(pool, lambda stats: stats.agents["strong"].waiting == 1)
            with pytest.raises(PoolBusyError, match="2 questions are pending"):
                await pool.ask("third")
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await until(pool, lambda stats: stats.pending <= 1)
            fourth = asyncio.create_task(pool.ask("fourth"))
            assert (await first).answer == "first"
            assert (await fourth).answer == "fourth"
            stats = pool.stats()
            assert stats.agents["strong"].batch_sizes == {1: 2}, "the second was never begun"
            assert (stats.pending, stats.num_replied, stats.num_busy) == (0, 2, 1)
            # Many at a time wait for room instead.
            replies = await pool.ask_many([f"text {i}" for i in range(4)])
            assert [r.answer for r in replies if isinstance(r, Reply)] == [
                f"text {i}" for i in range(4)
            ]

    run(test)


def test_leaving_answers_what_is_pending_and_frees_the_workers(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=agents({"seconds_per_batch": 0.2}))

    async def test() -> None:
        async with AgentPool(job, client=cluster_client, max_batch=1) as pool:
            asked = [asyncio.create_task(pool.ask(f"text {i}")) for i in range(3)]
            await until(pool, lambda stats: stats.pending == 3)
        assert [(await each).answer for each in asked] == ["text 0", "text 1", "text 2"]
        with pytest.raises(PoolClosedError, match="not open"):
            await pool.ask("late")
        assert pool.stats().num_replied == 3, "what was measured can still be read"

    run(test)
    left = cluster_client.run(lambda dask_worker: [*dask_worker.plugins, *dask_worker.handlers])
    assert not [name for names in left.values() for name in names if "mas-batch-pool" in name]


def test_an_exception_ends_what_is_pending(cluster_client: Client, make_job: MakeJob) -> None:
    job = make_job(agents=agents({"seconds_per_batch": 0.3})[:1])

    async def test() -> None:
        with suppress(ZeroDivisionError):
            async with AgentPool(job, client=cluster_client) as pool:
                asked = asyncio.create_task(pool.ask("text"))
                await until(pool, lambda stats: stats.pending == 1)
                raise ZeroDivisionError
        with pytest.raises(PoolClosedError, match="the pool is closed"):
            await asked

    run(test)


def test_workers_that_only_the_scheduler_reaches(
    cluster_client: Client, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Residence, "_is_directly_reachable", lambda self, address: False)
    job = make_job(agents=agents({"faults": {"BAD": "error"}})[:1])
    with AgentPool(job, client=cluster_client).sync() as pool:
        assert pool.ask("text").answer == "text"
        with pytest.raises(NoAnswerError, match="engine_error"):
            pool.ask("BAD")


def test_what_a_run_has_learned_is_used(
    cluster_client: Client, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["red", "green", "blue"]
    task = {"kind": "classify", "labels": labels}
    voters = [
        {
            "name": name,
            "model": f"echo:{name}",
            "capabilities": ["classify"],
            "options": {"labels": labels, "error_rate": rate},
        }
        for name, rate in (("good", 0.05), ("bad", 0.5))
    ]
    job = make_job(
        [{"id": f"r{i}", "text": f"text {i}"} for i in range(40)],
        task=task,
        agents=voters,
        merge={"method": "reliability"},
    )
    summary = mas_batch.run(job, client=cluster_client)
    learned = pool_spec(job, summary.run)
    assert learned.reliability is not None
    assert set(learned.reliability.agents) == {"good", "bad"}
    with AgentPool(job, client=cluster_client, learned_from=summary.run).sync() as pool:
        reply = pool.ask("text 1")
    (row,) = [
        row
        for row in mas_batch.open_run(summary.run).arrow().to_pylist()
        if row["record_id"] == "r1"
    ]
    assert (reply.method, reply.confidence_kind) == (row["method"], row["confidence_kind"])
    with AgentPool(job, client=cluster_client).sync() as pool:
        assert pool.ask("text 1").method == "vote", "as in the first pass of a run"
    assert "reliability needs a corpus: merging by plain vote" in caplog.text
    with pytest.raises(RunError, match=r"no manifest.json"):
        AgentPool(job, client=cluster_client, learned_from=str(Path(summary.run).parent))
    other = make_job(
        task=task, agents=[*voters, {**voters[0], "name": "new"}], merge={"method": "reliability"}
    )
    with pytest.raises(JobError, match=r"learned_from: .* knows nothing of agent 'new'"):
        AgentPool(other, client=cluster_client, learned_from=summary.run)


def test_what_labels_have_taught_a_run_is_used(
    cluster_client: Client, make_job: MakeJob, tmp_path: Path
) -> None:
    labels = ["red", "green", "blue"]
    voters = [
        {
            "name": name,
            "model": f"echo:{name}",
            "capabilities": ["classify"],
            "options": {"labels": labels, "error_rate": rate},
        }
        for name, rate in (("good", 0.05), ("bad", 0.5))
    ]
    file = tmp_path / "labels.jsonl"
    job = make_job(
        [{"id": f"r{i}", "text": f"text {i}"} for i in range(80)],
        task={"kind": "classify", "labels": labels},
        agents=voters,
        merge={"method": "vote"},
    )
    right = {f"r{i}": labels[_hash(f"text {i}") % 3] for i in range(60)}  # as the echo has it
    file.write_text(
        "\n".join(json.dumps({"record_id": i, "label": label}) for i, label in right.items())
    )
    changes = {"calibrate": {"labels": str(file)}}
    calibrated = job.with_changes(merge=job.merge.with_changes(**changes))
    run = mas_batch.open_run(mas_batch.run(calibrated, client=cluster_client).run)
    rows = [row for row in run.arrow().to_pylist() if len(row["support"]) > 1]
    wanted = rows[0]
    with AgentPool(calibrated, client=cluster_client, learned_from=run.store.url).sync() as pool:
        reply = pool.ask(f"text {wanted['record_id'][1:]}")
    assert reply.confidence_kind == wanted["confidence_kind"] == "calibrated"
    assert (reply.answer, reply.confidence) == (wanted["answer"], wanted["confidence"])
    file = Path(run.store.path("calibration.json"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"calibration\.json is damaged: "):
        AgentPool(calibrated, client=cluster_client, learned_from=run.store.url)
    file.unlink()
    with pytest.raises(JobError, match=r"learned_from: .* has nothing for merge.method vote"):
        AgentPool(calibrated, client=cluster_client, learned_from=run.store.url)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch: 0 is not allowed; allowed: 1 or more"),
        ({"max_pending": 0}, "max_pending: 0 is not allowed"),
        ({"max_wait_s": -1.0}, r"max_wait_s: -1.0 is not allowed; allowed: 0 or more"),
        ({"timeout_s": 0.0}, r"timeout_s: 0.0 is not allowed; allowed: above 0"),
        ({"answers": 0}, "answers: 0 is not allowed; allowed: 'first', or 1 to 2"),
        ({"answers": "last"}, "answers: 'last' is not allowed"),
    ],
)
def test_wrong_arguments_are_named(make_job: MakeJob, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, JobError), match=message):
        AgentPool(make_job(), **wrong)


def test_a_job_that_escalates_is_refused(make_job: MakeJob) -> None:
    job = make_job(routing={"escalate": {"agent": "weak", "below": 0.5}})
    with pytest.raises(JobError, match=r"routing.escalate: a pool does not escalate"):
        AgentPool(job)


def test_the_commands_do_not_import_the_pool() -> None:
    check = "import sys, mas_batch, mas_batch.cli; sys.exit('mas_batch.serving' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture
def nannies() -> Iterator[Client]:
    """Two workers in processes of their own that come back when they are killed."""
    options = {"nthreads": 3, "resources": {"summarize": 1.0}, "host": "127.0.0.1"}
    workers = {
        name: {"cls": Nanny, "options": {**options, "name": name}} for name in ("a-0", "a-1")
    }
    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        yield client


@pytest.mark.faults
def test_a_worker_killed_in_the_middle_of_a_question(nannies: Client, make_job: MakeJob) -> None:
    agent = {"name": "a", "model": "echo:a", "count": 2, "options": {"seconds_per_batch": 1.0}}
    job = make_job(agents=[agent])

    async def test() -> None:
        async with AgentPool(job, client=nannies, max_batch=1) as pool:
            asked = [asyncio.create_task(pool.ask(f"text {i}")) for i in range(2)]
            await until(pool, lambda stats: stats.agents["a"].in_flight == 2)
            pids = nannies.run(os.getpid)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
            assert [(await each).answer for each in asked] == ["text 0", "text 1"]
            sizes = pool.stats().agents["a"].batch_sizes
            assert sizes == {1: 3}, "one was asked again, of the other"
            # The nanny starts another, the model is loaded, and the pool is whole again.
            await until(pool, lambda stats: stats.agents["a"].num_hosts == 2)
            assert len(await pool.ask_many(["more", "and more"])) == 2

    run(test)


@pytest.mark.faults
@pytest.mark.nightly
def test_a_text_that_kills_its_worker_is_found_among_those_in_flight(
    nannies: Client, make_job: MakeJob
) -> None:
    options = {"seconds_per_batch": 0.5, "faults": {"poison": "kill"}}
    job = make_job(agents=[{"name": "a", "model": "echo:a", "count": 2, "options": options}])

    async def test() -> None:
        async with AgentPool(job, client=nannies, max_batch=2) as pool:
            await until(pool, lambda stats: stats.agents["a"].num_hosts == 2)
            texts = [
                *(f"text {i}" for i in range(4)),
                "poison",
                *(f"text {i}" for i in range(5, 8)),
            ]
            replies = await pool.ask_many(texts)
            said = [reply.answer if isinstance(reply, Reply) else str(reply) for reply in replies]
            assert "worker_died: twice" in said.pop(4)
            assert said == [text for text in texts if text != "poison"]
            await until(pool, lambda stats: stats.agents["a"].num_hosts == 2)

    run(test)


@pytest.mark.faults
def test_a_worker_that_hangs_is_restarted(nannies: Client, make_job: MakeJob) -> None:
    agent = {"name": "a", "model": "echo:a", "count": 2, "options": {"seconds_per_batch": 0.2}}
    job = make_job(agents=[agent], routing={"timeout_s": 2.0})

    async def test() -> None:
        async with AgentPool(job, client=nannies, max_batch=1) as pool:
            # A pool is open when one has loaded; one that is stopped before it has is not asked.
            await until(pool, lambda stats: stats.agents["a"].num_hosts == 2)
            pids = nannies.run(os.getpid)
            os.kill(next(iter(pids.values())), signal.SIGSTOP)
            replies = await asyncio.gather(*(pool.ask(f"text {i}") for i in range(4)))
            assert [reply.answer for reply in replies] == [f"text {i}" for i in range(4)]
            stopped = next(iter(pids))
            known = lambda: nannies.scheduler_info(n_workers=-1)["workers"]  # noqa: E731
            # Until its end is known it counts as a host.
            await until(pool, lambda stats: stopped not in known())
            await until(pool, lambda stats: stats.agents["a"].num_hosts == 2)

    run(test)


@pytest.mark.faults
def test_a_pool_beside_a_worker_that_is_stopped_can_be_left(
    nannies: Client, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_BROADCAST_S", 2.0)
    agent = {"name": "a", "model": "echo:a", "count": 2}
    job = make_job(agents=[agent])

    async def test() -> None:
        pool = AgentPool(job, client=nannies)
        await pool.__aenter__()
        pids = nannies.run(os.getpid)
        stopped = next(iter(pids.values()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            await asyncio.wait_for(pool.__aexit__(None, None, None), PATIENCE_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)

    run(test)


def test_a_pool_whose_client_was_closed_says_so_and_can_be_left(make_job: MakeJob) -> None:
    options = {"nthreads": 3, "resources": {"summarize": 1.0}}
    job = make_job(agents=[{"name": "a", "model": "echo:a"}])

    async def test() -> None:
        with cluster_of({"a-0": {"cls": Worker, "options": options}}) as workers:
            client = await asyncio.to_thread(Client, workers.scheduler_address)
            pool = AgentPool(job, client=client)
            await pool.__aenter__()
            await asyncio.to_thread(client.close)
            with pytest.raises(PoolClosedError):
                await asyncio.wait_for(pool.ask("text"), PATIENCE_S)
            await asyncio.wait_for(pool.__aexit__(None, None, None), PATIENCE_S)

    run(test)


def test_when_the_scheduler_is_lost_nobody_waits(make_job: MakeJob) -> None:
    options = {"nthreads": 3, "resources": {"summarize": 1.0}}
    agent = {"name": "a", "model": "echo:a", "options": {"seconds_per_batch": 2.0}}
    job = make_job(agents=[agent])

    async def test() -> None:
        with cluster_of({"a-0": {"cls": Worker, "options": options}}) as workers:
            client = Client(workers)
            async with AgentPool(job, client=client) as pool:
                asked = asyncio.create_task(pool.ask("text"))
                await until(pool, lambda stats: stats.agents["a"].in_flight == 1)
                await asyncio.to_thread(workers.close)
                with pytest.raises(PoolClosedError, match="cluster is lost"):
                    await asked
                with pytest.raises(PoolClosedError, match="cluster is lost"):
                    await pool.ask("another")
            client.close()

    run(test)


def test_a_model_that_cannot_be_loaded_is_an_error_at_opening(
    cluster_client: Client, make_job: MakeJob
) -> None:
    job = make_job(agents=agents(weak={"fail_to_load": True}))
    with (
        pytest.raises(ModelError, match="weak: no worker could load echo:weak"),
        AgentPool(job, client=cluster_client).sync(),
    ):
        pass
    left = cluster_client.run(lambda dask_worker: [*dask_worker.plugins])
    assert not [name for names in left.values() for name in names if "mas-batch-pool" in name]
