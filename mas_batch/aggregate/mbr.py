"""Minimum Bayes risk: of several free texts, the one that the others support most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mas_batch.aggregate.bleu import bleu_matrix
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.rouge import rouge_l_matrix
from mas_batch.aggregate.vote import (
    UNITS,
    Ballot,
    Verdict,
    gather,
    rank_candidates,
    to_units,
    verdict,
)

Utility = Callable[[Sequence[str]], npt.NDArray[np.float64]]
"""N texts → [N, N] in [0, 1]: how well text i would do were text j the right one."""

UTILITIES: dict[str, Utility] = {
    "chrf": chrf_matrix,
    "bleu": bleu_matrix,
    "rouge-l": rouge_l_matrix,
}
"""By the name that a job gives; `embedding_utility` makes further ones from a model."""


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


def embedding_utility(encode: Callable[[Sequence[str]], npt.NDArray[np.floating]]) -> Utility:
    """Return the utility that compares texts by the cosine of their vectors.

    Args:
        encode: N texts → [N, d], the same vector for a text whatever else is in the list.
    """

    def utility(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        if not texts:
            return np.zeros((0, 0))
        vectors = np.asarray(encode(texts))
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(
                f"encode gave an array of shape {vectors.shape} for {len(texts)} texts; "
                f"allowed: ({len(texts)}, d)"
            )
        return cosine_utility(vectors)

    return utility


def cosine_utility(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the cosine of every two vectors, [N, d] → [N, N]; what is below 0 is 0.

    A vector of zeros has no direction: it scores 0, against itself too.

    Raises:
        ValueError: a component is not finite.
    """
    scales = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    if not np.isfinite(scales).all():
        bad = int(np.flatnonzero(~np.isfinite(scales))[0])
        raise ValueError(f"vector {bad} has a component that is not finite")
    # Two steps, so that squares neither overflow nor vanish.
    scaled = np.divide(vectors, scales, out=np.zeros(vectors.shape), where=scales > 0)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    units = np.divide(scaled, norms, out=np.zeros(vectors.shape), where=norms > 0)
    cosines: npt.NDArray[np.float64] = np.clip(units @ units.T, 0.0, 1.0)
    return cosines


def symmetric_units(utilities: npt.NDArray[np.float64]) -> list[list[int]]:
    """Symmetrise, in `UNITS`: a sum of Python's integers is exact and has no order."""
    units: list[list[int]] = np.rint((utilities + utilities.T) * (UNITS / 2)).astype(int).tolist()
    return units


def shares_of(weights: Sequence[float]) -> list[float]:
    """Scale to a sum of 1; of weights that are all 0 everybody has the same share."""
    total = math.fsum(weights)
    return [weight / total if total else 1 / len(weights) for weight in weights]
