"""Answers table → results table, one partition at a time.

The outcome is the same to the byte for any order of the answers' rows, for repeated rows of
retries, and however the records are cut into partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mas_batch.aggregate.mbr import UTILITIES, minimum_bayes_risk
from mas_batch.aggregate.normalise import deduplicate, nfc, normalise_text, shown_answer
from mas_batch.aggregate.vote import (
    Ballot,
    Candidate,
    Verdict,
    mean,
    vote,
    weighted_linear,
    weighted_log_odds,
)
from mas_batch.errors import JobError, Reason, RunError
from mas_batch.records import FAILURES, RECORD_FIELDS, RESULT_FIELDS

# method: the kinds of answer that it can merge
_METHODS = {
    "vote": ("text", "label", "value"),
    "weighted": ("text", "label", "value"),
    "mean": ("value",),
    "mbr": ("text",),
}
_WEIGHTS = ("log-odds", "linear")

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


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the answers to a record become one.

    Raises:
        JobError: the method, utility, weights and kind of answer do not go together.
    """

    method: str
    """`vote`, `weighted`, `mean` or `mbr`."""
    utility: str | None
    """Of `mbr`: `chrf` or `rouge-l`; ignored by the other methods."""
    accuracies: Mapping[str, float]
    """Agent → how often it is right. `weighted` needs every agent's; in `mbr` and `mean` an
    agent without one weighs 1."""
    weights: str
    """Of `weighted`: `log-odds` or `linear`."""
    abstain_below: float
    """Lower confidences are marked; does not apply to `mean`, whose is a standard error."""
    answer_kind: str
    """Which column answers are compared by: `text`, `label` or `value`."""
    num_labels: int | None
    """Size of the closed set that the answers come from; None for an open one."""

    def __post_init__(self) -> None:
        _check_word("merge.method", self.method, _METHODS)
        _check_word("merge.weights", self.weights, _WEIGHTS)
        _check_word("task's answer_kind", self.answer_kind, _METHODS["vote"])
        kinds = _METHODS[self.method]
        if self.answer_kind not in kinds:
            raise JobError(
                f"{self.method!r} merges answers of kind {', '.join(kinds)}; "
                f"this task's are of kind {self.answer_kind!r}",
                key="merge.method",
            )
        if self.method == "mbr":
            _check_word("merge.utility", self.utility, UTILITIES)
        if self.num_labels is not None and self.num_labels < 2:
            raise JobError(f"at least two, got {self.num_labels}", key="task.labels")


def merge_answers(
    records: pa.Table, answers: pa.Table, spec: MergeSpec
) -> tuple[pa.Table, pa.Table]:
    """Merge a partition's answers; returns (results, failures), both in record order.

    Every record is in exactly one of them. Answers with a reason are missing answers; a
    record that has only such fails with the most telling of their reasons.

    Args:
        records: `RECORD_FIELDS` and passthrough columns; the latter are kept.
        answers: `ANSWERS` rows for these records, in any order, repeated or not.

    Raises:
        RunError: the tables contradict each other or their contract.
        JobError: `weighted` lacks an agent's accuracy.
    """
    replies = replies_by_record(records, answers)
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
            verdicts.append(verdict_of(ballots, spec))
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


def ballots_of(rows: Sequence[Mapping[str, Any]], spec: MergeSpec) -> list[Ballot]:
    """Return a record's valid answers, ready to be merged."""
    return [_ballot(row, spec) for row in rows if row["reason"] is None]


def verdict_of(ballots: Sequence[Ballot], spec: MergeSpec) -> Verdict:
    """Merge at least one valid answer to a record by the spec's method.

    Raises:
        JobError: `weighted` lacks an agent's accuracy.
    """
    if spec.method == "vote":
        return vote(ballots)
    if spec.method == "weighted":
        _check_accuracies(ballots, spec)
        if spec.weights == "linear":
            return weighted_linear(ballots, spec.accuracies)
        num_wrong = None if spec.num_labels is None else spec.num_labels - 1
        return weighted_log_odds(ballots, spec.accuracies, num_wrong)
    weights = [spec.accuracies.get(ballot.agent_id, 1.0) for ballot in ballots]
    if spec.method == "mean":
        return mean(ballots, weights)
    return minimum_bayes_risk(ballots, weights, UTILITIES[spec.utility or ""])


def _check_word(key: str, word: str | None, allowed: Collection[str | None]) -> None:
    if word not in allowed:
        raise JobError(f"{word!r} is not allowed; allowed: {', '.join(map(str, allowed))}", key=key)


_REPLY_COLUMNS = [
    *("record_id", "agent_id", "family_id", "sample_id", "attempt", "text", "label", "value"),
    *("finish_reason", "num_parts", "reason", "message"),
]


def _ballot(row: Mapping[str, Any], spec: MergeSpec) -> Ballot:
    shown = shown_answer(row, spec.answer_kind)
    return Ballot(
        agent_id=row["agent_id"],
        family_id=row["family_id"],
        sample_id=row["sample_id"],
        key=_key(spec)(shown),
        shown=shown,
        value=float(shown) if spec.answer_kind == "value" else None,
        finish_reason=row["finish_reason"],
        num_parts=row["num_parts"],
    )


def _key(spec: MergeSpec) -> Callable[[str], str]:
    """Return what makes two answers one: labels and numbers are exact, texts are forgiving."""
    if spec.answer_kind != "text":
        return str
    return nfc if spec.method == "mbr" else normalise_text


def _check_accuracies(ballots: Sequence[Ballot], spec: MergeSpec) -> None:
    for ballot in ballots:
        if ballot.agent_id not in spec.accuracies:
            known = ", ".join(sorted(spec.accuracies)) or "none"
            raise JobError(
                f"`weighted` needs one for every agent; {ballot.agent_id!r} has none; "
                f"given: {known}",
                key="merge.accuracies",
            )


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
    }


def _results(
    records: pa.Table, positions: Sequence[int], verdicts: Sequence[Verdict], spec: MergeSpec
) -> pa.Table:
    """Put the verdicts beside the columns of their records that results keep."""
    staged = {field.name for field in RECORD_FIELDS}
    kept = ["record_id", "text", "reference"]
    kept += [name for name in records.column_names if name not in staged]
    left = records.select(kept).take(pa.array(positions, pa.int64())).combine_chunks()
    rows = [_result(verdict, spec) for verdict in verdicts]
    right = pa.Table.from_pylist(rows, pa.schema(RESULT_FIELDS))
    schema = pa.schema([*(left.schema.field(name) for name in kept), *RESULT_FIELDS])
    return pa.table([*left.columns, *right.columns], schema=schema)


def _result(verdict: Verdict, spec: MergeSpec) -> dict[str, Any]:
    comparable = verdict.confidence if spec.method != "mean" else None
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
    }


def _supporter(candidate: Candidate) -> dict[str, Any]:
    voters = sorted(ballot.voter for ballot in candidate.backers)
    return {"answer": candidate.answer, "weight": candidate.weight, "agents": voters}
