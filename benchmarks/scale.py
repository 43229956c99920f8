"""Does anything grow with the number of partitions? Time per partition and memory, by size.

    python benchmarks/scale.py [--partitions 1000 10000 100000]     a run's folder, without Dask
    python benchmarks/scale.py --run [--partitions 1000 10000]      whole runs on a Dask cluster

The first makes folders of runs with the project's own writers (10 records per partition, two
agents, one failed record in every hundredth partition; most files are hard links of a first one)
and times what the submitting process does with them, in a process of its own per size. "Counting"
is a worker's part, timed on 500 partitions.

The second runs jobs of an echo agent of two hosts with a scheduler and two workers in processes
of their own and samples the processor time and the memory of each every second. Give it `--folder`
to keep what it does: the same command then resumes a run that was cut short and repeats none that
is complete. Its figures are then of the last execution. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from mas_batch import pipeline
from mas_batch.agents.statistics import partition_statistics
from mas_batch.aggregate.merge import merge_answers
from mas_batch.corpus import CorpusReader
from mas_batch.events import Event, PartitionMerged
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.merging import merge_spec
from mas_batch.partition import partition
from mas_batch.records import ANSWERS, FAILURES
from mas_batch.run_folder.commits import Committed, commit_results, committed
from mas_batch.run_folder.manifest import manifest_files, write_manifest
from mas_batch.run_folder.names import FORMAT, answers_name, partition_stem
from mas_batch.run_folder.plan import read_plan, read_records, stage
from mas_batch.run_folder.read import open_run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.stages import asking

RECORDS = 10
AGENTS = ("a", "b")
FAILED_EVERY = 100
COUNTED = 500
SAMPLE_S = 1.0
MB = 1e6
LINKS = 50_000
"""Names of one file: ext4 allows 65,000."""


TWO_AGENTS = [{"name": name, "model": f"echo:{name}"} for name in AGENTS]
TWO_HOSTS = [{"name": "a", "model": "echo:a", "count": 2}]


def make_job(
    folder: Path, num_partitions: int, agents: list[dict[str, Any]], **cluster: Any
) -> Job:
    """Build a job of so many partitions; writes its corpus, if it is not there."""
    corpus = folder / f"corpus-{num_partitions}.jsonl"
    if not corpus.exists():
        with corpus.with_suffix(".tmp").open("w") as file:
            for i in range(num_partitions * RECORDS):
                file.write(f'{{"id": "r{i}", "text": "record {i} has a few words"}}\n')
        corpus.with_suffix(".tmp").rename(corpus)
    return check_job(
        {
            "name": f"scale-{num_partitions}",
            "corpus": {"path": str(corpus), "id": "id"},
            "task": {"kind": "summarize", "max_new_tokens": 4},
            "agents": agents,
            "merge": {"method": "vote"},
            "partition": {"max_records": RECORDS},
            "output": {"path": str(folder / "runs")},
            "cluster": {"dashboard_address": None, **cluster},
        }
    )


# The folder alone


@dataclass(frozen=True)
class LinkingStore(Store):
    """Writes the first table of a folder; every other name there is a hard link of it."""

    first: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Folder → a file that was written, and its names so far."""

    def commit_table(self, name: str, table: pa.Table) -> bool:
        folder = name.rpartition("/")[0]
        written, names = self.first.get(folder, ("", LINKS))
        if names == LINKS:
            self.first[folder] = (name, 1)
            return super().commit_table(name, table)
        Path(self.path(name)).hardlink_to(self.path(written))
        self.first[folder] = (written, names + 1)
        return True


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step took."""

    time_us: float
    """Per partition."""
    growth_mb: float
    """Of the process's memory, at its peak over where it began."""


def measure(step: Callable[[], object], num_partitions: int) -> Cost:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    return Cost(seconds / num_partitions * 1e6, max(0, peak - before) / MB)


def write_folder(folder: Path, num_partitions: int) -> dict[str, Cost]:
    """Make the folder of a run that lacks only its manifest."""
    job = make_job(folder, num_partitions, TWO_AGENTS)
    store = LinkingStore(str(folder / f"run-{num_partitions}"))
    corpus = CorpusReader(job.corpus)
    partitions = partition(
        corpus, max_tokens=10**9, max_records=RECORDS, tokens_per_record=job.task.max_new_tokens
    )
    staging = measure(lambda: stage(store, corpus, partitions), num_partitions)
    records = read_records(store, 0, corpus.passthrough_schema())
    answers = {agent: answers_of(agent, records) for agent in AGENTS}
    merged, none = merge_answers(records, pa.concat_tables(answers.values()), merge_spec(job))
    failed = pa.Table.from_pylist(
        [{"record_id": "r0", "stage": "answer", "reason": "too_long"}], schema=FAILURES
    )
    for index in range(num_partitions):
        for agent, table in answers.items():
            store.commit_table(answers_name(index, agent), table)
        if index % FAILED_EVERY:
            commit_results(store, index, merged, none, AGENTS)
        else:
            commit_results(Store(store.url), index, merged.slice(1), failed, AGENTS)
    return {"staging, without the writing": staging}


