"""What it costs to decide which workers hold which engine, on clusters of thousands of workers.

CPU seconds of one `place`; it is called every second of a run.
Run: `python benchmarks/placement.py [--workers 100 1000 10000] [--rounds 5]`
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mas_batch.agents.posts import WorkerInfo, place, posts_of
from mas_batch.job import Job
from mas_batch.job_file import check_job

KINDS: list[Mapping[str, float]] = [
    {"translate": 1},
    {"translate": 1, "GPU": 1},
    {"translate": 1, "long": 1},
    {"translate": 1, "long": 1, "GPU": 1},
]


def make_job(agents: list[dict[str, Any]]) -> Job:
    return check_job(
        {
            "name": "placement",
            "corpus": {"path": "none.jsonl"},
            "task": {"kind": "translate"},
            "agents": [{"model": "echo", **agent} for agent in agents],
            "output": {"path": "none"},
        }
    )


def alike(count: int) -> tuple[Job, list[WorkerInfo]]:
    """One agent that wants every worker of a cluster of equal ones."""
    workers = [WorkerInfo(f"tcp://{i}", f"w{i}", KINDS[0]) for i in range(count)]
    return make_job([{"name": "a", "count": min(count, 4096)}]), workers


def unlike(count: int) -> tuple[Job, list[WorkerInfo]]:
    """Three agents on four kinds of workers, where the first has to make room for the others."""
    workers = [WorkerInfo(f"tcp://{i}", f"w{i}", KINDS[i % 4]) for i in range(count)]
    agents = [
        {"name": "any", "count": min(count // 2, 4096)},
        {"name": "gpu", "count": min(count // 2, 4096), "resources": {"GPU": 1}},
        {"name": "long", "count": min(count // 2, 4096), "capabilities": ["translate", "long"]},
    ]
    return make_job(agents), workers


def all_different(count: int) -> tuple[Job, list[WorkerInfo]]:
    """The same agents where no two workers declare the same: nothing can be grouped."""
    job, workers = unlike(count)
    return job, [
        replace(worker, resources={**worker.resources, f"host-{i}": 1})
        for i, worker in enumerate(workers)
    ]


def crowded(count: int) -> tuple[Job, list[WorkerInfo]]:
    """Twenty agents of unlike needs on workers each of which declares half of them, by lot."""
    lot, names = random.Random(1), [f"r{i}" for i in range(20)]
    agents: list[dict[str, Any]] = [
        {"name": f"a{i}", "count": max(1, count // 20), "resources": {f"r{i}": 1}}
        for i in range(20)
    ]
    workers = [
        WorkerInfo(
            f"tcp://{i}",
            f"w{i}",
            dict.fromkeys(["translate", *lot.sample(names, 10)], 1.0),
        )
        for i in range(count)
    ]
    return make_job(agents), workers


def cpu_s(job: Job, workers: list[WorkerInfo], rounds: int) -> float:
    """Return the median CPU seconds of one placement."""
    found, posts = [], posts_of(job)
    for _ in range(rounds):
        start = time.process_time()
        place(workers, posts)
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("| cluster | workers | CPU, median | ratio to the first |\n|---|---|---|---|")
    for cluster in (alike, unlike, all_different, crowded):
        first = 0.0
        for count in options.workers:
            seconds = cpu_s(*cluster(count), options.rounds)
            first = first or seconds
            name, ratio = cluster.__name__.replace("_", " "), seconds / first
            print(f"| {name} | {count:,} | {seconds * 1e3:.2f} ms | {ratio:.1f} |")


if __name__ == "__main__":
    main()
