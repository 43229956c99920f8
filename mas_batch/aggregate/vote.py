"""Several answers to one record become one: majority, weighted majority, mean, pool.

Everything here is exact or rounded in one fixed way; see `aggregate.ballots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    UNITS,
    Ballot,
    Verdict,
    clip_accuracy,
    entropy,
    gather,
    log_odds,
    rank_candidates,
    shares_of,
    to_units,
    verdict,
)
from mas_batch.aggregate.method import EVERY_COLUMN, MergeSpec, Method, Shared, Stopping
from mas_batch.errors import JobError
from mas_batch.records import STANDARD_ERROR


def vote(ballots: Sequence[Ballot]) -> Verdict:
    """Return the most frequent answer; the confidence is its share of the ballots."""
    return _by_share(ballots, [UNITS] * len(ballots), "agreement")


def weighted_linear(ballots: Sequence[Ballot], accuracies: Mapping[str, float]) -> Verdict:
    """Return the answer of the highest sum of accuracies; the confidence is its share of all.

    Raises:
        KeyError: an agent has no accuracy.
    """
    weights = [to_units(clip_accuracy(accuracies[ballot.agent_id])) for ballot in ballots]
    return _by_share(ballots, weights, "weight-share")


def weighted_log_odds(
    ballots: Sequence[Ballot], accuracies: Mapping[str, float], num_wrong: int | None
) -> Verdict:
    """Return the likeliest answer, were the agents independent and their errors uniform.

    An agent of accuracy p adds ln(m·p / (1 - p)) to its answer, m being the number of wrong
    answers it could have given; below chance it subtracts. Every sample adds it again: the
    samples of an agent count as independent voters.

    The confidence is the answer's posterior probability, all m + 1 answers being equally likely
    beforehand. An answer's likelihood is Π p over the agents that gave it times Π (1 - p)/m over
    the others; divided by Π (1 - p)/m over all agents that is e^score, and e^0 for an answer
    that no agent gave. So one answer of an agent of accuracy p has probability p.

    Args:
        num_wrong: m; None where the answers are not a closed set, and then m is the number
            of candidates less one, at least 1.

    Source: Nitzan and Paroush, "Optimal decision rules in uncertain dichotomous choice
    situations", 1982, for two classes; m is what Bayes' rule adds for more.

    Raises:
        KeyError: an agent has no accuracy.
    """
    wrong = num_wrong or max(1, len({ballot.key for ballot in ballots}) - 1)
    weights = [to_units(log_odds(accuracies[b.agent_id], wrong)) for b in ballots]
    support = rank_candidates(gather(ballots, weights))
    unseen = [0.0] * max(0, wrong + 1 - len(support))
    scores = [candidate.weight for candidate in support]
    posterior = _softmax([*scores, *unseen])
    margin = posterior[0] - sum(posterior[1 : len(support)][:1])
    return verdict(support, _softmax(scores), posterior[0], "posterior", margin)


def mean(ballots: Sequence[Ballot], weights: Sequence[float]) -> Verdict:
    """Return the weighted mean of the values; the confidence is its standard error.

    A standard error is in the values' unit and smaller is better: it is not comparable with
    other confidences. One answer has none. For equal weights it is s/√n; else the unbiased
    variance for reliability weights, Σw(x-μ)² / (Σw - Σw²/Σw), is used for s².

    Args:
        weights: positive, one per ballot.

    Raises:
        ValueError: a ballot has no value.
    """
    values = [ballot.value for ballot in ballots if ballot.value is not None]
    centre = _weighted_mean(values, weights)
    support = rank_candidates(gather(ballots, [to_units(w) for w in weights]))
    shares = shares_of([candidate.score for candidate in support])
    closest = min(range(len(values)), key=lambda i: (abs(values[i] - centre), ballots[i].order))
    return Verdict(
        answer=repr(centre),
        value=centre,
        confidence=_standard_error(values, weights, centre),
        confidence_kind=STANDARD_ERROR,
        margin=None,
        entropy=entropy(shares),
        support=tuple(support),
        tie=False,
        chosen=ballots[closest],
    )


def pool(ballots: Sequence[Ballot], labels: Sequence[str], weights: Sequence[float]) -> Verdict:
    """Return the label of the highest mean probability, of those that an agent gave.

    The confidence is that mean: the linear opinion pool (Stone, "The opinion pool", 1961). An
    answer that comes without probabilities counts as certain, so that without any it is the vote.

    Args:
        labels: in the order of the ballots' probabilities.
        weights: positive, one per ballot.
    """
    sure = {label: tuple(float(label == other) for other in labels) for label in labels}
    said = [ballot.probs or sure[ballot.key] for ballot in ballots]
    total = math.fsum(weights)
    pooled = {
        label: math.fsum(w * p for w, p in zip(weights, each, strict=True)) / total
        for label, each in zip(labels, zip(*said, strict=True), strict=True)
    }
    support = rank_candidates(
        replace(each, score=to_units(pooled[each.answer]), weight=pooled[each.answer])
        for each in gather(ballots, [UNITS] * len(ballots))
    )
    best = support[0].weight
    others = [share for label, share in pooled.items() if label != support[0].answer]
    shares = shares_of([candidate.score for candidate in support])
    margin = max(0.0, best - max(others))
    return verdict(support, shares, best, "pooled", margin)


def _by_share(ballots: Sequence[Ballot], weights: Sequence[int], kind: str) -> Verdict:
    support = rank_candidates(gather(ballots, weights))
    scores = [candidate.score for candidate in support]
    margin = (scores[0] - sum(scores[1:2])) / sum(scores)
    shares = shares_of(scores)
    return verdict(support, shares, shares[0], kind, margin)


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    centre = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    # Rounding may leave the values' range by a bit: equal values must give that value.
    return min(max(centre, min(values)), max(values))


def _standard_error(
    values: Sequence[float], weights: Sequence[float], centre: float
) -> float | None:
    if len(values) < 2:
        return None
    total = math.fsum(weights)
    squares = math.fsum(w * w for w in weights)
    pairs = zip(weights, values, strict=True)
    spread = math.fsum(w * (x - centre) * (x - centre) for w, x in pairs)
    variance = spread / (total - squares / total)
    return math.sqrt(variance * squares) / total


def _by_accuracy(ballots: Sequence[Ballot], spec: MergeSpec, shared: Shared) -> Verdict:
    for ballot in ballots:
        if ballot.agent_id not in spec.accuracies:
            known = ", ".join(sorted(spec.accuracies)) or "none"
            raise JobError(
                f"`{spec.method}` needs one for every agent; {ballot.agent_id!r} has none; "
                f"given: {known}",
                key="merge.accuracies",
            )
    if spec.weights == "linear":
        return weighted_linear(ballots, spec.accuracies)
    num_wrong = None if spec.num_labels is None else spec.num_labels - 1
    return weighted_log_odds(ballots, spec.accuracies, num_wrong)


VOTE = Method(
    verdict=lambda ballots, spec, shared: vote(ballots),
    columns=EVERY_COLUMN,
    exact=False,
    confidence_kinds=("agreement",),
    stopping=Stopping(by_lead=True),
    not_escalated=None,
    calibrates=True,
)

WEIGHTED = Method(
    verdict=_by_accuracy,
    columns=EVERY_COLUMN,
    exact=False,
    confidence_kinds=("posterior", "weight-share"),
    # A posterior probability says of one answer too how sure it is.
    stopping=Stopping(trusts_one=lambda spec: spec.weights != "linear"),
    not_escalated=None,
    needs_accuracies=True,
    calibrates=True,
    weights=dict.fromkeys((None, "log-odds", "linear")),
)

POOL = Method(
    verdict=lambda ballots, spec, shared: pool(
        ballots, spec.labels or (), spec.weights_of(ballots)
    ),
    columns=("label",),
    exact=False,
    confidence_kinds=("pooled",),
    stopping=Stopping(trusts_one=lambda spec: True),
    not_escalated=None,
    calibrates=True,
)

MEAN = Method(
    verdict=lambda ballots, spec, shared: mean(ballots, spec.weights_of(ballots)),
    columns=("value", "label"),
    exact=False,
    confidence_kinds=(STANDARD_ERROR,),
    stopping="its confidence is a standard error, in the values' unit",
    not_escalated="its confidence is a standard error",
    of_labels=POOL,
)
