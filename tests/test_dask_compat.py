"""What breaks if Dask changes a private part that we use."""

from __future__ import annotations

from typing import Any

from dask.utils import key_split
from distributed import Client, span

from mas_batch.dask_compat import forget_collections, workers_of
from mas_batch.routing.upkeep import run_span


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
