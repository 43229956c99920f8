"""One accuracy per agent, learned from short free answers: only who agrees is known.

Model: an agent gives the right answer with probability p_a, else one of m wrong ones, each
equally likely. What is right is one of the answers given ("clusters" of equal answers) or
none of them. A pattern is then a partition of the answers, and

    P(partition, j right) = Π_{a in j} p_a · Π_{a not in j} (1 - p_a) / m · m (m-1) ⋯ (m-w+1)

where w is the number of other clusters; "none right" is the same with no j. The falling
factorial is the number of ways in which w clusters can be w different wrong answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mas_batch.aggregate.dawid_skene import FLOOR, MAX_ITERATIONS, TOLERANCE, PseudoCounts
from mas_batch.aggregate.patterns import MISSING, Floats, PatternTable

NUM_WRONG = (2, 3, 4, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 200, 300, 500, 700, 1000)
"""The numbers of wrong answers, m, that are tried."""

_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True, eq=False)
class OpenSetModel:
    """Probabilities that explain which answers agree."""

    accuracy: Floats
    """[A]"""
    num_wrong: int
    """m, the number of wrong answers that an agent chooses from."""

    def posteriors(self, table: PatternTable, exponents: Floats) -> Floats:
        """E-step: the probability of every cluster, and last of "none", for every pattern.

        Shape [P, C + 1] for at most C clusters; rows add up to 1, missing clusters have 0.
        """
        return _normalise(_log_joint(self, table, exponents))[0]

    def pair_agreement(self) -> tuple[Floats, Floats]:
        """Return how often two agents agree, and at most, were they dependent; [A, A] each."""
        p, q = self.accuracy, 1 - self.accuracy
        expected = np.outer(p, p) + np.outer(q, q) / self.num_wrong
        return expected, np.minimum.outer(p, p) + np.minimum.outer(q, q)


def fit_open_set(
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> OpenSetModel:
    """Learn the accuracies by EM and m by likelihood, in turn until m stays.

    M-step: p_a = (Σ T[a's cluster] + pseudo correct) / (answers + pseudo total).
    """
    model = OpenSetModel(_accuracy(table, vote_shares(table, exponents), pseudo), NUM_WRONG[0])
    for _ in range(_MAX_ROUNDS):
        chosen = _likeliest(model, table, exponents)
        model = _em(chosen, table, exponents, pseudo, max_iterations, tolerance)
        if _likeliest(model, table, exponents).num_wrong == model.num_wrong:
            break
    return model


def evidence(model: OpenSetModel, table: PatternTable, exponents: Floats) -> float:
    """Return how much likelier the answers are than were all wrong, whatever m; nats."""
    nobody_right = replace(model, accuracy=np.zeros_like(model.accuracy))
    by_chance = _likeliest(nobody_right, table, exponents)
    return log_likelihood(model, table, exponents) - log_likelihood(by_chance, table, exponents)


def log_likelihood(model: OpenSetModel, table: PatternTable, exponents: Floats) -> float:
    """Return ln P of all partitions; nats."""
    return float(_normalise(_log_joint(model, table, exponents))[1] @ table.counts)


def _log_joint(model: OpenSetModel, table: PatternTable, exponents: Floats) -> Floats:
    """Return ln P(partition, hypothesis), [P, C + 1]; -inf for a cluster that is not there.

    1/m per wrong answer times the falling factorial is (1 - i/m) for the i-th wrong cluster
    and 1/m for every answer that repeats one. With exponents, a cluster of total exponent e
    repeats itself e - 1 times and at least 0: copies by one family are then one answer.
    """
    p = np.clip(model.accuracy, FLOOR, 1 - FLOOR)
    right = table.sums_by_code(exponents * np.log(p)[table.agent_of])
    wrong = table.sums_by_code(exponents * np.log(1 - p)[table.agent_of])
    there = table.sums_by_code(np.ones_like(exponents)) > 0
    repeats = np.maximum(table.sums_by_code(exponents) - 1, 0.0)
    num_clusters = there.sum(axis=1)
    new_wrong = _new_wrong(model.num_wrong, int(num_clusters.max(initial=0)))
    none = wrong.sum(axis=1) - np.log(model.num_wrong) * repeats.sum(axis=1)
    one = none[:, None] + right - wrong + np.log(model.num_wrong) * repeats
    one = np.where(there, one + new_wrong[np.maximum(num_clusters - 1, 0), None], -np.inf)
    return np.column_stack([one, none + new_wrong[num_clusters]])


def _new_wrong(num_wrong: int, max_clusters: int) -> Floats:
    """Return ln Π_{i<w} (1 - i/m) for w = 0 … max_clusters.

    For w > m it should be -inf; floored, records that m cannot explain, and that it was not
    learned from, still have a posterior.
    """
    factors = np.maximum(1 - np.arange(max_clusters) / num_wrong, FLOOR)
    return np.concatenate([[0.0], np.cumsum(np.log(factors))])


def _normalise(log_joint: Floats) -> tuple[Floats, Floats]:
    """Return (posteriors, ln of the sums) of each row."""
    highest = log_joint.max(axis=1, keepdims=True)
    scaled = np.exp(log_joint - highest)
    total = scaled.sum(axis=1, keepdims=True)
    return scaled / total, (np.log(total) + highest)[:, 0]


def _likeliest(model: OpenSetModel, table: PatternTable, exponents: Floats) -> OpenSetModel:
    """Return the model with the likeliest m, the smallest of equals."""
    models = [replace(model, num_wrong=num_wrong) for num_wrong in NUM_WRONG]
    return max(models, key=lambda each: log_likelihood(each, table, exponents))


def _em(
    model: OpenSetModel,
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    max_iterations: int,
    tolerance: float,
) -> OpenSetModel:
    for _ in range(max_iterations):
        accuracy = _accuracy(table, model.posteriors(table, exponents), pseudo)
        step = np.abs(accuracy - model.accuracy).max(initial=0.0)
        model = replace(model, accuracy=accuracy)
        if step <= tolerance:
            break
    return model


def vote_shares(table: PatternTable, exponents: Floats) -> Floats:
    """Return each cluster's share of the answers, and 0 for none; [P, C + 1]."""
    votes = table.sums_by_code(exponents)
    return np.column_stack([votes / votes.sum(axis=1, keepdims=True), np.zeros(len(votes))])


def _accuracy(table: PatternTable, truth: Floats, pseudo: PseudoCounts) -> Floats:
    correct, total = pseudo.correct.copy(), pseudo.total.copy()
    rows = np.arange(len(truth))
    for slot, agent in enumerate(table.agent_of):
        filled = table.codes[:, slot] != MISSING
        correct[agent] += table.counts @ np.where(filled, truth[rows, table.codes[:, slot]], 0.0)
        total[agent] += table.counts @ filled
    return np.asarray(correct / np.maximum(total, FLOOR))
