"""The most probable of the answers that were given, by what was learned about the agents."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    UNITS,
    Ballot,
    Verdict,
    gather,
    log_odds,
    rank_candidates,
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
    """Return the answer of the highest posterior probability, among those that were given.

    What is left of the probability belongs to labels that no agent gave, or to "none of these":
    it lowers the confidence. The weight that decides ties is the agent's log-odds.

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
    shares = dict(zip(codes, known[pattern].shares, strict=True))
    weights = _weights(ballots, reliability)
    support = rank_candidates(
        replace(candidate, score=to_units(share), weight=share)
        for candidate in gather(ballots, weights)
        for share in [shares[candidate.backers[0].key]]
    )
    confidence = support[0].weight
    margin = (support[0].score - sum(c.score for c in support[1:2])) / UNITS
    kind = "agreement" if reliability.method == "vote" else "posterior"
    total = math.fsum(candidate.weight for candidate in support)
    rest = [candidate.weight / total if total else 1 / len(support) for candidate in support]
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
    confidence_kinds=("posterior", "agreement"),
    stopping="it learns from all answers to all records",
    not_escalated=None,
    weights={None: RELIABILITY_LEARNING},
)
