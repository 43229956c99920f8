"""Is a confidence worth its figure: calibration, and whether low confidence means wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mas_batch.evaluation.libraries import library
from mas_batch.evaluation.systems import Vector
from mas_batch.quality import Bin

NUM_BINS = 15
NUM_FOLDS = 5
MIN_RECORDS = 50
"""Fewer are not calibrated: a fold of ten says nothing."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A rising map from confidence to how often (or how far) it is right; JSON-able.

    Source: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass
    probability estimates", KDD 2002.
    """

    confidences: tuple[float, ...]
    """Ascending."""
    values: tuple[float, ...]
    """What each of them means; never falling."""

    @classmethod
    def fit(cls, confidences: Vector, correct: Vector) -> Self:
        """Fit scikit-learn's isotonic regression: least squares, by pooling adjacent violators.

        Raises:
            RunError: scikit-learn is not installed.
        """
        fitted = library("sklearn.isotonic").IsotonicRegression().fit(confidences, correct)
        return cls(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))

    @classmethod
    def from_json(cls, facts: Mapping[str, Sequence[float]]) -> Self:
        """Make it from what `dataclasses.asdict` and JSON made of it."""
        return cls(tuple(facts["confidences"]), tuple(facts["values"]))

    def apply(self, confidence: Any) -> Any:
        """Map a confidence, or an array of them; linear between the levels, flat outside."""
        mapped = np.interp(confidence, self.confidences, self.values)
        return mapped if np.ndim(confidence) else float(mapped)


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
    numbers = np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(numbers, minlength=NUM_BINS)
    sums = (np.bincount(numbers, x, minlength=NUM_BINS) for x in (confidences, correct))
    rows = zip(counts.tolist(), *(column.tolist() for column in sums), strict=True)
    return tuple(
        Bin(i / NUM_BINS, (i + 1) / NUM_BINS, count, confidence / count, right / count)
        for i, (count, confidence, right) in enumerate(rows)
        if count
    )


def calibration_error(confidences: Vector, correct: Vector) -> float:
    """Return the expected calibration error: Σ n_b/n · |mean confidence - mean correct|.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    bins = reliability_bins(confidences, correct)
    gaps = (b.num_records * abs(b.mean_confidence - b.mean_correct) for b in bins)
    return sum(gaps) / len(confidences)


def cross_fitted(confidences: Vector, correct: Vector, seed: int) -> Vector:
    """Calibrate every record by a map that was fitted on the other four fifths."""
    isotonic = library("sklearn.isotonic").IsotonicRegression(out_of_bounds="clip")
    selection = library("sklearn.model_selection")
    folds = np.random.default_rng(seed).permutation(len(confidences)) % NUM_FOLDS
    split = selection.PredefinedSplit(folds)
    return np.asarray(selection.cross_val_predict(isotonic, confidences, correct, cv=split))


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
