"""Dawid–Skene on counted patterns: who is right how often, learned from closed-set answers.

Sources: Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
algorithm", 1979; one accuracy per agent ("one-coin"): Zhang, Chen, Zhou and Jordan, "Spectral
methods meet EM", 2016. With equal patterns taken together, an iteration costs O(P·S·K) for P
patterns, S slots and K labels, however many records there are.

Shapes: A agents, K labels; `confusion[a, k, o]` is the probability that agent a answers label
o where k is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mas_batch.aggregate.patterns import Floats, PatternTable

MAX_ITERATIONS = 200
TOLERANCE = 1e-7
"""EM ends when no posterior moves by more."""

FLOOR = 1e-10
"""Expected counts and probabilities stay above it, so that logarithms stay finite."""


@dataclass(frozen=True, slots=True, eq=False)
class PseudoCounts:
    """What is believed about the agents beforehand, in answers, added in every M-step."""

    correct: Floats
    """[A], answers that were right."""
    total: Floats
    """[A], answers in all."""
    confusion: Floats
    """[A, K, K], answers by true and given label; [A, 0, 0] for an open set."""

    @classmethod
    def none(cls, num_agents: int, num_labels: int) -> PseudoCounts:
        """Believe nothing: maximum likelihood."""
        nothing = np.zeros((num_agents, num_labels, num_labels))
        return cls(np.zeros(num_agents), np.zeros(num_agents), nothing)

    @classmethod
    def laplace(cls, num_agents: int, num_labels: int) -> PseudoCounts:
        """Believe that everybody can err: one right and one wrong answer each."""
        nothing = np.zeros((num_agents, num_labels, num_labels))
        return cls(np.ones(num_agents), np.full(num_agents, 2.0), nothing)


@dataclass(frozen=True, slots=True, eq=False)
class ClosedSetModel:
    """Probabilities that explain closed-set answers."""

    class_prior: Floats
    """[K]"""
    accuracy: Floats
    """[A], expected share of an agent's answers that are right."""
    confusion: Floats
    """[A, K, K], rows add up to 1."""

    def posteriors(self, table: PatternTable, exponents: Floats) -> Floats:
        """E-step: the probability of every label for every pattern; [P, K], rows add up to 1.

        T_k ∝ π_k Π_s E[a_s, k, y_s]^exponent_s over the slots s that are filled.

        Args:
            exponents: [P, S]; below 1 where an answer repeats what its family says anyway.
        """
        num_agents, num_labels, _ = self.confusion.shape
        log_given = np.zeros((num_agents, num_labels + 1, num_labels))  # code 0: no answer
        log_given[:, 1:] = np.log(np.maximum(self.confusion, FLOOR)).transpose(0, 2, 1)
        scores = np.tile(np.log(np.maximum(self.class_prior, FLOOR)), (len(table.counts), 1))
        for slot, agent in enumerate(table.agent_of):
            scores += exponents[:, slot, None] * log_given[agent, table.codes[:, slot] + 1]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(scores / scores.sum(axis=1, keepdims=True))

    def pair_agreement(self) -> tuple[Floats, Floats]:
        """Return how often two agents agree, and at most, were they dependent; [A, A] each."""
        expected = np.einsum("k,iko,jko->ij", self.class_prior, self.confusion, self.confusion)
        attainable = np.empty_like(expected)
        for agent, confusion in enumerate(self.confusion):
            shared = np.minimum(self.confusion, confusion).sum(axis=2)
            attainable[agent] = shared @ self.class_prior
        return expected, attainable


