"""Answers table → results table, one partition at a time.

The outcome is the same to the byte for any order of the answers' rows, for repeated rows of
retries, and however the records are cut into partitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mas_batch.aggregate.ballots import Candidate, Verdict
from mas_batch.aggregate.coverage import fragment_coverage
from mas_batch.aggregate.method import Encode, MergeSpec
from mas_batch.aggregate.normalise import deduplicate
from mas_batch.aggregate.verdicts import ballots_of, verdict_of
from mas_batch.errors import Reason, RunError
from mas_batch.records import FAILURES, RECORD_FIELDS, RESULT_FIELDS, STANDARD_ERROR

# Why a record has no answer, most telling first: what the record itself causes, what the
# agent said, what broke on the way.
_TELLING = (
    Reason.TOO_LONG,
    Reason.UNPARSABLE_ANSWER,
    Reason.EMPTY_ANSWER,
    Reason.OUT_OF_MEMORY,
    Reason.WORKER_DIED,
    Reason.ENGINE_ERROR,
    Reason.AGENT_FAILED,
)

_REPLY_COLUMNS = [
    *("record_id", "agent_id", "family_id", "sample_id", "attempt", "text", "label", "value"),
    "probs",
    *("finish_reason", "num_parts", "reason", "message", "sum_logprob", "completion_tokens"),
]


def merge_answers(
    records: pa.Table, answers: pa.Table, spec: MergeSpec, encode: Encode | None = None
) -> tuple[pa.Table, pa.Table]:
    """Merge a partition's answers; returns (results, failures), both in record order.

    Every record is in exactly one of them. Answers with a reason are missing answers; a
    record that has only such fails with the most telling of their reasons.

    Args:
        records: `RECORD_FIELDS` and passthrough columns; the latter are kept.
        answers: `ANSWERS` rows for these records, in any order, repeated or not.
        encode: texts → vectors [N, d] of length 1, for `utility: embedding`.

    Raises:
        RunError: the tables contradict each other or their contract.
        JobError: `weighted` lacks an agent's accuracy.
    """
    replies = replies_by_record(records, answers)
    known: dict[str, Any] = {}
    positions: list[int] = []
    verdicts: list[Verdict] = []
    failures: list[dict[str, Any]] = []
    columns = records.select(["record_id", "reason", "message"]).to_pylist()
    for position, record in enumerate(columns):
        rows = replies[record["record_id"]]
        ballots = ballots_of(rows, spec)
        if record["reason"] is not None:
            failures.append(_failure(record["record_id"], record))
        elif ballots:
            positions.append(position)
            verdicts.append(verdict_of(ballots, spec, encode, known))
        else:
            failures.append(_failure(record["record_id"], _most_telling(rows)))
    return _results(records, positions, verdicts, spec), pa.Table.from_pylist(failures, FAILURES)


def replies_by_record(records: pa.Table, answers: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """Group the answers' rows by record, without repeats, in order of agent and sample.

    Raises:
        RunError: a record is there twice, or one that answers are for is not there.
    """
    replies: dict[str, list[dict[str, Any]]] = {}
    for record_id in records["record_id"].to_pylist():
        if record_id in replies:
            raise RunError(f"records: record_id {record_id!r} is there twice; ids must differ")
        replies[record_id] = []
    for row in deduplicate(answers).select(_REPLY_COLUMNS).to_pylist():
        if row["record_id"] not in replies:
            raise RunError(
                f"answers: agent {row['agent_id']!r} answered record {row['record_id']!r}, "
                "which is not in this partition"
            )
        replies[row["record_id"]].append(row)
    return replies


def _most_telling(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose among failed answers; rows come in order of agent and sample, and the first wins."""
    if not rows:
        return {"reason": Reason.AGENT_FAILED, "message": "no agent gave an answer"}
    return min(rows, key=lambda row: _telling_rank(row["reason"]))


def _telling_rank(reason: str) -> int:
    return _TELLING.index(Reason(reason)) if reason in _TELLING else len(_TELLING)


def _failure(record_id: str, cause: Mapping[str, Any]) -> dict[str, Any]:
    try:
        reason = Reason(cause["reason"])
    except ValueError:
        raise RunError(
            f"record {record_id!r}: reason {cause['reason']!r} is unknown; "
            f"allowed: {', '.join(Reason)}"
        ) from None
    return {
        "record_id": record_id,
        "stage": reason.stage,
        "reason": str(reason),
        "message": cause["message"],
        "agent_id": cause.get("agent_id"),
        "attempt": cause.get("attempt"),
        "worth_retrying": reason.worth_retrying,
    }


def _results(
    records: pa.Table, positions: Sequence[int], verdicts: Sequence[Verdict], spec: MergeSpec
) -> pa.Table:
    """Put the verdicts beside the columns of their records that results keep."""
    staged = {field.name for field in RECORD_FIELDS}
    kept = ["record_id", "text", "reference"]
    kept += [name for name in records.column_names if name not in staged]
    left = records.select(kept).take(pa.array(positions, pa.int64())).combine_chunks()
    texts = left["text"].to_pylist() if spec.covers_text else [None] * len(verdicts)
    rows = [result_row(v, spec, text) for v, text in zip(verdicts, texts, strict=True)]
    right = pa.Table.from_pylist(rows, pa.schema(RESULT_FIELDS))
    schema = pa.schema([*(left.schema.field(name) for name in kept), *RESULT_FIELDS])
    return pa.table([*left.columns, *right.columns], schema=schema)


def result_row(verdict: Verdict, spec: MergeSpec, source: str | None) -> dict[str, Any]:
    """Return the `RESULT_FIELDS` of a verdict; `source` is the record's text, for its coverage."""
    comparable = None if verdict.confidence_kind == STANDARD_ERROR else verdict.confidence
    in_parts = (verdict.chosen.num_parts or 1) > 1
    return {
        "answer": verdict.answer,
        "value": verdict.value,
        "method": spec.method,
        "confidence": verdict.confidence,
        "confidence_kind": verdict.confidence_kind,
        "margin": verdict.margin,
        "entropy": verdict.entropy,
        "num_answers": sum(len(candidate.backers) for candidate in verdict.support),
        "num_distinct": len(verdict.support),
        "support": [_supporter(candidate) for candidate in verdict.support],
        "tie": verdict.tie,
        "abstain": comparable is not None and comparable < spec.abstain_below,
        "finish_reason": verdict.chosen.finish_reason,
        "num_parts": verdict.chosen.num_parts,
        "coverage": fragment_coverage(verdict.answer, source) if in_parts and source else None,
    }


def _supporter(candidate: Candidate) -> dict[str, Any]:
    voters = sorted(ballot.voter for ballot in candidate.backers)
    return {"answer": candidate.answer, "weight": candidate.weight, "agents": voters}
