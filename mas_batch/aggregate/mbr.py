"""Minimum Bayes risk: of several free texts, the one that the others support most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    UNITS,
    Ballot,
    Verdict,
    gather,
    rank_candidates,
    shares_of,
    to_units,
    verdict,
)
from mas_batch.aggregate.method import MergeSpec, Method, Shared, Stopping
from mas_batch.aggregate.partials import SUPPORT_LEARNING, utility_of
from mas_batch.aggregate.utilities import Utility, symmetric_units


def minimum_bayes_risk(
    ballots: Sequence[Ballot], weights: Sequence[float], utility: Utility
) -> Verdict:
    """Return the candidate of the highest expected utility, Σ_j w_j u(i, j) / Σ_j w_j.

    j runs over all ballots, i's own included, and u is symmetrised: (u(i→j) + u(j→i)) / 2.
    The confidence is the winner's expected utility, in [0, 1]. With two equally weighted
    answers both have the same: a tie, broken by rule.

    Args:
        ballots: `key` is the text that is compared; equal texts are scored once.
        weights: positive, one per ballot.

    Source: Kumar and Byrne, "Minimum Bayes-risk decoding for statistical machine
    translation", 2004. Cost: one call of the utility on the distinct texts.
    """
    # In order of the key, the utilities' floating point sees the same input in any row order.
    candidates = sorted(
        gather(ballots, [to_units(weight) for weight in weights]),
        key=lambda candidate: candidate.backers[0].key,
    )
    utilities = symmetric_units(utility([c.backers[0].key for c in candidates]))
    total = sum(candidate.score for candidate in candidates)
    expected = [
        sum(u * other.score for u, other in zip(row, candidates, strict=True)) for row in utilities
    ]
    support = rank_candidates(
        replace(candidate, score=score, weight=score / (UNITS * total))
        for candidate, score in zip(candidates, expected, strict=True)
    )
    margin = (support[0].score - sum(c.score for c in support[1:2])) / (UNITS * total)
    shares = shares_of([candidate.weight for candidate in support])
    return verdict(support, shares, support[0].weight, "expected_utility", margin)


def _by_utility(ballots: Sequence[Ballot], spec: MergeSpec, shared: Shared) -> Verdict:
    return minimum_bayes_risk(ballots, spec.weights_of(ballots), utility_of(spec, shared.encode))


MBR = Method(
    verdict=_by_utility,
    columns=("text",),
    exact=True,
    confidence_kinds=("expected_utility",),
    stopping=Stopping(allows_ties=True),  # two answers always tie
    not_escalated=None,
    uses_utility=True,
    weights={None: None, "learned": SUPPORT_LEARNING},
)
