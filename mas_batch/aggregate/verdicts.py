"""A record's rows of the answers table → its ballots → one verdict, by the spec's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mas_batch.aggregate.best import best
from mas_batch.aggregate.mbr import UTILITIES, Utility, embedding_utility, minimum_bayes_risk
from mas_batch.aggregate.merge_spec import EMBEDDING, MergeSpec
from mas_batch.aggregate.normalise import nfc, normalise_text, shown_answer
from mas_batch.aggregate.posterior_vote import by_reliability
from mas_batch.aggregate.reliability import Posterior
from mas_batch.aggregate.rover import rover
from mas_batch.aggregate.vote import (
    Ballot,
    Verdict,
    mean,
    vote,
    weighted_linear,
    weighted_log_odds,
)
from mas_batch.errors import JobError, RunError

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Texts → vectors [N, d] of length 1."""


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
