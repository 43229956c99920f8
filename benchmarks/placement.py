"""What it costs to decide which worker serves which agent, on clusters of hundreds of workers.

CPU seconds of one `match_workers`; it is called every half second while a run waits for workers.
Run: `python benchmarks/placement.py [--workers 50 500 1000] [--rounds 5]`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mas_batch.agents.spec import WorkerInfo, match_workers
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
    return make_job([{"name": "a", "count": count}]), workers


def unlike(count: int) -> tuple[Job, list[WorkerInfo]]:
    """Three agents on four kinds of workers, where the first has to make room for the others."""
    workers = [WorkerInfo(f"tcp://{i}", f"w{i}", KINDS[i % 4]) for i in range(count)]
    agents = [
        {"name": "any", "count": count // 2},
        {"name": "gpu", "count": count // 2, "resources": {"GPU": 1}},
        {"name": "long", "count": count // 2, "capabilities": ["translate", "long"]},
    ]
    return make_job(agents), workers


def all_different(count: int) -> tuple[Job, list[WorkerInfo]]:
    """The same agents where no two workers declare the same: nothing can be grouped."""
    job, workers = unlike(count)
    return job, [
        replace(worker, resources={**worker.resources, f"host-{i}": 1})
        for i, worker in enumerate(workers)
    ]


def cpu_s(job: Job, workers: list[WorkerInfo], rounds: int) -> float:
    """Return the median CPU seconds of one matching."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        match_workers(workers, job)
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[50, 500, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("| cluster | workers | CPU, median | ratio to the first |\n|---|---|---|---|")
    for cluster in (alike, unlike, all_different):
        first = 0.0
        for count in options.workers:
            seconds = cpu_s(*cluster(count), options.rounds)
            first = first or seconds
            name, ratio = cluster.__name__.replace("_", " "), seconds / first
            print(f"| {name} | {count:,} | {seconds * 1e3:.2f} ms | {ratio:.1f} |")


if __name__ == "__main__":
    main()
