"""Answers table → results table, one partition at a time.

The outcome is the same to the byte for any order of the answers' rows, for repeated rows of
retries, and however the records are cut into partitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mas_batch.aggregate.best import best
from mas_batch.aggregate.mbr import UTILITIES, Utility, embedding_utility, minimum_bayes_risk
from mas_batch.aggregate.normalise import deduplicate, nfc, normalise_text, shown_answer
from mas_batch.aggregate.posterior_vote import by_reliability
from mas_batch.aggregate.reliability import Posterior, Reliability
from mas_batch.aggregate.rover import rover
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
    "reliability": ("text", "label"),
    "best": ("text", "label", "value"),
    "mean": ("value",),
    "mbr": ("text",),
    "rover": ("text",),
}
_WEIGHTS = (None, "log-odds", "linear", "learned")

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


EMBEDDING = "embedding"
"""The utility that needs a model: cosines of sentence vectors."""

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Texts → vectors [N, d] of length 1."""


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the answers to a record become one.

    Raises:
        JobError: the method, utility, weights and kind of answer do not go together.
    """

    method: str
    """`vote`, `weighted`, `reliability`, `mean`, `mbr`, `rover` or `best`."""
    utility: str | None
    """Of `mbr`: one of `UTILITIES` or `embedding`; ignored by the other methods."""
    accuracies: Mapping[str, float]
    """Agent → how often it is right. `weighted` needs every agent's; in `mbr`, `rover` and `mean`
    an agent without one weighs 1; `best` prefers the highest."""
    weights: str | None
    """Of `weighted`: `linear`, else log-odds. Of `mbr`: `learned`, and then `learned_from` puts
    what the corpus says in the place of the accuracies."""
    abstain_below: float
    """Lower confidences are marked; does not apply to `mean`, whose is a standard error."""
    answer_kind: str
    """Which column answers are compared by: `text`, `label` or `value`."""
    num_labels: int | None
    """Size of the closed set that the answers come from; None for an open one."""
    labels: tuple[str, ...] | None = None
    """That set, for `reliability`."""
    agents: tuple[str, ...] = ()
    """All that may have answered, in the job's order: `best` prefers the first, all else equal."""
    encoder: str | None = None
    """Source of the sentence-embedding model of `utility: embedding`."""
    reliability: Reliability | None = None
    """What `reliability` has learned from the whole corpus; the method cannot do without."""

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
            _check_word("merge.utility", self.utility, (*UTILITIES, EMBEDDING))
        if self.weights == "learned" and self.method != "mbr":
            raise JobError(
                f"{self.method!r} does not learn weights; allowed: with merge.method mbr. "
                "Of labels and short answers, merge.method reliability learns",
                key="merge.weights",
            )
        if self.num_labels is not None and self.num_labels < 2:
            raise JobError(f"at least two, got {self.num_labels}", key="task.labels")

    @property
    def default_weight(self) -> float:
        """Of an agent without an accuracy; where weights are learned, that of an average one."""
        if self.weights != "learned" or not self.accuracies:
            return 1.0
        return math.fsum(self.accuracies.values()) / len(self.accuracies)

    @property
    def needs_corpus(self) -> bool:
        """Whether the merge of one record needs statistics of all."""
        return self.method == "reliability" or self.weights == "learned"

    @property
    def first_pass(self) -> MergeSpec:
        """How to merge while the corpus is not complete."""
        if self.method == "reliability":
            return replace(self, method="vote")
        return replace(self, weights=None) if self.weights == "learned" else self


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
    known: dict[str, Posterior] = {}
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


def ballots_of(rows: Sequence[Mapping[str, Any]], spec: MergeSpec) -> list[Ballot]:
    """Return a record's valid answers, ready to be merged."""
    return [_ballot(row, spec) for row in rows if row["reason"] is None]


def verdict_of(
    ballots: Sequence[Ballot],
    spec: MergeSpec,
    encode: Encode | None = None,
    known: MutableMapping[str, Posterior] | None = None,
) -> Verdict:
    """Merge at least one valid answer to a record by the spec's method.

    Args:
        encode: as `merge_answers` takes it.
        known: of `reliability`: posteriors that other records needed; filled and used.

    Raises:
        JobError: `weighted` lacks an agent's accuracy.
        RunError: `reliability` has not learned anything yet.
    """
    weights = [spec.accuracies.get(ballot.agent_id, spec.default_weight) for ballot in ballots]
    match spec.method:
        case "vote":
            return vote(ballots)
        case "weighted":
            return _weighted(ballots, spec)
        case "reliability":
            if spec.reliability is None:
                raise RunError("`reliability` merges when all records are answered, not before")
            return by_reliability(ballots, spec.reliability, known)
        case "mean":
            return mean(ballots, weights)
        case "rover":
            return rover(ballots, weights)
        case "best":
            return best(ballots, _by_preference(spec))
        case _:
            return minimum_bayes_risk(ballots, weights, utility_of(spec, encode))


def utility_of(spec: MergeSpec, encode: Encode | None) -> Utility:
    """Return the utility that `mbr` compares texts by.

    Raises:
        RunError: it needs an encoder, and none is given.
    """
    if spec.utility != EMBEDDING:
        return UTILITIES[spec.utility or ""]
    if encode is None:
        raise RunError("utility `embedding` needs the vectors of an encoder")
    return embedding_utility(encode)


def _weighted(ballots: Sequence[Ballot], spec: MergeSpec) -> Verdict:
    _check_accuracies(ballots, spec)
    if spec.weights == "linear":
        return weighted_linear(ballots, spec.accuracies)
    num_wrong = None if spec.num_labels is None else spec.num_labels - 1
    return weighted_log_odds(ballots, spec.accuracies, num_wrong)


def _by_preference(spec: MergeSpec) -> list[str]:
    """Sort the agents, most accurate first; those of unknown accuracy come last."""
    return sorted(spec.agents, key=lambda agent: -spec.accuracies.get(agent, 0.0))


def _check_word(key: str, word: str | None, allowed: Collection[str | None]) -> None:
    if word not in allowed:
        raise JobError(f"{word!r} is not allowed; allowed: {', '.join(map(str, allowed))}", key=key)


_REPLY_COLUMNS = [
    *("record_id", "agent_id", "family_id", "sample_id", "attempt", "text", "label", "value"),
    *("finish_reason", "num_parts", "reason", "message", "sum_logprob", "completion_tokens"),
]


def _ballot(row: Mapping[str, Any], spec: MergeSpec) -> Ballot:
    shown = shown_answer(row, spec.answer_kind)
    return Ballot(
        agent_id=row["agent_id"],
        family_id=row["family_id"],
        sample_id=row["sample_id"],
        key=key_of(spec)(shown),
        shown=shown,
        value=float(shown) if spec.answer_kind == "value" else None,
        finish_reason=row["finish_reason"],
        num_parts=row["num_parts"],
        logprob_sum=row["sum_logprob"],
        num_logprobs=row["completion_tokens"],
    )


def key_of(spec: MergeSpec) -> Callable[[str], str]:
    """Return what makes two answers one: labels and numbers are exact, texts are forgiving."""
    if spec.answer_kind != "text":
        return str
    return nfc if spec.method in ("mbr", "rover", "best") else normalise_text


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
