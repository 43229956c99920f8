"""Names of a run and of the files in it.

    <output>/<job name>-<fingerprint>/
        job.yaml                              the effective job, without secrets
        partitions/part-000000.parquet        the records as read, one file per partition
        plan.parquet                          the partitions; committed when all are staged
        answers/agent=<name>/part-….parquet   one row per answer
        results/part-….parquet                one row per answered record
        failures/part-…-<hash>.parquet        one row per record without an answer
        review/part-….parquet                 records in a tie or of low confidence, for people
        agents.parquet                        per agent: answers, failures, tokens, times
        learned.json                          what the merge learned from the whole corpus
        calibration.json                      what labelled records have taught
        escalation-sample.json                of which sample one more agent was asked first
        escalation.json                       which records one more agent was asked about
        merges/<name>/                        the answers merged again: results, failures, manifest,
                                              and merge.json, which says how
        engines.json                          what each agent's engine says of itself
        since.json                            what is reused of an earlier run; see `incremental`
        reused/                               reused answers to part of a partition, until the
                                              agent has answered the rest
        events/<time>-0000.jsonl              every routing decision and every outcome
        evaluation/                           what `mas-batch evaluate` has found
        journal/                              while a record that kills its worker is searched for
        first-pass/                           provisional merges, if a merge needs the whole corpus
        sample-pass/                          one more agent's answers to a sample, until it has
                                              answered the other records that are escalated
        manifest.json                         valid files, counts, versions; published last
        report.html                           the run for people; see `report`

A retry of what failed in a run is a run of its own, `<job name>-<fingerprint>-retry-1` and so on.

The folder's name is a hash of everything that determines the results, so that resuming is
a matter of which files exist: the same job finds its own files, a changed one never does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mas_batch.job import Job, fingerprint
from mas_batch.run_folder.storage import Store

FORMAT = 3
"""Version of this layout; a change of it is a change of every fingerprint.

1: the manifest named every file. 2: it holds ranges of partition numbers; see `manifest_files`.
3: a results file names the agents whose answers it merges, and has a column `coverage`.
"""

FIRST_PASS = "first-pass"
"""Folder of provisional merges, used until the whole corpus is answered."""

SAMPLE_PASS = "sample-pass"
"""Folder of an agent's answers to the sample by which an escalation finds its threshold."""

SECOND_PASS = "second-pass"
"""Folder of merges that only mark the partitions whose escalated records are answered."""

MERGES = "merges"
"""Folder of merges that were made after the run, each a folder with a manifest."""

MERGE_SECTION = "merge.json"
"""File of such a merge: the effective `merge` section that it is made by."""

EVALUATION = "evaluation"
"""Folder of what `mas-batch evaluate` has found; see `evaluation.write`."""

REUSED = "reused"
"""Folder of an earlier run's answers to part of a partition, until the agent answers the rest."""

JOURNAL = "journal"
"""Folder of the journal of `agents.quarantine`. It is removed before each execution asks: the
machines of the next one may be better."""

LEDGER_FOLDER = "ledger"
"""Folder of the files of the run's ledger; see `latency.ledger`."""

PASSES = (JOURNAL, REUSED, FIRST_PASS, SAMPLE_PASS, SECOND_PASS)
"""Folders that are removed when the run is published."""


def partition_stem(partition: int) -> str:
    """Return the stem of a partition's files."""
    return f"part-{partition:06d}"


def staged_name(partition: int) -> str:
    """Return the name of the partition's staged records."""
    return f"partitions/{partition_stem(partition)}.parquet"


def answers_name(partition: int, agent_id: str) -> str:
    """Return the name of the agent's answers to the partition."""
    return f"answers/agent={agent_id}/{partition_stem(partition)}.parquet"


def reused_name(partition: int, agent_id: str) -> str:
    """Return the name of the agent's reused answers to part of the partition."""
    return f"{REUSED}/agent={agent_id}/{partition_stem(partition)}.parquet"


def results_name(partition: int) -> str:
    """Return the name of the partition's results."""
    return f"results/{partition_stem(partition)}.parquet"


def review_name(partition: int) -> str:
    """Return the name of the partition's doubtful results, which people should look at."""
    return f"review/{partition_stem(partition)}.parquet"


def run_name(job: Job, corpus: str, taught: Sequence[str | None]) -> str:
    """Name the run after everything that determines its results.

    Args:
        corpus: fingerprint of the corpus's files.
        taught: the fingerprint of the examples that each agent learns from, in the job's order;
            None for an agent without examples.
    """
    return f"{job.name}-{fingerprint([FORMAT, job.identity(), corpus, taught])}"


_RETRY = re.compile(r"-retry-([1-9][0-9]*)$")


def retry_name(name: str, number: int) -> str:
    """Name a run's n-th retry, which is a run of its own; 0 names the run itself."""
    return f"{name}-retry-{number}" if number else name


def first_version(name: str) -> str:
    """Return the name of the run of which this is a retry, or its own."""
    return _RETRY.sub("", name)


def retries(output: Store, name: str) -> list[int]:
    """List the numbers of a run's retries, published or not."""
    found = (_RETRY.search(other) for other in output.list("") if other.startswith(f"{name}-"))
    numbers = (int(match[1]) for match in found if match)
    return sorted(n for n in numbers if output.child(retry_name(name, n)).exists("job.yaml"))


def earlier_runs(output: Store, job_name: str, current: str) -> list[str]:
    """List the other runs of a job of that name: another job file, another corpus, retries."""
    length = len(first_version(current))
    return sorted(
        name
        for name in output.list("")
        if name != current
        and name.startswith(f"{job_name}-")
        and len(first_version(name)) == length
    )
