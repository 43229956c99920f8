"""Worker side of merges that need the whole corpus: leaves of trees over its partitions.

Only counts travel up a tree. The worker that reads a partition merges its texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
from mas_batch.aggregate.escalation import CONFIDENCES, LABELS, SAMPLE
from mas_batch.aggregate.label_weights import Labelled, features
from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.reductions import Partial, Reduction, add_up
from mas_batch.aggregate.verdicts import ballots_of, key_of, verdict_of
from mas_batch.errors import RunError
from mas_batch.run_folder.names import SAMPLE_PASS, results_name, staged_name
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


def labelled_records(
    labels: Mapping[str, str], run: RunRef, partitions: Sequence[int], agents: Sequence[str]
) -> Partial:
    """Merge the records whose right answer is known: what speaks for which answer."""
    found = []
    for partition in partitions:
        records = run.store.read_table(staged_name(partition))
        records = records.filter(pc.is_in(records["record_id"], pa.array(labels)))
        if not records.num_rows:
            continue
        voters = agents_merged(run, partition, agents)
        answers = committed_answers(run, partition, voters)
        answers = answers.filter(pc.is_in(answers["record_id"], records["record_id"]))
        known: dict[str, Any] = {}
        for record_id, rows in replies_by_record(records, answers).items():
            ballots = ballots_of(rows, run.merge)
            verdict = verdict_of(ballots, run.merge, known=known) if ballots else None
            if verdict is None or verdict.confidence is None:
                continue  # a single answer may have no confidence
            keys = [candidate.backers[0].key for candidate in verdict.support]
            right = keys.index(labels[record_id]) if labels[record_id] in keys else -1
            labelled = Labelled(verdict.confidence, right, features(verdict))
            found.append((record_id, labelled))
    return {"records": found}


LABELLED = Reduction(
    "labelled",
    labelled_records,
    lambda partials: {
        "records": sorted(
            (pair for each in partials for pair in each["records"]), key=lambda pair: pair[0]
        )
    },
    dict,
)
"""(record, `Labelled`) of labelled records, in order of their ids."""


def confidence_counts(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Count records by the confidence of their merge, to find the least confident ones."""
    return CONFIDENCES.combine(
        [_confidence_counts_of(run, partition, agents) for partition in partitions]
    )


def sample_lots(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Find the lowest lots of these partitions' answered records, for the escalation's sample."""
    assert run.escalation is not None
    sample = run.escalation.sample
    merged = (_merged_by(run, partition, agents)[0] for partition in partitions)
    return SAMPLE.combine([SAMPLE.chunk(results, sample) for results in merged])


def sample_labels(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Compare merged answers with those that the escalation's agent gave to the sample."""
    return LABELS.combine([_labels_of(run, partition, agents) for partition in partitions])


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
    return CONFIDENCES.chunk(*_merged_by(run, partition, agents))


def _merged_by(run: RunRef, partition: int, agents: Sequence[str]) -> tuple[pa.Table, pa.Table]:
    """Merge what these agents have answered; returns results, and failures that can be asked."""
    records = run.store.read_table(staged_name(partition))
    voters = agents_merged(run, partition, agents)
    merged, failures = merge_committed(run, partition, voters, records)
    askable = records.filter(pc.is_null(records["reason"]))["record_id"]
    return merged, failures.filter(pc.is_in(failures["record_id"], askable))


def _labels_of(run: RunRef, partition: int, agents: Sequence[str]) -> Partial:
    """Compare with the sample's answers; to have been asked in vain counts as another answer."""
    assert run.escalation is not None
    agent_id, sample = run.escalation.agent_id, run.escalation.sample
    assert sample is not None
    results, _ = _merged_by(run, partition, agents)
    sampled = [sample.lot(record) <= sample.last_lot for record in results["record_id"].to_pylist()]
    results = results.filter(pa.array(sampled, pa.bool_()))
    records = run.store.read_table(staged_name(partition))
    own = replace(run, answers_into=SAMPLE_PASS, passes=(SAMPLE_PASS,))
    voters = agents_merged(own, partition, [agent_id])
    theirs, _ = merge_committed(own, partition, voters, records)
    key = key_of(run.merge)
    said = dict(zip(*(theirs[name].to_pylist() for name in ("record_id", "answer")), strict=True))
    keys = pa.array([key(answer) for answer in results["answer"].to_pylist()], pa.string())
    return LABELS.chunk(
        results.append_column("key", keys),
        {
            record: key(said[record]) if record in said else None
            for record in results["record_id"].to_pylist()
        },
    )


def _merge_and_count_one(run: RunRef, partition: int, agents: Sequence[str]) -> Partial:
    if not run.merged.exists(results_name(partition)):
        records = read_records(run.store, partition, run.passthrough)
        voters = agents_merged(run, partition, agents)
        merged, failures = merge_committed(run, partition, voters, records)
        commit_merged(run, partition, merged, failures, voters)
    return COMMITTED.chunk(run, partition, agents)
