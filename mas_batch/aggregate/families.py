"""Voters of one family err alike: how much, and how much less their word is worth for it.

A family is the agents of one model; the samples of one agent are of one family too. Let ρ be
a family's correlation: 0 where its members agree as often as voters of their accuracy do who
err independently, 1 where they agree as often as their accuracies allow. Of n answers by a
family, each log-likelihood is multiplied by 1 / (1 + (n - 1) ρ), the design effect of cluster
sampling (Kish, "Survey Sampling", 1965): n copies of one answer count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from mas_batch.aggregate.patterns import MISSING, Floats, Integers, PatternTable

MIN_FAMILIES = 3
"""With fewer, a family that shares errors looks like one that is right: ρ is taken as 0."""

_MAX_ROUNDS = 20
_SETTLED = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class PairAgreement:
    """How often two agents agree; all [A, A], upper triangle, samples of one on the diagonal."""

    compared: Floats
    """Pairs of answers to one record, over all records."""
    agreed: Floats
    """Those of equal code."""
    records: Floats
    """Records, about, that the pairs come from: pairs of samples are not independent."""


class Model(Protocol):
    """What explains the answers, the voters being independent but for the exponents."""

    @property
    def accuracy(self) -> Floats:
        """Expected share of each agent's answers that are right; [A]."""

    def posteriors(self, table: PatternTable, exponents: Floats) -> Floats:
        """Return how likely each answer is right; [P, C], column i belonging to code i."""

    def pair_agreement(self) -> tuple[Floats, Floats]:
        """Return how often two agents agree by the model, and at most; [A, A] each."""


M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True, eq=False)
class FamilyFit(Generic[M]):
    """A model, fitted to answers of families."""

    model: M
    correlation: Floats
    """[F], ρ of each family."""
    exponents: Floats
    """[P, S], what an answer counts beside the others of its family."""
    posteriors: Floats
    """[P, C], of the patterns, by the model."""


def family_numbers(family_ids: Sequence[str]) -> Integers:
    """Number the families by name; [A], the number of each agent's."""
    number = {family: position for position, family in enumerate(sorted(set(family_ids)))}
    return np.array([number[family] for family in family_ids], dtype=np.int64)


def fit_with_families(
    table: PatternTable, families: Integers, fit: Callable[[Floats], M]
) -> FamilyFit[M]:
    """Fit the model and each family's ρ in turn, until no ρ moves by 0.01.

    ρ = Σ (agreed - expected) / Σ (attainable - expected), clipped to [0, 1], over all pairs of
    answers within the family. The first fit takes ρ = 1, one vote per family: the other way
    round, a family of copies would first be the majority, then look accurate, and its
    agreement would be no surprise.

    Args:
        families: [A], number of each agent's family.
        fit: exponents [P, S] → model.
    """
    num_families = int(families.max(initial=-1)) + 1
    slots = np.bincount(families[table.agent_of], minlength=num_families)
    correlation = (slots > 1).astype(np.float64) * (num_families >= MIN_FAMILIES)
    agreement = pair_agreement(table, len(families)) if correlation.any() else None
    for _ in range(_MAX_ROUNDS):
        used, factors = correlation, exponents(table, families, correlation)
        model = fit(factors)
        if agreement is None:
            break
        correlation = _correlation(agreement, model, families)
        if np.abs(correlation - used).max() < _SETTLED:
            break
    return FamilyFit(model, used, factors, model.posteriors(table, factors))


def exponents(table: PatternTable, families: Integers, correlation: Floats) -> Floats:
    """Return 1 / (1 + (n - 1) ρ) for every slot, n being its family's answers there; [P, S]."""
    filled = table.codes != MISSING
    factors = np.ones(filled.shape)
    family_of = families[table.agent_of]
    for family in np.unique(family_of):
        members = family_of == family
        answers = filled[:, members].sum(axis=1)
        # Where the family did not answer, the factor is not used: any but 1/0 will do.
        factor = 1 / (1 + np.maximum(answers - 1, 0) * correlation[family])
        factors[:, members] = factor[:, None]
    return factors


def pair_agreement(table: PatternTable, num_agents: int) -> PairAgreement:
    """Count agreements over all pairs of slots; O(P·S²)."""
    compared, agreed, pairs = (np.zeros((num_agents, num_agents)) for _ in range(3))
    filled = table.codes != MISSING
    for right, agent_right in enumerate(table.agent_of):
        for left, agent_left in enumerate(table.agent_of[:right]):
            pair = (agent_left, agent_right)
            both = filled[:, left] & filled[:, right]
            equal = both & (table.codes[:, left] == table.codes[:, right])
            compared[pair] += table.counts @ both
            agreed[pair] += table.counts @ equal
            pairs[pair] += 1
    return PairAgreement(compared, agreed, compared / np.maximum(pairs, 1))


def agreement_above_chance(table: PatternTable, families: Integers, num_labels: int) -> Floats:
    """Return by how many standard errors each agent agrees with others above chance; [A].

    Chance is what closed-set agents' own frequencies of the labels lead to, as in Cohen's kappa
    (1960). Agents of one family are not compared, unless there is but one family. It is 0 for an
    agent that shares no record with another, or where both always say the same.
    """
    num_agents = len(families)
    shares = label_shares(table, num_agents, num_labels)
    agreement = pair_agreement(table, num_agents)
    counted = families[:, None] != families[None, :]
    if not counted.any():
        counted = ~np.eye(num_agents, dtype=bool)
    chance = shares @ shares.T
    rate = agreement.agreed / np.maximum(agreement.compared, 1)
    excess = agreement.records * (rate - chance) * counted
    variance = agreement.records * chance * (1 - chance) * counted
    above, spread = (pairs.sum(axis=0) + pairs.sum(axis=1) for pairs in (excess, variance))
    return np.asarray(np.divide(above, np.sqrt(spread), out=np.zeros(num_agents), where=spread > 0))


def label_shares(table: PatternTable, num_agents: int, num_labels: int) -> Floats:
    """Return how often each agent gives each label, as shares of its answers; [A, K]."""
    counts = np.zeros((num_agents, num_labels))
    for slot, agent in enumerate(table.agent_of):
        given = table.codes[:, slot] + 1
        counts[agent] += np.bincount(given, table.counts, num_labels + 1)[1:]
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _correlation(agreement: PairAgreement, model: Model, families: Integers) -> Floats:
    expected, attainable = model.pair_agreement()
    excess = agreement.agreed - agreement.compared * expected
    room = agreement.compared * (attainable - expected)
    correlation = np.zeros(int(families.max()) + 1)
    for family in range(len(correlation)):
        members = families == family
        within = members[:, None] & members[None, :]
        if room[within].sum() > 0:
            correlation[family] = excess[within].sum() / room[within].sum()
    return np.clip(correlation, 0.0, 1.0)
