"""How large a snapshot of a run is, and what it costs: `python benchmarks/snapshots.py`.

A run of 20,000 partitions that lasts 950 s, so that its history is as long as it gets, by four
agents with so many workers in all. Medians of 30.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from mas_batch.events import (
    HostReady,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    RunStarted,
)
from mas_batch.monitor.fleet import LiveAgent, LivePost
from mas_batch.monitor.fold import Fold
from mas_batch.monitor.inbox import Inbox
from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.overview import overview
from mas_batch.monitor.rings import Timeline
from mas_batch.monitor.snapshot import VERSION, Snapshot

PARTITIONS = 20_000
SECONDS = 950.0


def folded(num_workers: int) -> tuple[LiveRun, float]:
    """Return the run after its last partition, and what an event has taken, in seconds."""
    names = [f"agent-{number}" for number in range(min(4, num_workers))]
    agents = {name: LiveAgent(name, "hub:organisation/some-model@main", [name]) for name in names}
    posts = {name: LivePost(name, [name], 1) for name in names}
    run = LiveRun(
        "job-63ca2726dfdaebfb", "1", "job", "summarize", "random", 2, 0.0, posts, agents, {},
        Timeline(0.0),
    )  # fmt: skip
    fold = Fold(run)
    fold.take(0.0, RunStarted("runs/job", PARTITIONS, 50 * PARTITIONS, 0, 0, 0, 1, (), None))
    workers = [(names[n % len(names)], f"{names[n % len(names)]}-{n}") for n in range(num_workers)]
    for agent, worker in workers:
        fold.take(
            0.0, HostReady(worker, (agent,), 1.0, {"engine": "transformers", "device": "cuda"})
        )
    start = time.perf_counter()
    for partition in range(PARTITIONS):
        agent, worker = workers[partition % num_workers]
        at = partition * SECONDS / PARTITIONS
        fold.take(at, PartitionAsked(partition, agent, worker, 1, "answer", "random", {}, 0))
        answered = PartitionAnswered(
            partition=partition, agent_id=agent, worker=worker, attempt=1, num_records=50,
            num_answers=50, num_failed=0, prompt_tokens=12_345, completion_tokens=3_456,
            compute_s=1.23456789, transfer_s=0.123456789, processing_s=0.0123456789,
        )  # fmt: skip
        fold.take(at, answered)
        agreement = {agent: (40, 50)}
        merged = PartitionMerged(
            partition=partition, num_results=50, num_failures=0, agreement=agreement
        )
        fold.take(at, merged)
    return run, (time.perf_counter() - start) / (3 * PARTITIONS)


def median_ms(call: Callable[[], object]) -> float:
    """Return what a call takes."""
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def main() -> None:
    print("workers   bytes  encode ms  decode ms  overview ms  event µs")
    for num_workers in (1, 16, 200, 1000):
        run, event_s = folded(num_workers)
        data = Snapshot(1, SECONDS, run).to_json()
        inbox = Inbox()
        inbox.receive(VERSION, data, SECONDS)
        encode = median_ms(Snapshot(1, SECONDS, run).to_json)
        decode = median_ms(lambda data=data: Snapshot.from_json(data))
        shown = median_ms(lambda inbox=inbox: overview(inbox, SECONDS))
        print(
            f"{num_workers:7,} {len(data):7,} {encode:10.2f} {decode:10.2f} {shown:12.2f}"
            f"{1e6 * event_s:10.1f}"
        )


if __name__ == "__main__":
    main()
