"""What we use of Dask beyond its documentation still does what we need: a test for each name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, SpecCluster, Worker, WorkerPlugin

from mas_batch.dask_compat import (
    add_handler,
    call_worker,
    call_worker_by_scheduler,
    left_on_purpose,
    remove_handler,
    restart_process,
    workers_of,
)
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
