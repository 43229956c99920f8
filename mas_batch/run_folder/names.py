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
        escalation.json                       which records one more agent was asked about
        merges/<name>/                        the answers merged again: results, failures, manifest,
                                              and merge.json, how
        engines.json                          what each agent's engine says of itself
        since.json                            what is reused of an earlier run; see `incremental`
        reused/                               its answers, until a partition's others are there
        events/<time>-0000.jsonl              every routing decision and every outcome
        evaluation/                           what `mas-batch evaluate` has found
        journal/                              while a record that kills its worker is searched for
        first-pass/                           while answers come, if the merge needs all of them
        manifest.json                         what is valid, counts, versions; published last
        report.html                           all of it for people; see `report`

The folder's name is a hash of everything that determines the results, so that resuming is
a matter of which files exist: the same job finds its own files, a changed one never does.
"""

from __future__ import annotations

from collections.abc import Sequence

from mas_batch.job import Job, fingerprint
from mas_batch.run_folder.storage import Store

FORMAT = 3
"""Version of this layout; a change of it is a change of every fingerprint.

1: the manifest named every file. 2: it holds ranges of partition numbers; see `manifest_files`.
3: a results file names the agents whose answers it merges, and has a column `coverage`.
"""

FIRST_PASS = "first-pass"
"""Folder of merges that serve until the whole corpus is answered."""

SECOND_PASS = "second-pass"
"""Folder of merges that only say which partitions' escalated records are answered."""

MERGES = "merges"
"""Folder of merges that were made afterwards, each a folder with a manifest."""

MERGE_SECTION = "merge.json"
"""File of such a merge: the effective `merge` section that it is made by."""

EVALUATION = "evaluation"
"""Folder of what `mas-batch evaluate` has found; see `evaluation.write`."""

REUSED = "reused"
"""Folder of an earlier run's answers, by partition and agent, until all others are there too."""

JOURNAL = "journal"
"""Folder of what `agents.quarantine` notes in one execution: the next may have better machines."""

LEDGER_FOLDER = "ledger"
"""Folder of the files of the run's ledger; see `latency.ledger`."""

PASSES = (JOURNAL, REUSED, FIRST_PASS, SECOND_PASS)
"""Folders that serve one execution or until the run is published."""


def part(partition: int) -> str:
    """Return the stem of a partition's files."""
    return f"part-{partition:06d}"


def staged_name(partition: int) -> str:
    """Return where the partition's records are."""
    return f"partitions/{part(partition)}.parquet"


def answers_name(partition: int, agent_id: str) -> str:
    """Return where the agent's answers to the partition are."""
    return f"answers/agent={agent_id}/{part(partition)}.parquet"


def reused_name(partition: int, agent_id: str) -> str:
    """Return where those of the agent's answers are that an earlier run has, if not all."""
    return f"{REUSED}/agent={agent_id}/{part(partition)}.parquet"


def results_name(partition: int) -> str:
    """Return where the partition's results are."""
    return f"results/{part(partition)}.parquet"


def review_name(partition: int) -> str:
    """Return where those of the partition's results are that people should look at."""
    return f"review/{part(partition)}.parquet"


def run_name(job: Job, corpus: str, taught: Sequence[str | None]) -> str:
    """Name the run after everything that determines its results.

    Args:
        corpus: fingerprint of the corpus's files.
        taught: of every agent, in the job's order, the fingerprint of the examples that it
            learns from; None for one without.
    """
    return f"{job.name}-{fingerprint([FORMAT, job.identity(), corpus, taught])}"


def earlier_runs(output: Store, job_name: str, current: str) -> list[str]:
    """List other runs of a job of that name: what changed made a new one."""
    prefix_length = len(current) - len(job_name) - 1
    return sorted(
        name
        for name in output.list("")
        if name != current
        and name.startswith(f"{job_name}-")
        and len(name) == len(job_name) + 1 + prefix_length
    )