def answers_of(agent: str, records: pa.Table) -> pa.Table:
    same = {"agent_id": agent, "family_id": f"echo:{agent}", "sample_id": 0}
    rows = records.select(["record_id", "text"]).to_pylist()
    return pa.Table.from_pylist([row | same | {"finish_reason": "stop"} for row in rows], ANSWERS)


def read_folder(folder: Path, num_partitions: int) -> dict[str, Cost]:
    """Do what the submitting process does, from a resumed run's plan to a reader's names."""
    job = make_job(folder, num_partitions, TWO_AGENTS)
    store = Store(str(folder / f"run-{num_partitions}"))
    plan = read_plan(store)
    assert plan is not None
    done = committed(store, plan, AGENTS)
    nothing_merged = Committed(np.zeros_like(done.is_merged), done.is_answered)
    ref = RunRef(store, "", job.task, merge_spec(job), None, plan.passthrough, keep_text=True)
    counted = range(min(COUNTED, num_partitions))

    def publish() -> None:
        failures = {
            index: f"failures/{partition_stem(index)}-0123456789ab.parquet"
            for index in range(0, num_partitions, FAILED_EVERY)
        }
        answers = {agent: [[0, num_partitions]] for agent in AGENTS}
        files = manifest_files(plan, answers, failures, [])
        manifest = {"format": FORMAT, "run": store.url, "files": files}
        write_manifest(store, manifest)

    def list_names() -> None:
        run = open_run(store.url)
        for table in ("results", "failures", "answers"):
            exhaust(run.files(table))

    steps: dict[str, Callable[[], object]] = {
        "reading the plan": lambda: read_plan(store),
        "listing what is committed": lambda: committed(store, plan, AGENTS),
        "iterating over the work": lambda: exhaust(asking._unmerged(plan, nothing_merged)),
        "manifest": publish,
        "collecting orphans": store.remove_orphans,
        "opening the run, its files' names": list_names,
    }
    costs = {name: measure(step, num_partitions) for name, step in steps.items()}
    counting = measure(lambda: partition_statistics(ref, counted, AGENTS), len(counted))
    return costs | {"counting (a worker's)": counting}


def exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass


def in_new_process(
    function: Callable[[Path, int], dict[str, Cost]], folder: Path, size: int
) -> dict[str, Cost]:
    """Call it twice: first with a small folder, so that the first use of a library is not timed."""
    small = folder / f"small-{size}"
    small.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(function, small, 20).result()
        return pool.submit(function, folder, size).result()


