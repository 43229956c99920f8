"""What labelled records say of each agent's word: a vote whose weights are learned from them.

Agents that share errors look like agents that are right, and one that is much better than all
others looks like one that is wrong, as long as only their agreement is known. A few records with
known answers tell them apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mas_batch.aggregate.ballots import Candidate, Verdict, rank_candidates, shares_of, to_units
from mas_batch.aggregate.ballots import verdict as verdict_of_support
from mas_batch.aggregate.patterns import Floats
from mas_batch.by_name import pickled_by_name

START = 0.5
"""What weighs before any label: half of the method's share, and half a vote of the best agent."""

RIDGE = 6.0
"""How hard weights are held where they start: of 3, 6 and 10 a good one on real answers
(benchmarks/README.md)."""

NUM_FOLDS = 5

_LEAST_SHARE = 1e-3
_DIGITS = 9
_METHOD = ""
"""The column of the method's own share; no agent has that name."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A labelled record's candidates, as the merge method ranks them."""

    confidence: float
    """The method's own."""
    right: int
    """Place of the right answer among them; -1: nobody gave it."""
    candidates: Sequence[Mapping[str, float]]
    """See `features`."""


@pickled_by_name
@dataclass(frozen=True, slots=True)
class LabelWeights:
    """What the method's share and each agent's word weigh; JSON-able."""

    method: float
    """Of the logarithm of the method's own share."""
    agents: Mapping[str, float]

    def apply(self, found: Verdict) -> Verdict:
        """Publish the answer of the highest sum of weights in the place of the method's.

        The confidence is the geometric mean of two figures: e^sum as a share of all candidates' and
        of e^0, for an answer that nobody gave; and what the method says of the answer.
        """
        candidates = features(found)
        sums = [self._sum(each) for each in candidates]
        chances = _softmax([*sums, 0.0])
        support = rank_candidates(
            replace(candidate, score=to_units(total), weight=chance)
            for candidate, total, chance in zip(found.support, sums, chances, strict=False)
        )
        weights = [candidate.weight for candidate in support]
        margin = weights[0] - sum(weights[1:2])
        best = chances.index(weights[0])
        confidence = _confidence(chances[best], best, found.confidence or 0.0, candidates[best])
        return verdict_of_support(
            support, shares_of(weights), confidence, found.confidence_kind, margin
        )

    def _sum(self, candidate: Mapping[str, float]) -> float:
        words = (n * self.agents.get(a, START) for a, n in candidate.items() if a != _METHOD)
        return math.fsum([self.method * candidate[_METHOD], *words])

    def _outcome(self, record: Labelled) -> tuple[float, bool]:
        """Return the published confidence of a labelled record, and whether it is right."""
        sums = [self._sum(each) for each in record.candidates]
        best = max(range(len(sums)), key=sums.__getitem__)
        chance = _softmax([*sums, 0.0])[best]
        confidence = _confidence(chance, best, record.confidence, record.candidates[best])
        return confidence, best == record.right


@dataclass(frozen=True, slots=True)
class Weighing:
    """What is published by labelled records, and why."""

    weights: LabelWeights | None
    """None: what the method says."""
    confidences: Floats
    """Of the labelled records, each by weights learned from others."""
    correct: Floats
    why: str


def features(found: Verdict) -> list[dict[str, float]]:
    """Return what speaks for every candidate: the share's logarithm, and agent → its word.

    The word is the part of the agent's samples that gave the answer.
    """
    samples = Counter(ballot.agent_id for each in found.support for ballot in each.backers)
    logarithms = _log_shares(found)
    return [
        {_METHOD: logarithm, **_words(candidate, samples)}
        for candidate, logarithm in zip(found.support, logarithms, strict=True)
    ]


def starts_of(log_odds: Mapping[str, float]) -> dict[str, float]:
    """Return what each agent's word weighs before any label: `START` for the highest log-odds, the
    others in proportion, and none for agents below chance.

    Agents of which nothing is known start at `START`.
    """
    highest = max(log_odds.values(), default=0.0)
    if highest <= 0:
        return {}
    return {agent: START * max(0.0, weight) / highest for agent, weight in log_odds.items()}


