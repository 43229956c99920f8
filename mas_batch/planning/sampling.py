"""Measures a job: runs it on a sample of its records, in two sizes of partition.

What other programs take of this machine meanwhile is measured too.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from distributed import Client

from mas_batch import cluster, pipeline
from mas_batch.agents.posts import posts_of
from mas_batch.job import Corpus, Job, Output, Partitioning, Routing
from mas_batch.planning.rates import with_hosts
from mas_batch.records import Record
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store
from mas_batch.scratch import scratch_folder

_PARTITIONS_OF_SAMPLE = 4
_SMALLER_BY = 4
"""The second run's partitions, of every second record: what a task costs whatever is in it shows
only beside tasks of another size."""


@contextmanager
def sampled(
    job: Job,
    records: Sequence[Record],
    client: Client | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Run]]:
    """Run the job on these records and yield the runs, which are removed in the end.

    Every agent is asked about every record, on as many hosts as the job allows: nothing is
    stopped early, escalated or asked twice, so that what is measured is what a question takes.

    Args:
        tell: called with a line for people before each run.

    Raises:
        MasBatchError: a run of the sample failed, for the reason that the job's own would.
    """
    with scratch_folder() as folder:
        output = _output(job, client, folder)
        try:
            runs = []
            for number, sizing in enumerate(sizes(job, len(records))):
                asked = records[:: number + 1]
                tell(_sentence(job, len(asked), sizing))
                corpus = folder / f"sample-{number}.jsonl"
                corpus.write_text("".join(map(_line, asked)), encoding="utf-8")
                part = _of_sample(job, corpus, output, sizing, any(r.context for r in asked))
                runs.append(open_run(pipeline.run(part, client=client).run, output.options))
            yield runs
        finally:
            output.remove_folder("")


def sizes(job: Job, num_records: int) -> list[Partitioning]:
    """Return the sizes of the sample's partitions: the job's where that gives several, and less."""
    own = job.partition
    large = max(1, min(own.max_records, num_records // _PARTITIONS_OF_SAMPLE))
    small = max(1, large // _SMALLER_BY)
    found = [own.with_changes(max_records=large)]
    if small < large:
        tokens = max(1, own.max_tokens // _SMALLER_BY)
        found.append(Partitioning(max_tokens=tokens, max_records=small))
    return found


def _of_sample(
    job: Job, corpus: Path, output: Store, sizing: Partitioning, with_context: bool
) -> Job:
    context = "context" if with_context else None
    routing = Routing(
        window=job.routing.window,
        timeout_s=job.routing.timeout_s,
        max_attempts=job.routing.max_attempts,
        speculate=False,
    )
    job = with_hosts(job, {post.name: post.most for post in posts_of(job)})
    return job.with_changes(
        corpus=Corpus(path=(str(corpus),), id="id", context=context),
        routing=routing,
        merge=job.merge.with_changes(history=None, calibrate=None),  # few of it are labelled
        partition=sizing,
        since=None,
        output=Output(
            path=output.url, storage_options=dict(output.options), max_failed_fraction=1.0
        ),
    )


def _output(job: Job, client: Client | None, folder: Path) -> Store:
    """Return a folder that the job's workers can write to: on a user's cluster, near the runs."""
    if cluster.is_embedded(job.cluster, client or cluster.current_client()):
        return Store(f"{folder}/runs")
    return Store(job.output.path, job.output.storage_options).child(f"plan-{uuid.uuid4().hex}")


def _line(record: Record) -> str:
    row = {"id": record.record_id, "text": record.text}
    if record.context:
        row["context"] = record.context
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sentence(job: Job, num_records: int, sizing: Partitioning) -> str:
    agents = f"{len(job.agents)} agents" if len(job.agents) > 1 else "the agent"
    return f"asking {agents} about {num_records} records in partitions of {sizing.max_records}"


@dataclass(slots=True)
class OtherPrograms:
    """All programs but this one and its children."""

    num_cores: float = 0.0
    """Cores that they kept busy on average, known at the end."""


@contextmanager
def other_programs() -> Iterator[OtherPrograms]:
    """Measure them meanwhile; children count as this program's when they have ended by the end."""
    found, start, before = OtherPrograms(), time.perf_counter(), _others_busy_s()
    yield found
    found.num_cores = max(0.0, _others_busy_s() - before) / (time.perf_counter() - start)


def _others_busy_s() -> float:
    every = psutil.cpu_times()
    own = sum(os.times()[:4])  # user and system time of this process and of ended children
    return float(every.user + every.nice + every.system - own)
