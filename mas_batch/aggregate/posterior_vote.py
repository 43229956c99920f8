"""The most probable of the answers that were given, by what was learned about the agents."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    Ballot,
    Verdict,
    gather,
    log_odds,
    rank_candidates,
    shares_of,
    to_units,
    verdict,
)
from mas_batch.aggregate.method import MergeSpec, Method, Shared
from mas_batch.aggregate.partials import RELIABILITY_LEARNING
from mas_batch.aggregate.patterns import candidates_of, pattern_of
from mas_batch.aggregate.reliability import Posterior, Reliability, posterior
from mas_batch.errors import RunError


def by_reliability(
    ballots: Sequence[Ballot],
    reliability: Reliability,
    known: MutableMapping[str, Posterior] | None = None,
) -> Verdict:
    """Return the answer, of those given, that is highest by the mean of two figures.

    They are the share of the answers that agree, and the posterior probability (a linear opinion
    pool: Stone, "The opinion pool", 1961). The posterior is far too sure where agents share errors,
    which their answers alone do not show (Li, Rubinstein and Cohn, "Exploiting worker correlation
    for label aggregation in crowdsourcing", ICML 2019, need many workers for it): so it overrules a
    majority only where it is surer than the majority is large.

    The confidence is the same mean, with the posterior softened until it is on average as sure as
    that share. What is left of the probability belongs to labels that no agent gave, or to "none of
    these". The weight that decides ties is the agent's log-odds.

    Args:
        known: posteriors by pattern, filled and used; they depend on the pattern alone.

    Raises:
        RunError: a ballot is of an agent or label that the reliability does not know.
    """
    known = {} if known is None else known
    pattern = pattern_of(ballots, tuple(reliability.agents), reliability.labels)
    if pattern not in known:
        known[pattern] = posterior(reliability, pattern)
    codes = candidates_of(ballots, reliability.labels)
    found = known[pattern]
    shares = dict(zip(codes, found.shares, strict=True))
    softened = dict(zip(codes, found.softened(reliability.temperature).shares, strict=True))
    weights = _weights(ballots, reliability)
    support = rank_candidates(
        replace(
            candidate,
            score=to_units(len(candidate.backers) / len(ballots) + shares[key]),
            weight=softened[key],
        )
        for candidate in gather(ballots, weights)
        for key in [candidate.backers[0].key]
    )
    softened_best, agreement = support[0].weight, len(support[0].backers) / len(ballots)
    # A single answer agrees with itself only, which says nothing.
    confidence = softened_best if len(ballots) < 2 else (agreement + softened_best) / 2
    margin = max(0.0, softened_best - sum(candidate.weight for candidate in support[1:2]))
    kind = "agreement" if reliability.method == "vote" else "uncalibrated"
    rest = shares_of([candidate.weight for candidate in support])
    return verdict(support, rest, confidence, kind, margin)


def _weights(ballots: Sequence[Ballot], reliability: Reliability) -> list[int]:
    num_wrong = reliability.num_wrong or max(1, len(reliability.labels or ()) - 1)
    accuracies: Mapping[str, float] = reliability.accuracies
    return [to_units(log_odds(accuracies.get(b.agent_id, 0.5), num_wrong)) for b in ballots]


def _by_what_was_learned(ballots: Sequence[Ballot], spec: MergeSpec, shared: Shared) -> Verdict:
    if spec.reliability is None:
        raise RunError("`reliability` merges when all records are answered, not before")
    return by_reliability(ballots, spec.reliability, shared.known)


RELIABILITY = Method(
    verdict=_by_what_was_learned,
    columns=("text", "label"),
    exact=False,
    confidence_kinds=("uncalibrated", "agreement"),
    stopping="it learns from all answers to all records",
    not_escalated=None,
    calibrates=True,
    weights={None: RELIABILITY_LEARNING},
)
