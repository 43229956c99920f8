"""Worker side of merges that need the whole corpus: leaves of trees over its partitions.

Only counts travel up a tree. The worker that reads a partition merges its texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.agents.encoding import encoder_for
from mas_batch.agents.statistics import COMMITTED
from mas_batch.agents.work import (
    agents_merged,
    agents_with_answers,
    commit_merged,
    committed_answers,
    merge_committed,
    merge_partition,
)
from mas_batch.aggregate.escalation import CONFIDENCES
from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.reductions import Partial, Reduction, add_up
from mas_batch.aggregate.verdicts import key_of
from mas_batch.errors import RunError
from mas_batch.run_folder.names import results_name, staged_name
from mas_batch.run_folder.plan import read_records
from mas_batch.run_folder.ref import RunRef


def corpus_counts(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Count what the merge learns from (`Method.weights`); it must be one that learns."""
    learning = run.merge.learning
    if learning is None:
        raise RunError(f"merge.method {run.merge.method!r} learns nothing from a corpus")
    found = []
    for partition in partitions:
        answers = committed_answers(run, partition, agents_merged(run, partition, agents))
        encode = encoder_for(run.merge, answers)
        found.append(learning.count(answers, run.merge, agents, encode))
    combined: Partial = learning.reduction.combine(found)
    return combined


def labelled_confidences(
    labels: Mapping[str, str], run: RunRef, partitions: Sequence[int], agents: Sequence[str]
) -> Partial:
    """Merge the records whose right answer is known: how sure, and whether right."""
    key, pairs = key_of(run.merge), []
    for partition in partitions:
        records = run.store.read_table(staged_name(partition))
        records = records.filter(pc.is_in(records["record_id"], pa.array(labels)))
        if not records.num_rows:
            continue
        voters = agents_merged(run, partition, agents)
        answers = committed_answers(run, partition, voters)
        answers = answers.filter(pc.is_in(answers["record_id"], records["record_id"]))
        encode = encoder_for(run.merge, answers)
        merged, _ = merge_answers(records, answers, run.merge, encode)
        for row in merged.select(["record_id", "answer", "confidence"]).to_pylist():
            right = key(row["answer"]) == labels[row["record_id"]]
            pairs.append([row["record_id"], row["confidence"], right])
    return {"pairs": pairs}


LABELLED = Reduction(
    "labelled",
    labelled_confidences,
    lambda partials: {"pairs": sorted(pair for each in partials for pair in each["pairs"])},
    dict,
)
"""[record, confidence, whether right] of labelled records."""


def confidence_counts(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Count records by the confidence of their merge, to find the least confident ones."""
    return CONFIDENCES.combine(
        [_confidence_counts_of(run, partition, agents) for partition in partitions]
    )


def merge_known(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Merge partitions that have all their answers, as `merge_partition` does; count them."""
    for partition in partitions:
        if not run.merged.exists(results_name(partition)):
            merge_partition(run, partition, agents_with_answers(run, partition, agents))
    return {"partitions": len(partitions)}


MERGED = Reduction("merged", merge_known, add_up, dict)
"""Number of partitions that are merged without asking an agent."""


def merge_and_count(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Merge the partitions' answers and commit them; count them as the statistics tree does."""
    return COMMITTED.combine([_merge_and_count_one(run, p, agents) for p in partitions])


def _confidence_counts_of(run: RunRef, partition: int, agents: Sequence[str]) -> Partial:
    records = run.store.read_table(staged_name(partition))
    voters = agents_merged(run, partition, agents)
    merged, failures = merge_committed(run, partition, voters, records)
    askable = records.filter(pc.is_null(records["reason"]))["record_id"]
    asked = failures.filter(pc.is_in(failures["record_id"], askable))
    return CONFIDENCES.chunk(merged, asked)


def _merge_and_count_one(run: RunRef, partition: int, agents: Sequence[str]) -> Partial:
    if not run.merged.exists(results_name(partition)):
        records = read_records(run.store, partition, run.passthrough)
        voters = agents_merged(run, partition, agents)
        merged, failures = merge_committed(run, partition, voters, records)
        commit_merged(run, partition, merged, failures, voters)
    return COMMITTED.chunk(run, partition, agents)