def fit_dawid_skene(
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    strength: float,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> ClosedSetModel:
    """Learn one confusion matrix per agent.

    M-step (maximum a posteriori): E_a[k, o] ∝ strength · onecoin(p_a)[k, o] + pseudo[a, k, o]
    + Σ T_k[y_a = o]. So what little is known of a row stays near the agent's accuracy p_a.

    Args:
        strength: answers per row that the one-coin matrix is worth; 0: maximum likelihood.
        max_iterations: E- and M-steps after the first M-step, which follows the majority.
    """

    def m_step(truth: Floats) -> ClosedSetModel:
        counts = expected_counts(table, truth, len(pseudo.total))
        accuracy = _accuracy(counts, pseudo)
        rows = strength * one_coin(accuracy, truth.shape[1]) + pseudo.confusion + counts
        rows = np.maximum(rows, FLOOR)
        confusion = rows / rows.sum(axis=2, keepdims=True)
        return ClosedSetModel(_class_prior(table, truth), accuracy, confusion)

    return _em(table, exponents, pseudo, m_step, max_iterations, tolerance)


def fit_one_coin(
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> ClosedSetModel:
    """Learn one accuracy per agent; errors are taken as even over the wrong labels.

    M-step: p_a = (Σ T[y_a] + pseudo correct) / (answers + pseudo total).
    """

    def m_step(truth: Floats) -> ClosedSetModel:
        counts = expected_counts(table, truth, len(pseudo.total))
        accuracy = _accuracy(counts, pseudo)
        confusion = np.clip(one_coin(accuracy, truth.shape[1]), FLOOR, 1 - FLOOR)
        return ClosedSetModel(_class_prior(table, truth), accuracy, confusion)

    return _em(table, exponents, pseudo, m_step, max_iterations, tolerance)


def one_coin(accuracy: Floats, num_labels: int) -> Floats:
    """Return the confusion of agents that err evenly: p on the diagonal; [A, K, K]."""
    wrong = (1 - accuracy) / (num_labels - 1)
    confusion = np.tile(wrong[:, None, None], (1, num_labels, num_labels))
    confusion[:, np.arange(num_labels), np.arange(num_labels)] = accuracy[:, None]
    return confusion


def expected_counts(table: PatternTable, truth: Floats, num_agents: int) -> Floats:
    """Return the expected answers of each agent by true and given label; [A, K, K].

    Args:
        truth: [P, K], the posterior of each pattern.
    """
    num_labels = truth.shape[1]
    weighted = (truth * table.counts[:, None]).ravel()
    labels = np.arange(num_labels)
    size = (num_labels + 1) * num_labels
    counts = np.zeros((num_agents, num_labels, num_labels))
    for slot, agent in enumerate(table.agent_of):
        cells = (table.codes[:, slot, None] + 1) * num_labels + labels
        by_given = np.bincount(cells.ravel(), weighted, size).reshape(-1, num_labels)
        counts[agent] += by_given[1:].T  # row 0: no answer
    return counts


def _em(
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    m_step: Callable[[Floats], ClosedSetModel],
    max_iterations: int,
    tolerance: float,
) -> ClosedSetModel:
    truth = vote_shares(table, exponents, pseudo.confusion.shape[1])
    model = m_step(truth)
    for _ in range(max_iterations):
        before, truth = truth, model.posteriors(table, exponents)
        model = m_step(truth)
        if np.abs(truth - before).max(initial=0.0) <= tolerance:
            break
    return model


def vote_shares(table: PatternTable, exponents: Floats, num_labels: int) -> Floats:
    """Return each label's share of a pattern's answers, weighed by the exponents; [P, K]."""
    votes = np.zeros((len(table.counts), num_labels + 1))
    rows = np.arange(len(votes))
    for slot in range(len(table.agent_of)):
        votes[rows, table.codes[:, slot] + 1] += exponents[:, slot]
    votes = votes[:, 1:]
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


def _class_prior(table: PatternTable, truth: Floats) -> Floats:
    return np.asarray((truth * table.counts[:, None]).sum(axis=0) / table.counts.sum())


def _accuracy(counts: Floats, pseudo: PseudoCounts) -> Floats:
    correct = np.trace(counts, axis1=1, axis2=2) + pseudo.correct
    total = counts.sum(axis=(1, 2)) + pseudo.total
    return np.asarray(correct / np.maximum(total, FLOOR))
