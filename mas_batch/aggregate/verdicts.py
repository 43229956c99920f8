"""A record's rows of the answers table → its ballots → one verdict, by the spec's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.best import most_preferred
from mas_batch.aggregate.calibration import CALIBRATED
from mas_batch.aggregate.method import Encode, MergeSpec, Shared

_OF_AGREEMENT = ("agreement", "weight-share", "expected_utility", "word_agreement")
"""Kinds of confidence that count how far answers agree."""


def _says_only_itself(ballot: Ballot, confidence_kind: str) -> bool:
    """Whether a confidence of this kind says of a lone answer only that it agrees with itself."""
    is_certain = confidence_kind == "pooled" and ballot.probs is None
    return is_certain or confidence_kind in _OF_AGREEMENT


def ballots_of(rows: Sequence[Mapping[str, Any]], spec: MergeSpec) -> list[Ballot]:
    """Return a record's valid answers, ready to be merged."""
    return [_ballot(row, spec) for row in rows if row["reason"] is None]


def verdict_of(
    ballots: Sequence[Ballot],
    spec: MergeSpec,
    encode: Encode | None = None,
    known: MutableMapping[str, Any] | None = None,
) -> Verdict:
    """Merge at least one valid answer to a record by the spec's method.

    The confidence of a single answer is None where it would say only that the answer agrees
    with itself. Of several, labelled records may have taught to publish another than the method's.

    Args:
        encode: as `merge_answers` takes it.
        known: what the method found for other records; filled and used.

    Raises:
        JobError: `weighted` lacks an agent's accuracy.
        RunError: `reliability` has not learned anything yet.
    """
    if spec.last_word is not None and any(b.agent_id == spec.last_word for b in ballots):
        return most_preferred(ballots, [spec.last_word])
    found = spec.rules.verdict(ballots, spec, Shared(encode, {} if known is None else known))
    if len(ballots) == 1 and _says_only_itself(ballots[0], found.confidence_kind):
        return replace(found, confidence=None, margin=None)
    if spec.calibrated is None or found.confidence is None:
        return found
    if spec.calibrated.weights is not None:
        found = spec.calibrated.weights.apply(found)
    confidence = spec.calibrated.calibration.apply(found.confidence)
    return replace(found, confidence=confidence, confidence_kind=CALIBRATED)


def key_of(spec: MergeSpec) -> Callable[[str], str]:
    """Return what makes two published answers one: equal keys."""
    return spec.kind.exact if spec.rules.exact else spec.kind.normalise


def _ballot(row: Mapping[str, Any], spec: MergeSpec) -> Ballot:
    kind = spec.kind
    shown = kind.answer_of(row)
    return Ballot(
        agent_id=row["agent_id"],
        family_id=row["family_id"],
        sample_id=row["sample_id"],
        key=key_of(spec)(shown),
        shown=shown,
        value=kind.number_of(shown),
        finish_reason=row["finish_reason"],
        num_parts=row["num_parts"],
        logprob_sum=row["sum_logprob"],
        num_logprobs=row["completion_tokens"],
        probs=None if row["probs"] is None else tuple(row["probs"]),
    )
