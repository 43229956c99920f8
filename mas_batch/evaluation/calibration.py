"""Is a confidence worth its figure: calibration, and whether low confidence means wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mas_batch.aggregate import calibration
from mas_batch.aggregate.calibration import NUM_BINS, NUM_FOLDS, Calibration, bin_numbers
from mas_batch.evaluation.systems import Vector
from mas_batch.quality import Bin

MIN_RECORDS = 50
"""Fewer are not calibrated: a fold of ten says nothing."""


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Mean loss when only the most confident share of the records is answered, over all shares.

    Source: El-Yaniv and Wiener, "On the foundations of noise-free selective classification",
    JMLR 2010; Geifman et al., "Bias-reduced uncertainty estimation", ICLR 2019.
    """

    area: float
    random: float
    """Of a confidence that says nothing: the mean loss of all records."""
    best: float
    """Of one that puts every wrong answer last."""


def reliability_bins(confidences: Vector, correct: Vector) -> tuple[Bin, ...]:
    """Group records into 15 bins of equal width over [0, 1]; empty ones are left out.

    Args:
        correct: in [0, 1]: right or wrong, or a text's score as a soft target.
    """
    numbers = bin_numbers(confidences)
    counts = np.bincount(numbers, minlength=NUM_BINS)
    sums = (np.bincount(numbers, x, minlength=NUM_BINS) for x in (confidences, correct))
    rows = zip(counts.tolist(), *(column.tolist() for column in sums), strict=True)
    return tuple(
        Bin(i / NUM_BINS, (i + 1) / NUM_BINS, count, confidence / count, right / count)
        for i, (count, confidence, right) in enumerate(rows)
        if count
    )


def cross_fitted(confidences: Vector, correct: Vector, seed: int) -> Vector:
    """Calibrate every record by a map that was fitted on the other four fifths."""
    folds = np.random.default_rng(seed).permutation(len(confidences)) % NUM_FOLDS
    return calibration.cross_fitted(Calibration.fit, confidences, correct, folds)


def risk_coverage(trust: Vector, losses: Vector) -> RiskCoverage:
    """Measure the area under the risk–coverage curve.

    Args:
        trust: higher is surer, on any scale. Records of equal trust count as their mean.
        losses: how wrong each record's answer is.
    """
    return RiskCoverage(_area(trust, losses), float(losses.mean()), _area(-losses, losses))


def _area(trust: Vector, losses: Vector) -> float:
    _, inverse, counts = np.unique(-trust, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(inverse, losses) / counts, counts)
    risks = np.cumsum(expected) / np.arange(1, len(expected) + 1)
    return float(risks.mean())
