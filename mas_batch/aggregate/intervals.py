"""How sure a learned accuracy is."""

from __future__ import annotations

import math

import numpy as np

from mas_batch.aggregate.patterns import MISSING, Floats, PatternTable

_Z95 = 1.959963984540054  # of the normal distribution: 95 % lie within


def wilson_interval(share: float, num_answers: float) -> tuple[float, float]:
    """Return the 95 % interval of a share seen in so many answers; (0, 1) for none.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if num_answers <= 0:
        return (0.0, 1.0)
    ratio = _Z95**2 / num_answers
    centre = (share + ratio / 2) / (1 + ratio)
    spread = share * (1 - share) / num_answers + ratio / (4 * num_answers)
    half = _Z95 * math.sqrt(spread) / (1 + ratio)
    return (max(centre - half, 0.0), min(centre + half, 1.0))


def informative_answers(
    table: PatternTable, exponents: Floats, truth: Floats, num_agents: int
) -> Floats:
    """Return how many answers, known to be right or wrong, each agent's answers are worth; [A].

    Each counts with its exponent. All are then discounted by the information that is missing
    because which of them are right is itself learned (Louis, "Finding the observed information
    matrix when using the EM algorithm", 1982): what is left is Var(q) / (p (1 - p)), q being
    the posteriors that the agent's answers are right and p their mean.

    Args:
        truth: [P, K] or more columns; column i belongs to code i.
    """
    sums = np.zeros((3, num_agents))  # of the weights, of q, of q²
    rows = np.arange(len(truth))
    for slot, agent in enumerate(table.agent_of):
        given = table.codes[:, slot]
        weights = table.counts * exponents[:, slot] * (given != MISSING)
        right = truth[rows, given]
        sums[:, agent] += (weights.sum(), weights @ right, weights @ right**2)
    total = np.maximum(sums[0], 1.0)
    mean, square = sums[1] / total, sums[2] / total
    possible = mean * (1 - mean)
    # Where all are surely right, or all surely wrong, nothing is missing.
    left = np.divide(square - mean**2, possible, out=np.ones(num_agents), where=possible > 1e-9)
    return np.asarray(sums[0] * np.clip(left, 0.0, 1.0))