def weigh(records: Sequence[Labelled], method: str, starts: Mapping[str, float]) -> Weighing:
    """Learn the weights, unless the method alone is right more often by over a standard error.

    That is by pairs, every labelled record being judged by weights of other folds; the outcome
    depends on the records and their order.

    Source: Wolpert, "Stacked generalization", Neural Networks 1992.
    """
    before = np.array([record.right == 0 for record in records], dtype=np.float64)
    folds = np.random.default_rng(0).permutation(len(records)) % NUM_FOLDS
    outcomes: list[Any] = [None] * len(records)
    for fold in range(NUM_FOLDS):
        others = [r for r, f in zip(records, folds, strict=True) if f != fold]
        weights = fit(others, starts)
        for place in np.flatnonzero(folds == fold).tolist():
            outcomes[place] = weights._outcome(records[place])
    confidences, correct = (
        np.array(each, dtype=np.float64) for each in zip(*outcomes, strict=True)
    )
    gain = correct - before
    told = (
        f"of {len(records)} labelled records {correct.sum():.0f} are right by weights of the "
        f"agents learned from the others, {before.sum():.0f} by {method} alone"
    )
    if gain.mean() < -gain.std() / math.sqrt(len(gain)):
        own = np.array([record.confidence for record in records])
        return Weighing(None, own, before, f"published is what {method} says: {told}")
    return Weighing(fit(records, starts), confidences, correct, f"labels weigh the agents: {told}")


def fit(records: Sequence[Labelled], starts: Mapping[str, float]) -> LabelWeights:
    """Learn weights w under which the right answers given are likeliest, P(c) ∝ e^(w · x_c).

    It is the conditional logit (McFadden, "Conditional logit analysis of qualitative choice
    behavior", 1974) by Newton's method, with the squared distance from `starts` as a penalty;
    records on which nobody is right say nothing of it.
    """
    names = sorted({name for r in records for each in r.candidates for name in each} | {_METHOD})
    telling = [record for record in records if record.right >= 0]
    most = max((len(record.candidates) for record in telling), default=1)
    given = np.zeros((len(telling), most), dtype=bool)
    x = np.zeros((len(telling), most, len(names)))
    for row, record in enumerate(telling):
        for place, candidate in enumerate(record.candidates):
            given[row, place] = True
            x[row, place] = [candidate.get(name, 0.0) for name in names]
    right = x[np.arange(len(telling)), [record.right for record in telling]] if telling else x[:, 0]
    start = np.array([starts.get(name, START) for name in names])
    found = start
    for _ in range(50):
        sums = np.where(given, x @ found, -np.inf)
        chances = np.exp(sums - sums.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        means = np.einsum("rc,rcf->rf", chances, x)
        slope = (right - means).sum(axis=0) - RIDGE * (found - start)
        bend = np.einsum("rc,rcf,rcg->fg", chances, x, x) - means.T @ means
        step = np.clip(np.linalg.solve(bend + RIDGE * np.eye(len(names)), slope), -1.0, 1.0)
        found = found + step
        if np.abs(step).max() < 1e-12:
            break
    values = dict(zip(names, (round(value, _DIGITS) for value in found.tolist()), strict=True))
    return LabelWeights(values.pop(_METHOD), values)


def _confidence(chance: float, place: int, own: float, candidate: Mapping[str, float]) -> float:
    """Labels are chosen by the method's confidence, so what is calibrated must go by it too."""
    return math.sqrt(chance * (own if place == 0 else math.exp(candidate[_METHOD])))


def _words(candidate: Candidate, samples: Mapping[str, int]) -> dict[str, float]:
    said = Counter(ballot.agent_id for ballot in candidate.backers)
    return {agent: number / samples[agent] for agent, number in sorted(said.items())}


def _log_shares(found: Verdict) -> list[float]:
    weights = [candidate.weight for candidate in found.support]
    if found.confidence_kind == "posterior":  # the weights are log-odds
        return [math.log(max(share, _LEAST_SHARE)) for share in _softmax(weights)]
    total = max(1.0, math.fsum(weights))  # of probabilities, some may be left for other answers
    return [math.log(max(weight / total, _LEAST_SHARE)) for weight in weights]


def _softmax(sums: Sequence[float]) -> list[float]:
    highest = max(sums)
    return shares_of([math.exp(total - highest) for total in sums])