def folder_table(folder: Path, sizes: Sequence[int]) -> str:
    costs: dict[int, dict[str, Cost]] = {}
    for size in sizes:
        written = in_new_process(write_folder, folder, size)
        costs[size] = written | in_new_process(read_folder, folder, size)
        print(f"{size:,} partitions measured", file=sys.stderr)
    least, most = min(sizes), max(sizes)
    heads = [f"µs, {n:,}" for n in sizes] + ["ratio"] + [f"MB, {n:,}" for n in sizes]
    lines = [
        f"| per partition | {' | '.join(heads)} | bytes each |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for step in costs[least]:
        each = [costs[n][step] for n in sizes]
        ratio = costs[most][step].time_us / costs[least][step].time_us
        cells = [f"{cost.time_us:.1f}" for cost in each] + [f"{ratio:.2f}"]
        cells += [f"{cost.growth_mb:.1f}" for cost in each]
        cells.append(f"{costs[most][step].growth_mb * MB / most:.0f}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Whole runs


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at one moment."""

    at_s: float
    """Unix time."""
    cpu_s: float
    rss_mb: float


@contextmanager
def started(*command: str, environ: Mapping[str, str]) -> Iterator[psutil.Process]:
    with subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.DEVNULL, env={**os.environ, **environ}
    ) as child:
        try:
            yield psutil.Process(child.pid)
        finally:
            child.terminate()


@contextmanager
def dask_cluster(folder: Path, ring: int) -> Iterator[dict[str, psutil.Process]]:
    """A scheduler and two workers, each a process; yields them by name.

    Args:
        ring: entries of each of Dask's logs in memory. They take up to an hour to fill, and
            while they fill nothing can be said of what grows besides.
    """
    environ = {
        "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": str(ring),
        "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": str(ring),
        "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__LOG_LENGTH": str(ring),
    }
    file = str(Path(tempfile.mkdtemp(dir=folder)) / "scheduler.json")
    common = ("--scheduler-file", file, "--no-dashboard")
    with ExitStack() as stack:
        scheduler = stack.enter_context(
            started(
                *("distributed.cli.dask_scheduler", *common, "--host", "127.0.0.1"),
                *("--port", "0", "--dashboard-address", "127.0.0.1:0"),
                environ=environ,
            )
        )
        workers = {
            f"worker {name}": stack.enter_context(
                started(
                    *("distributed.cli.dask_worker", *common, "--no-nanny", "--name", name),
                    *("--nthreads", "1", "--resources", "summarize=1"),
                    environ=environ,
                )
            )
            for name in AGENTS
        }
        yield {"scheduler": scheduler, **workers}


def submit(job: Job, times: Any) -> None:
    """Run the job; put when its first merge was, with their number, and when the last and the end.

    The first merge, as before it the scheduler and the workers import what the run needs.
    """
    first = last = 0.0
    num_merged = 0

    def note(event: Event) -> None:
        nonlocal first, last, num_merged
        if isinstance(event, PartitionMerged):
            last = time.time()
            first = first or last
            num_merged += 1

    pipeline.run(job, emit=note)
    times.put((first, num_merged))
    times.put((last, time.time()))


def whole_run(folder: Path, num_partitions: int, ring: int) -> dict[str, Any]:
    """Run a job to its end; returns its figures, also those of an earlier call."""
    report = folder / f"run-{num_partitions}.json"
    if report.exists():
        figures: dict[str, Any] = json.loads(report.read_text())
        return figures
    context = multiprocessing.get_context("spawn")
    times = context.SimpleQueue()
    with dask_cluster(folder, ring) as processes:
        file = processes["scheduler"].cmdline()[4]
        wait_for_file(Path(file))
        job = make_job(folder, num_partitions, TWO_HOSTS, scheduler_file=file, wait_s=30)
        client = context.Process(target=submit, args=(job, times))
        client.start()
        samples = sample_until_end(client, processes | {"client": psutil.Process(client.pid)})
    if client.exitcode:
        raise SystemExit(f"{num_partitions:,} partitions: the run failed; the same command resumes")
    figures = summarize(num_partitions, samples, times.get(), times.get())
    report.write_text(json.dumps(figures, indent=1))
    return figures


def wait_for_file(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        if time.monotonic() > deadline:
            raise SystemExit("the scheduler did not start")
        time.sleep(0.1)


def sample_until_end(client: Any, processes: dict[str, psutil.Process]) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in processes}
    while client.is_alive():
        for name, process in processes.items():
            try:
                with process.oneshot():
                    cpu, rss = process.cpu_times(), process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # the client, just now
            samples[name].append(Sample(time.time(), cpu.user + cpu.system, rss / MB))
        client.join(SAMPLE_S)
    return samples


def summarize(
    num_partitions: int,
    samples: dict[str, list[Sample]],
    start: tuple[float, int],
    end: tuple[float, float],
) -> dict[str, Any]:
    """Reduce samples to figures of the time between the first and the last merge."""
    (first_s, num_merged), (last_s, end_s) = start, end
    if last_s - first_s < 2 * SAMPLE_S:
        raise SystemExit(f"{num_partitions:,} partitions: there was too little (left) to sample")
    figures: dict[str, Any] = {
        "partitions": num_partitions,
        "partitions_of_this_execution": num_merged,
        "wall_ms": (last_s - first_s) / num_merged * 1e3,
        "statistics_and_manifest_ms": (end_s - last_s) / num_partitions * 1e3,
    }
    for name, taken in samples.items():
        within = [s for s in taken if first_s <= s.at_s <= last_s]
        tenth = max(1, len(within) // 10)
        figures[name] = {
            "cpu_ms": (within[-1].cpu_s - within[0].cpu_s) / num_merged * 1e3,
            "first_tenth_mb": max(s.rss_mb for s in within[:tenth]),
            "last_tenth_mb": max(s.rss_mb for s in within[-tenth:]),
            "peak_mb": max(s.rss_mb for s in taken),
            "tenths_mb": [
                round(max(s.rss_mb for s in within[i * tenth : (i + 1) * tenth]), 1)
                for i in range(min(10, len(within)))
            ],
        }
    return figures


def run_table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| partitions | wall, ms each | client CPU | scheduler CPU | workers' CPU "
        "| statistics and manifest, ms each | scheduler MB, first → last tenth (peak) "
        "| client MB, first → last tenth (peak) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        workers = sum(run[f"worker {name}"]["cpu_ms"] for name in AGENTS)
        cpu = (run["client"]["cpu_ms"], run["scheduler"]["cpu_ms"], workers)
        memory = [
            f"{run[name]['first_tenth_mb']:.0f} → {run[name]['last_tenth_mb']:.0f} "
            f"({run[name]['peak_mb']:.0f})"
            for name in ("scheduler", "client")
        ]
        figures = (run["wall_ms"], *cpu, run["statistics_and_manifest_ms"])
        cells = [f"{run['partitions']:,}", *(f"{x:.2f}" for x in figures), *memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, nargs="+", help="sizes to compare")
    parser.add_argument("--run", action="store_true", help="whole runs on a Dask cluster")
    parser.add_argument("--folder", type=Path, help="keep files and figures here, and resume")
    parser.add_argument("--ring", type=int, default=1000, help="length of Dask's logs in memory")
    options = parser.parse_args()
    sizes = options.partitions or ([1000, 10_000] if options.run else [1000, 10_000, 100_000])
    with tempfile.TemporaryDirectory(prefix="mas-batch-scale-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if options.run:
            print(run_table([whole_run(folder, size, options.ring) for size in sizes]))
        else:
            print(folder_table(Path(temporary), sizes))


if __name__ == "__main__":
    main()
