"""What partitions, Dask and storing cost: a run beside the same engine without them, in turn.

Two ways to summarise the same documents with the same model and greedy decoding, several rounds:

    mas_batch    hosts on an embedded cluster, partition by partition, from models ready to manifest
    direct       the same engine and loop in as many bare processes, each given its share of all
                 documents at once: no partitions, no Dask, nothing stored

Loading the model is not timed. Quoted are the median over the rounds of direct ÷ mas_batch
(orchestration efficiency), and how many answers are the same word for word. Other people's ways
are in `peers.py`.

    python benchmarks/throughput.py [--hosts 2] [--threads 1] [--rounds 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from documents import DOCUMENTS, MODEL, TASK, read_records
from timed_run import timed_run

from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Sampling
from mas_batch.engines.client import LoopClient
from mas_batch.engines.loop import EngineLoop
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.models import fetch

Outcome = tuple[float, dict[str, str]]
"""Seconds, and the answers by record id."""


def make_job(folder: Path, options: argparse.Namespace) -> Job:
    corpus = {"path": str(DOCUMENTS), "id": "id", "limit": options.documents}
    agent = {"name": "a", "model": MODEL, "count": options.hosts, "threads": options.threads}
    return check_job(
        {
            "name": "throughput",
            "corpus": corpus,
            "task": {"kind": "summarize", "max_new_tokens": options.new_tokens},
            "agents": [agent],
            "merge": {"method": "vote"},
            "partition": {"max_records": options.per_partition, "max_tokens": 1_000_000},
            "output": {"path": str(folder)},
            "cluster": {"dashboard_address": None},
        }
    )


def run_mas_batch(job: Job) -> Outcome:
    run = timed_run(job)
    return run.seconds, run.answers


def serve_all(job: Job, inbox: Any, outbox: Any) -> None:
    """Answer all that is given, at once, in a bare process."""
    config = EngineConfig(threads=job.agents[0].threads)
    loop = EngineLoop(lambda: load_engine("auto", fetch(MODEL), config))
    profile = AgentProfile("a", "m", None, None, Sampling(job.task.max_new_tokens))
    outbox.put(None)
    answers = answer_records(inbox.get(), TASK, LoopClient(loop, loop.engine), profile)
    outbox.put({a.record_id: a.text for a in answers})


def run_direct(job: Job) -> Outcome:
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    num_hosts = job.agents[0].count
    processes = [
        context.Process(target=serve_all, args=(job, inbox, outbox)) for _ in range(num_hosts)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        outbox.get()
    records = read_records(job.corpus.limit or 0)
    start = time.perf_counter()
    for number in range(num_hosts):
        inbox.put(records[number::num_hosts])
    answers: dict[str, str] = {}
    for _ in processes:
        answers |= outbox.get()
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return seconds, answers


def main() -> None:
    # As in an embedded worker: threads that spin while they wait starve what else there is to do.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each host")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--per-partition", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ways = {"mas_batch": run_mas_batch, "direct": run_direct}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, dict[str, str]] = {}
    for number in range(1, options.rounds + 1):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                spent, answers[name] = way(make_job(Path(folder), options))
            seconds[name].append(spent)
            print(f"round {number}  {name:<10} {spent:7.2f} s", flush=True)
    ratios = [b / a for a, b in zip(seconds["mas_batch"], seconds["direct"], strict=True)]
    same = sum(answers["mas_batch"].get(k) == v for k, v in answers["direct"].items())
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"direct ÷ mas_batch: median {statistics.median(ratios):.2f} ({each}), orchestration "
        f"efficiency; {same} of {len(answers['direct'])} answers the same"
    )


if __name__ == "__main__":
    main()
