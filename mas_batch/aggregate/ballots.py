"""Ballots and candidates: what every merge takes, and the verdict that it makes of them.

Weights are integers in `UNITS`, sums are of integers or by `math.fsum`, and ties are broken by
rule, so that a verdict depends on which answers there are and on nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mas_batch.aggregate.normalise import nfc_bytes

UNITS = 10**9
"""A weight of 1 in the integers that scores are added and compared in."""

ACCURACY_RANGE = (0.01, 0.99)
"""Accuracies are clipped to it: no agent is certain, and log-odds stay finite."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """One valid answer to a record."""

    agent_id: str
    family_id: str
    sample_id: int
    key: str
    """Answers agree when their keys are equal."""
    shown: str
    """The answer as given."""
    value: float | None = None
    finish_reason: str | None = None
    num_parts: int | None = None
    logprob_sum: float | None = None
    """Nats, over the answer's tokens; None where the engine does not say."""
    num_logprobs: int | None = None
    """Tokens that the sum is over."""
    probs: tuple[float, ...] | None = None
    """Of the closed set of answers, in its order; None where the agent does not say."""

    @property
    def order(self) -> tuple[str, int]:
        """Place among the ballots of a record, in whatever order they came."""
        return (self.agent_id, self.sample_id)

    @property
    def voter(self) -> str:
        """Name in the support: the agent, with the sample's number after its first."""
        return f"{self.agent_id}#{self.sample_id}" if self.sample_id else self.agent_id


@dataclass(frozen=True, slots=True)
class Candidate:
    """The answers that agree, as one."""

    answer: str
    """Their most frequent form; among equals the one of smallest NFC bytes."""
    score: int
    """What candidates are compared by; its unit is the method's."""
    weight: float
    """The score in natural units, as shown in the support."""
    max_weight: int
    """Highest weight of one backer, in `UNITS`."""
    backers: tuple[Ballot, ...]
    """Ordered by agent and sample; never empty."""

    @property
    def rank(self) -> tuple[int, int, int, bytes, str]:
        """Sort key, best first: score, number of model families, highest weight, bytes."""
        families = len({ballot.family_id for ballot in self.backers})
        return (-self.score, -families, -self.max_weight, nfc_bytes(self.answer), self.answer)

    @property
    def chosen(self) -> Ballot:
        """The first backer whose words are the shown ones."""
        return next(ballot for ballot in self.backers if ballot.shown == self.answer)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The merged answer to one record, and how far to trust it."""

    answer: str
    value: float | None
    confidence: float | None
    confidence_kind: str
    margin: float | None
    """Best minus second, in the confidence's unit; a missing second counts as 0."""
    entropy: float
    """Nats, over the shares of the support."""
    support: tuple[Candidate, ...]
    """Best first."""
    tie: bool
    """The best two have equal scores; the rule decided."""
    chosen: Ballot
    """The answer that is published, or for a mean the one closest to it."""


def clip_accuracy(accuracy: float) -> float:
    """Keep an accuracy within `ACCURACY_RANGE`."""
    low, high = ACCURACY_RANGE
    return min(max(accuracy, low), high)


def log_odds(accuracy: float, num_wrong: int) -> float:
    """Return ln(m·p / (1 - p)) for the clipped accuracy p and m wrong alternatives."""
    p = clip_accuracy(accuracy)
    return math.log(num_wrong * p / (1 - p))


def to_units(weight: float) -> int:
    """Return the weight as an integer number of `UNITS`."""
    return round(weight * UNITS)


def gather(ballots: Iterable[Ballot], weights: Iterable[int]) -> list[Candidate]:
    """Put the ballots that agree together; a candidate's score is the sum of its weights."""
    groups: dict[str, list[tuple[Ballot, int]]] = {}
    for ballot, weight in zip(ballots, weights, strict=True):
        groups.setdefault(ballot.key, []).append((ballot, weight))
    candidates = []
    for group in groups.values():
        score = sum(weight for _, weight in group)
        backers = sorted((ballot for ballot, _ in group), key=lambda ballot: ballot.order)
        highest = max(weight for _, weight in group)
        shown = _most_frequent(ballot.shown for ballot in backers)
        candidates.append(Candidate(shown, score, score / UNITS, highest, tuple(backers)))
    return candidates


def rank_candidates(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort best first by the tie rule; no two candidates rank equal."""
    return sorted(candidates, key=lambda candidate: candidate.rank)


def verdict(
    support: Sequence[Candidate],
    shares: Sequence[float],
    confidence: float,
    kind: str,
    margin: float,
) -> Verdict:
    """Publish the first of the support; `shares` are the support's, adding up to 1."""
    best = support[0]
    return Verdict(
        answer=best.answer,
        value=best.chosen.value,
        confidence=confidence,
        confidence_kind=kind,
        margin=margin,
        entropy=entropy(shares),
        support=tuple(support),
        tie=len(support) > 1 and support[1].score == best.score,
        chosen=best.chosen,
    )


def _most_frequent(forms: Iterable[str]) -> str:
    counts = Counter(forms)
    return min(counts, key=lambda form: (-counts[form], nfc_bytes(form), form))


def entropy(shares: Iterable[float]) -> float:
    """Return the entropy in nats of shares that add up to 1."""
    return -math.fsum(share * math.log(share) for share in shares if share > 0) + 0.0


def shares_of(weights: Sequence[float]) -> list[float]:
    """Scale to a sum of 1; of weights that are all 0 everybody has the same share."""
    total = math.fsum(weights)
    return [weight / total if total else 1 / len(weights) for weight in weights]
