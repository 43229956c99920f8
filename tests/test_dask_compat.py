"""What we use of Dask beyond its documentation still does what we need: a test for each name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dask.utils import key_split
from distributed import Client, SpecCluster, Worker, WorkerPlugin, span

from mas_batch.dask_compat import (
    add_handler,
    call_worker,
    call_worker_by_scheduler,
    forget_collections,
    hush_lost_heartbeats,
    left_on_purpose,
    remove_handler,
    restart_process,
    workers_of,
)
from mas_batch.routing.upkeep import run_span
from tests.clusters import cluster_of
from tests.waiting import wait_until


@pytest.fixture
def cluster() -> Iterator[SpecCluster]:
    workers = {name: {"cls": Worker, "options": {"name": name}} for name in ("a", "b")}
    with cluster_of(workers) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: SpecCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        client.wait_for_workers(2)
        yield client


def test_a_worker_without_a_nanny_is_cut_off_when_it_is_restarted(
    cluster: SpecCluster, client: Client
) -> None:
    address = cluster.workers["a"].address
    restart_process(client, address, timeout_s=30)
    wait_until(lambda: address not in workers_of(client))


def test_a_worker_that_is_retired_says_goodbye(cluster: SpecCluster, client: Client) -> None:
    address = cluster.workers["a"].address
    assert not left_on_purpose(client, address)
    client.retire_workers([address])
    wait_until(lambda: left_on_purpose(client, address))


def test_a_worker_that_a_cluster_scales_down_says_goodbye(
    cluster: SpecCluster, client: Client
) -> None:
    addresses = {worker.address for worker in cluster.workers.values()}
    cluster.scale(1)
    wait_until(lambda: any(left_on_purpose(client, address) for address in addresses))


def test_a_worker_whose_connection_breaks_says_nothing(
    cluster: SpecCluster, client: Client
) -> None:
    worker = cluster.workers["a"]
    client.sync(worker.batched_stream.close)
    address = worker.address
    wait_until(lambda: bool(client.get_events(address)))
    assert not left_on_purpose(client, address)


def test_a_heartbeat_that_finds_no_scheduler_is_not_logged(
    cluster: SpecCluster,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def lost(**arguments: Any) -> None:
        raise OSError("the scheduler is gone")

    worker, logger = cluster.workers["a"], logging.getLogger("distributed.worker")
    monkeypatch.setattr(logger, "filters", [])
    with monkeypatch.context() as patch:
        patch.setattr(worker.scheduler, "heartbeat_worker", lost, raising=False)
        cluster.sync(worker.heartbeat)
        assert "the scheduler is gone" in caplog.text, "Dask logs it with a traceback"
        caplog.clear()
        hush_lost_heartbeats()
        cluster.sync(worker.heartbeat)
    assert "the scheduler is gone" not in caplog.text


class Upper(WorkerPlugin):  # type: ignore[misc]
    name = "upper"

    def setup(self, worker: Worker) -> None:
        add_handler(worker, self.name, self.answer)

    def teardown(self, worker: Worker) -> None:
        remove_handler(worker, self.name)

    async def answer(self, text: str) -> str:
        return text.upper()


@pytest.mark.parametrize("call", [call_worker, call_worker_by_scheduler])
def test_a_worker_is_called_by_name_directly_and_through_the_scheduler(
    cluster: SpecCluster, client: Client, call: Callable[..., Any]
) -> None:
    address = cluster.workers["b"].address
    client.register_plugin(Upper())
    assert client.sync(call, client, address, "upper", text="hello") == "HELLO"
    client.unregister_worker_plugin("upper")
    assert client.sync(call, client, address, "upper", text="hello") is None, "not an error"


@pytest.mark.usefixtures("short_connect")
@pytest.mark.parametrize("call", [call_worker, call_worker_by_scheduler])
def test_a_worker_that_is_gone_is_an_oserror(
    cluster: SpecCluster, client: Client, call: Callable[..., Any]
) -> None:
    address = cluster.workers["a"].address
    cluster.sync(cluster.workers["a"].close)
    wait_until(lambda: address not in workers_of(client))
    with pytest.raises(OSError):
        client.sync(call, client, address, "upper", text="hello")


def spans_of(dask_scheduler: Any) -> dict[tuple[str, ...], int]:
    """Return name of a span → its number of collections."""
    spans = dask_scheduler.extensions["spans"].spans.values()
    return {span.name: len((span.metadata or {}).get("collections", [])) for span in spans}


def test_the_list_of_workers_does_not_flicker(cluster_client: Client) -> None:
    """The client's own callback keeps replacing what `Client.scheduler_info` returns."""
    callback = cluster_client._periodic_callbacks["scheduler-info"]
    interval, callback.callback_time = callback.callback_time, 5
    callback.stop()
    callback.start()
    try:
        assert {len(workers_of(cluster_client)) for _ in range(300)} == {3}
    finally:
        callback.stop()
        callback.callback_time = interval
        callback.start()


def test_a_worker_is_known_by_name_resources_status_and_heartbeat(cluster_client: Client) -> None:
    found = {info["name"]: info for info in workers_of(cluster_client).values()}
    assert found.keys() == {"strong-0", "weak-0", "spare"}
    assert found["weak-0"]["resources"]["weak"] == 1
    assert found["weak-0"]["status"] == "running"
    assert found["weak-0"]["last_seen"] > 0


def test_the_scheduler_forgets_what_runs_have_submitted_and_nothing_else(
    cluster_client: Client,
) -> None:
    def submit(number: int, name: str) -> None:
        # Dask has all tasks of a name belong to one span.
        cluster_client.submit(abs, number, pure=False, key=f"{name}-{number}").result()

    with span("a user's own"):
        for number in range(30):
            submit(number, "theirs")
    with span("theirs too"), run_span("nightly"):
        for number in range(30):
            submit(number, "ours")
    ours = ("theirs too", "mas-batch nightly")
    before = cluster_client.run_on_scheduler(spans_of)
    assert before["a user's own",] == before[ours] == 30, "an entry for each"
    num_cached = key_split.cache_info().currsize
    forgotten = cluster_client.run_on_scheduler(forget_collections, tag="mas-batch ", kept=10)
    after = cluster_client.run_on_scheduler(spans_of)
    assert after == {**before, ours: 10}
    assert forgotten == 20
    assert key_split.cache_info().currsize >= num_cached, "the cache is everybody's"
