"""One pass over a run's tables, a partition at a time, keeping the top few."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import STANDARD_ERROR
from mas_batch.report.agreeing_pairs import PAIRS
from mas_batch.report.label_counts import count_confusion
from mas_batch.report.record_facts import (
    CandidateFacts,
    FailedAnswers,
    FailureExample,
    FailureGroup,
    RecordFacts,
    Scope,
)
from mas_batch.report.walk import (
    ANSWER_CHARS,
    ID_CHARS,
    MESSAGE_CHARS,
    TEXT_CHARS,
    clip_optional,
    published_answer,
    tables,
)
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip

NUM_SHOWN = 10
"""Least certain records."""
MAX_CANDIDATES = 5
MAX_BACKERS = 8
MAX_EXAMPLES = 3
"""Per reason of failure."""
MAX_FAILURE_FILES = 500
MAX_FAILED_ANSWERS = 30


@dataclass(frozen=True, slots=True)
class ResultsScan:
    """What one pass over the results finds."""

    scope: Scope
    doubtful: tuple[RecordFacts, ...]
    """Least certain first; records of which the merge is certain are left out."""
    pairs: Mapping[str, Mapping[str, float]]
    """See `agreeing_pairs.PAIRS`."""
    confidence_kind: str | None
    confusion: Mapping[tuple[str, str], int]
    """(Reference, published answer) → records; empty where references are not to be shown."""


def scan_results(
    run: Run, every: int, *, keep_text: bool, with_labels: bool = False
) -> ResultsScan:
    """Read every so many partitions of the results; one is in memory at a time.

    Args:
        with_labels: whether answers are labels, which are counted against the references.
        keep_text: the job's `output.keep_text`; False: references are not to be shown either.
    """
    doubtful: list[dict[str, Any]] = []
    pairs, num_records, kind = PAIRS.combine([]), 0, None
    confused: Counter[tuple[str, str]] = Counter()
    for table in tables(run, "results", every):
        num_records += table.num_rows
        pairs = PAIRS.combine([pairs, PAIRS.chunk(table)])
        kind = kind or next(iter(table["confidence_kind"].to_pylist()), None)
        if keep_text and with_labels:
            confused.update(count_confusion(table))
        doubtful = heapq.nlargest(NUM_SHOWN, [*doubtful, *_most_doubtful(table)], key=_by_doubt)
    records = tuple(_record(row, keep_text) for row in doubtful)
    agreeing = PAIRS.finalize(pairs)
    return ResultsScan(Scope(every, num_records), records, agreeing, kind, confused)


def failed_answers(run: Run, every: int) -> tuple[FailedAnswers, ...]:
    """Count by agent and reason in every so many partitions; one is in memory at a time."""
    found: Counter[tuple[str, str]] = Counter()
    for table in tables(run, "answers", every):
        failed = table.filter(pc.is_valid(table["reason"]))
        found.update(
            zip(*(failed[name].to_pylist() for name in ("agent_id", "reason")), strict=True)
        )
    return tuple(FailedAnswers(*key, num) for key, num in found.most_common(MAX_FAILED_ANSWERS))


def scan_failures(run: Run) -> tuple[FailureGroup, ...]:
    """Group the records without an answer by reason; counts are whole, examples the first few."""
    counts: dict[str, int] = run.manifest["counts"].get("failures_by_reason", {})
    examples: dict[str, list[FailureExample]] = {reason: [] for reason in counts}
    wanted = sum(min(MAX_EXAMPLES, count) for count in counts.values())
    for name, _ in zip(run.files("failures"), range(MAX_FAILURE_FILES), strict=False):
        for row in run.store.read_table(name).to_pylist():
            group = examples.setdefault(row["reason"], [])
            if len(group) < MAX_EXAMPLES:
                group.append(_failure(row))
        if sum(map(len, examples.values())) >= wanted:
            break
    most = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return tuple(FailureGroup(r, counts[r], tuple(examples[r])) for r in most)


def _most_doubtful(results: pa.Table) -> list[dict[str, Any]]:
    """Return the partition's most doubtful rows, with their `doubt`; none that is certain.

    Doubt is 1 - confidence, or its standard error; where confidence is not known there is none.
    """
    confidence = pc.cast(results["confidence"], pa.float64())
    is_error = pc.equal(results["confidence_kind"], STANDARD_ERROR)
    doubt = pc.if_else(is_error, confidence, pc.subtract(1.0, confidence))
    entropy = pc.fill_null(results["entropy"], 0.0)
    keys = pa.table({"doubt": doubt, "entropy": entropy, "record_id": results["record_id"]})
    order = pc.sort_indices(keys, [(name, "descending") for name in keys.column_names])
    top = results.append_column("doubt", doubt).take(order[:NUM_SHOWN])
    rows: list[dict[str, Any]] = top.filter(pc.greater(top["doubt"], 0)).to_pylist()
    return rows


def _by_doubt(row: Mapping[str, Any]) -> tuple[float, float, str]:
    return row["doubt"], row["entropy"] or 0.0, row["record_id"]


def _record(row: Mapping[str, Any], keep_text: bool) -> RecordFacts:
    support = row["support"] or []
    return RecordFacts(
        record_id=clip(row["record_id"], ID_CHARS),
        text=clip_optional(row.get("text"), TEXT_CHARS),
        reference=clip_optional(row.get("reference"), ANSWER_CHARS) if keep_text else None,
        answer=published_answer(row),
        confidence=row["confidence"],
        confidence_kind=row["confidence_kind"],
        tie=row["tie"],
        candidates=tuple(map(_candidate, support[:MAX_CANDIDATES])),
        num_more_candidates=max(0, len(support) - MAX_CANDIDATES),
    )


def _candidate(candidate: Mapping[str, Any]) -> CandidateFacts:
    agents = candidate["agents"] or []
    return CandidateFacts(
        clip(candidate["answer"], ANSWER_CHARS),
        tuple(agents[:MAX_BACKERS]),
        max(0, len(agents) - MAX_BACKERS),
    )


def _failure(row: Mapping[str, Any]) -> FailureExample:
    return FailureExample(
        clip(row["record_id"], ID_CHARS),
        row["agent_id"],
        clip(row["message"] or "", MESSAGE_CHARS),
    )
