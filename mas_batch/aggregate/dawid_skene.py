"""Dawid–Skene on counted patterns: who is right how often, learned from closed-set answers.

Sources: Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
algorithm", 1979; Dirichlet priors on classes and confusions: Kim and Ghahramani, "Bayesian
classifier combination", AISTATS 2012; what the confusions are believed to look like: Hovy et al.,
"Learning whom to trust with MACE", NAACL 2013, or one accuracy per agent ("one-coin"): Zhang,
Chen, Zhou and Jordan, "Spectral methods meet EM", 2016. With equal patterns taken together, an
iteration costs O(P·S·K) for P patterns, S slots and K labels, however many records there are.

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

_COMPETENCE_ROUNDS = 15
"""Of finding θ and ξ; each halves the distance at least where θ is not near 0."""

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
    classes: Floats
    """[K], records of each label; [0] for an open set."""

    @classmethod
    def none(cls, num_agents: int, num_labels: int) -> PseudoCounts:
        """Believe nothing: maximum likelihood."""
        nothing = np.zeros((num_agents, num_labels, num_labels))
        return cls(np.zeros(num_agents), np.zeros(num_agents), nothing, np.zeros(num_labels))

    @classmethod
    def laplace(cls, num_agents: int, num_labels: int) -> PseudoCounts:
        """Believe that everybody can err, once in two answers, and that every label occurs."""
        nothing = np.zeros((num_agents, num_labels, num_labels))
        correct, total = np.ones(num_agents), np.full(num_agents, 2.0)
        return cls(correct, total, nothing, np.ones(num_labels))


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


Shape = Callable[[Floats, PseudoCounts], Floats]
"""(Expected answers [A, K, K] by true and given label, beliefs) → what confusions look like."""


def fit_dawid_skene(
    table: PatternTable,
    exponents: Floats,
    pseudo: PseudoCounts,
    strength: float,
    shape: Shape,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> ClosedSetModel:
    """Learn one confusion matrix per agent, from the vote's shares on.

    M-step (maximum a posteriori): E_a[k, o] ∝ strength · shape[a, k, o] + pseudo[a, k, o]
    + Σ T_k[y_a = o]. So what little is known of a row stays near what the agent is like. An answer
    counts as much in the sum as in the E-step: by its exponent.

    Why from the vote only, and not the likeliest of several starts: where agents share errors, the
    likeliest explanation is one in which a class has gone (benchmarks/README.md, "Real answers").

    Args:
        strength: answers per row that the shape is worth; 0: maximum likelihood.
        shape: `competence`, or `one_coin_of`, which for a huge strength is one-coin Dawid–Skene.
        max_iterations: E- and M-steps after the first M-step, which follows the vote.
    """
    num_agents, num_labels, _ = pseudo.confusion.shape

    def m_step(truth: Floats) -> ClosedSetModel:
        counts = expected_counts(table, truth, exponents, num_agents)
        rows = strength * shape(counts, pseudo) + pseudo.confusion + counts
        rows = np.maximum(rows, FLOOR)
        confusion = rows / rows.sum(axis=2, keepdims=True)
        classes = (truth * table.counts[:, None]).sum(axis=0) + pseudo.classes
        return ClosedSetModel(classes / classes.sum(), _accuracy(counts, pseudo), confusion)

    truth = vote_shares(table, exponents, num_labels)
    model = m_step(truth)
    for _ in range(max_iterations):
        before, truth = truth, model.posteriors(table, exponents)
        model = m_step(truth)
        if np.abs(truth - before).max(initial=0.0) <= tolerance:
            break
    return model


def competence(counts: Floats, pseudo: PseudoCounts) -> Floats:
    """Return confusions of agents that know the answer, or else say what they like to say.

    An agent that knows with probability θ and otherwise draws from ξ, whatever is right, has
    E[k, o] = θ·[k = o] + (1 - θ)·ξ[o]: its diagonal is heavy, a yes-man is one with a θ near 0, and
    nobody is worse than chance. θ and ξ are found by expectation maximisation; a label more
    each is believed of ξ (MACE, by Hovy et al., 2013).
    """
    num_agents, num_labels, _ = counts.shape
    diagonal, given = np.einsum("akk->ak", counts), counts.sum(axis=1)
    knows, likes = np.full((num_agents, 1), 0.5), np.full((num_agents, num_labels), 1 / num_labels)
    for _ in range(_COMPETENCE_ROUNDS):
        known = diagonal * knows / (knows + (1 - knows) * likes)
        correct = known.sum(axis=1) + pseudo.correct
        knows = (correct / (given.sum(axis=1) + pseudo.total))[:, None]
        likes = given - known + 1
        likes /= likes.sum(axis=1, keepdims=True)
    return np.asarray(knows[:, :, None] * np.eye(num_labels) + ((1 - knows) * likes)[:, None, :])


def one_coin_of(counts: Floats, pseudo: PseudoCounts) -> Floats:
    """Return confusions of agents that err evenly, each at its own rate."""
    return one_coin(_accuracy(counts, pseudo), counts.shape[1])


def one_coin(accuracy: Floats, num_labels: int) -> Floats:
    """Return the confusion of agents that err evenly: p on the diagonal; [A, K, K]."""
    wrong = (1 - accuracy) / (num_labels - 1)
    confusion = np.tile(wrong[:, None, None], (1, num_labels, num_labels))
    confusion[:, np.arange(num_labels), np.arange(num_labels)] = accuracy[:, None]
    return confusion


def expected_counts(
    table: PatternTable, truth: Floats, exponents: Floats, num_agents: int
) -> Floats:
    """Return the expected answers of each agent by true and given label; [A, K, K].

    Args:
        truth: [P, K], the posterior of each pattern.
        exponents: [P, S], what an answer counts.
    """
    num_labels = truth.shape[1]
    weighted = truth * table.counts[:, None]
    labels = np.arange(num_labels)
    size = (num_labels + 1) * num_labels
    counts = np.zeros((num_agents, num_labels, num_labels))
    for slot, agent in enumerate(table.agent_of):
        cells = (table.codes[:, slot, None] + 1) * num_labels + labels
        each = (weighted * exponents[:, slot, None]).ravel()
        by_given = np.bincount(cells.ravel(), each, size).reshape(-1, num_labels)
        counts[agent] += by_given[1:].T  # row 0: no answer
    return counts


def vote_shares(table: PatternTable, exponents: Floats, num_labels: int) -> Floats:
    """Return each label's share of a pattern's answers, weighed by the exponents; [P, K]."""
    votes = table.sums_by_code(exponents, num_labels)
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


def _accuracy(counts: Floats, pseudo: PseudoCounts) -> Floats:
    correct = np.trace(counts, axis1=1, axis2=2) + pseudo.correct
    total = counts.sum(axis=(1, 2)) + pseudo.total
    return np.asarray(correct / np.maximum(total, FLOOR))
