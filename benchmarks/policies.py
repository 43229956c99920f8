"""Compare routing policies: makespan ÷ the bound that no schedule can beat.

    python benchmarks/policies.py            the project's dispatcher on a virtual clock (seconds)
    python benchmarks/policies.py --grow 64  one dispatcher, ever longer runs (two minutes)
    python benchmarks/policies.py --dask     real Dask workers, echo agents that take time (minutes)

On a virtual clock the work is equal to the token; on Dask the CPU time of the scheduler and of
the submitting process per partition is measured as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer

import psutil
from distributed import Client
from routing_model import SCENARIOS, Scenario, Worker, simulate, simulate_many, workers

from mas_batch import pipeline
from mas_batch.events import Event, PartitionAsked, PartitionMerged
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.routing.policies import POLICIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dask", action="store_true", help="measure on real Dask workers")
    parser.add_argument("--grow", type=int, metavar="WORKERS", help="the dispatcher at scale")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--scenarios", nargs="*", metavar="NAME", help="on Dask: only these")
    parser.add_argument("--partitions", type=int, default=60, help="per run on Dask")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a partition on Dask")
    args = parser.parse_args()
    if args.grow:
        grow(args.grow)
    elif args.dask:
        measure(args.policies, args.partitions, args.seconds, args.scenarios)
    else:
        compare(args.policies)


# On a virtual clock


def compare(policies: list[str]) -> None:
    for title, rules in (
        ("the default window", {"window": None}),
        ("window 1", {}),
        ("window 2", {"window": 2}),
        ("window 2, no speculation", {"window": 2, "speculate": False}),
    ):
        print(f"\nMakespan ÷ bound, {title}; median of five seeds where sizes vary\n")
        print(f"| policy | {' | '.join(scenario.name for scenario in SCENARIOS)} |")
        print("|---" * (len(SCENARIOS) + 1) + "|")
        for policy in policies:
            cells = [f"{ratio(scenario, policy, **rules):.3f}" for scenario in SCENARIOS]
            print(f"| {policy} | {' | '.join(cells)} |")


def grow(num_workers: int) -> None:
    """Show that a decision costs the same, and the state stays the same, however long the run."""
    print(f"\nDispatcher alone, {num_workers} workers, model included\n")
    print("| partitions | CPU per partition | memory grown |")
    print("|---|---|---|")
    for num_partitions in (10_000, 100_000, 1_000_000):
        before_mb, start = rss_mb(), time.process_time()
        simulate_many(num_partitions, num_workers, "least-loaded")
        spent_us = (time.process_time() - start) / num_partitions * 1e6
        grown_mb = rss_mb() - before_mb
        print(f"| {num_partitions:,} | {spent_us:.0f} µs | {grown_mb:.1f} MB |", flush=True)


def rss_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def ratio(scenario: Scenario, policy: str, **rules: object) -> float:
    seeds = range(5 if scenario.spread else 1)
    return statistics.median(
        simulate(scenario, policy, seed=seed, **rules).makespan_s
        / scenario.bound_s(scenario.plan(seed))
        for seed in seeds
    )


# On Dask


def real_scenarios(num_partitions: int, seconds: float) -> list[tuple[Scenario, str]]:
    """Return scenarios in partitions per second, and what happens to the last worker.

    On Dask a worker's speed is its agent's: the slow one is an agent of its own, and one answer
    per record is asked for.
    """
    rate = 1000 / seconds
    some = 0.4 * num_partitions * seconds / 4
    equal = workers(rate, rate, rate)
    both = workers(rate, rate, agent="large") + workers(rate, rate, agent="small")
    return [
        (Scenario("equal", (*equal, Worker("a-3", "a", rate)), num_partitions), ""),
        (Scenario("1/1/1/¼", (*equal, Worker("slow-0", "slow", rate / 4)), num_partitions), ""),
        (Scenario("capability on 2 of 4", both, num_partitions // 2, 2), ""),
        (
            Scenario("one dies", (*equal, Worker("a-3", "a", rate, dies_s=some)), num_partitions),
            "dies",
        ),
        (
            Scenario("one joins", (*equal, Worker("a-3", "a", rate, joins_s=some)), num_partitions),
            "joins",
        ),
    ]


def measure(
    policies: list[str], num_partitions: int, seconds: float, only: list[str] | None
) -> None:
    scenarios = [
        (scenario, fate)
        for scenario, fate in real_scenarios(num_partitions, seconds)
        if only is None or scenario.name in only
    ]
    print(f"\nMakespan ÷ bound on Dask, {num_partitions} partitions of {seconds} s\n")
    names = [scenario.name for scenario, _ in scenarios]
    print(f"| policy | {' | '.join(names)} | scheduler CPU | client CPU |")
    print("|---" * (len(names) + 3) + "|")
    for policy in policies:
        cells, scheduler_s, client_s, partitions = [], 0.0, 0.0, 0
        for scenario, fate in scenarios:
            with tempfile.TemporaryDirectory() as folder:
                run = RealRun(Path(folder), scenario, fate, policy)
                cells.append(f"{run.makespan_s / scenario.bound_s(scenario.plan(0)):.3f}")
            scheduler_s += run.scheduler_s
            client_s += run.client_s
            partitions += scenario.num_partitions
        per = [f"{1000 * spent / partitions:.1f} ms" for spent in (scheduler_s, client_s)]
        print(f"| {policy} | {' | '.join(cells)} | {' | '.join(per)} |", flush=True)


class RealRun:
    """One run of the pipeline on workers in processes of their own."""

    def __init__(self, folder: Path, scenario: Scenario, fate: str, policy: str) -> None:
        self._asked: list[float] = []
        self._merged: list[float] = []
        self._on_first: Callable[[], None] = lambda: None
        job = real_job(folder, scenario, policy)
        with ExitStack() as stack:
            file = folder / "scheduler.json"
            scheduler = stack.enter_context(
                process("scheduler", "--scheduler-file", str(file), "--port", "0")
            )
            client = connect(stack, file)
            *_, last = scenario.workers
            started = [w for w in scenario.workers if not (fate == "joins" and w is last)]
            children = {w.name: stack.enter_context(worker(w, file)) for w in started}
            client.wait_for_workers(len(started), timeout=60)
            if fate == "joins":
                self._after(last.joins_s, lambda: stack.enter_context(worker(last, file)))
            if fate == "dies":
                self._after(last.dies_s, lambda: children[last.name].send_signal(signal.SIGKILL))
            before = cpu_s(scheduler.pid), time.process_time()
            pipeline.run(job, client=client, emit=self._note)
            self.scheduler_s = cpu_s(scheduler.pid) - before[0]
            self.client_s = time.process_time() - before[1]
        self.makespan_s = self._merged[-1] - self._asked[0]

    def _after(self, seconds: float, what: Callable[[], object]) -> None:
        self._on_first = Timer(seconds, what).start

    def _note(self, event: Event) -> None:
        if isinstance(event, PartitionAsked):
            if not self._asked:
                self._on_first()
            self._asked.append(time.perf_counter())
        elif isinstance(event, PartitionMerged):
            self._merged.append(time.perf_counter())


def real_job(folder: Path, scenario: Scenario, policy: str) -> Job:
    """Return a job whose partitions are one record and take a worker as long as in the scenario."""
    corpus = folder / "corpus.jsonl"
    rows = ({"id": f"r{i}", "text": f"text {i}"} for i in range(scenario.num_partitions))
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts: dict[str, int] = {}
    rates = {}
    for each in scenario.workers:
        counts[each.agent_id] = counts.get(each.agent_id, 0) + 1
        rates[each.agent_id] = each.tokens_per_s
    return check_job(
        {
            "name": "bench",
            "corpus": {"path": str(corpus), "id": "id"},
            "task": {"kind": "summarize", "max_new_tokens": 4},
            "agents": [
                {
                    "name": name,
                    "model": f"echo:{name}",
                    "capabilities": ["summarize", name],
                    "count": counts[name],
                    "options": {"seconds_per_batch": 1000 / rates[name]},
                }
                for name in counts
            ],
            "routing": {"policy": policy, "answers_per_record": scenario.answers_per_record},
            "merge": {"method": "vote"},
            "partition": {"max_records": 1},
            "output": {"path": str(folder / "runs")},
        }
    )


@contextmanager
def process(kind: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "dask", kind, "--no-dashboard", *options]
    quiet = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=quiet) as child:
        try:
            yield child
        finally:
            child.terminate()


def worker(each: Worker, file: Path) -> object:
    declared = f"summarize=1,{each.agent_id}=1"
    return process(
        "worker", "--scheduler-file", str(file), "--no-nanny", "--nthreads", "2",
        "--name", each.name, "--resources", declared, "--local-directory", str(file.parent),
    )  # fmt: skip


def connect(stack: ExitStack, file: Path) -> Client:
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return stack.enter_context(Client(scheduler_file=str(file)))


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
