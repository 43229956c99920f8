"""From a confidence to how often it is right, learned from a few records with known answers.

Rising maps compete, and cross-validation chooses: isotonic regression bends anywhere and needs
many records, a logistic one has two parameters (temperature and bias) and makes do with few, and
the mean of both is between them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from mas_batch.aggregate.label_weights import Labelled, LabelWeights, starts_of, weigh
from mas_batch.aggregate.patterns import Floats
from mas_batch.by_name import pickled_by_name

CALIBRATED = "calibrated"
"""The `confidence_kind` of a confidence that labels have made a probability of being right."""

MIN_LABELS = 50
"""With fewer, a fold has ten records and says nothing."""

GOOD_ERROR = 0.05
"""A map of a higher error is warned of."""

NUM_BINS = 15
NUM_FOLDS = 5
NUM_ROUNDS = 4
"""Times that the folds are drawn anew: with one round, luck decides between the maps."""

_GRID = np.linspace(0.0, 1.0, 201)
_LEAST_CONFIDENCE = 0.005
_RIDGE = 0.1
"""Of the logistic map's parameters around "as it is": labels that are all right stay finite."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A rising map from confidence to how often (or how far) it is right; JSON-able."""

    confidences: tuple[float, ...]
    """Ascending."""
    values: tuple[float, ...]
    """What each of them means; never falling."""

    @classmethod
    def fit(cls, confidences: Floats, correct: Floats) -> Self:
        """Fit isotonic regression: least squares, by pooling adjacent violators.

        Source: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass
        probability estimates", KDD 2002.
        """
        levels, place = np.unique(confidences, return_inverse=True)
        counts = np.bincount(place).astype(np.float64)
        blocks: list[tuple[float, float, int]] = []  # mean, records, levels
        for mean, count in zip(np.bincount(place, correct) / counts, counts, strict=True):
            block = (float(mean), float(count), 1)
            while blocks and blocks[-1][0] >= block[0]:
                block = _pooled(blocks.pop(), block)
            blocks.append(block)
        values = np.repeat([block[0] for block in blocks], [block[2] for block in blocks])
        return cls(tuple(levels.tolist()), tuple(values.tolist()))

    @classmethod
    def fit_logistic(cls, confidences: Floats, correct: Floats) -> Self:
        """Fit P(right) = σ(a · ln(c / (1 - c)) + b), drawn a little towards a = 1 and b = 0.

        Source: Platt, "Probabilistic outputs for support vector machines", 1999; with b = 0 it is
        temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017).
        """
        design = np.column_stack([_logit(confidences), np.ones(len(confidences))])
        start = np.array([1.0, 0.0])
        found = start
        for _ in range(30):  # Newton's method
            right = 1 / (1 + np.exp(-design @ found))
            slope = design.T @ (correct - right) - _RIDGE * (found - start)
            bend = (design * (right * (1 - right))[:, None]).T @ design + _RIDGE * np.eye(2)
            found = found + np.clip(np.linalg.solve(bend, slope), -1.0, 1.0)
        found = np.array([max(found[0], 0.0), found[1]])  # it must not fall
        values = 1 / (1 + np.exp(-(found[0] * _logit(_GRID) + found[1])))
        return cls(tuple(_GRID.tolist()), tuple(values.tolist()))

    @classmethod
    def fit_mean(cls, confidences: Floats, correct: Floats) -> Self:
        """Fit the mean of the isotonic and the logistic map."""
        both = [fit(confidences, correct) for fit in (cls.fit, cls.fit_logistic)]
        places = np.union1d(_GRID, both[0].confidences)
        values = np.mean([each.apply(places) for each in both], axis=0)
        return cls(tuple(places.tolist()), tuple(values.tolist()))

    @classmethod
    def from_json(cls, facts: Mapping[str, Sequence[float]]) -> Self:
        """Make it from what `dataclasses.asdict` and JSON made of it."""
        return cls(tuple(facts["confidences"]), tuple(facts["values"]))

    def apply(self, confidence: Any) -> Any:
        """Map a confidence, or an array of them; linear between the levels, flat outside."""
        mapped = np.interp(confidence, self.confidences, self.values)
        return mapped if np.ndim(confidence) else float(mapped)


MAPS: Mapping[str, Callable[[Floats, Floats], Calibration]] = {
    "isotonic": Calibration.fit,
    "logistic": Calibration.fit_logistic,
    "mean": Calibration.fit_mean,
}


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Calibrated:
    """What labelled records have taught: what is published, and what its confidence is worth.

    The confidence's map is the chosen one, with what cross-validation says of it.
    """

    calibration: Calibration
    kind: str
    """One of `MAPS`."""
    num_records: int
    error: float
    """Expected calibration error of records that the map was not fitted on."""
    error_before: float
    """Of the same records' answers and confidences as the method has them."""
    noise: float
    """What so few records would show of confidences that are right."""
    weights: LabelWeights | None = None
    """By which the published answer is chosen; None: it is the method's."""
    chosen: str = ""
    """For people: which of the two, and why."""

    @property
    def why(self) -> str:
        """For people: by what, and how well."""
        chosen = f"{self.chosen}; " if self.chosen else ""  # none by earlier versions
        return (
            f"{chosen}confidences are calibrated by {self.num_records} labelled records "
            f"({self.kind} map): calibration error {self.error:.3f} in cross-validation, of which "
            f"{self.noise:.3f} is the noise of so few; {self.error_before:.3f} before"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """For people: whether that is not good enough."""
        off = math.sqrt(max(0.0, self.error**2 - self.noise**2))
        if off <= GOOD_ERROR:
            return ()
        return (
            f"Confidences are off by {off:.3f} on average, in spite of {self.num_records} "
            f"labelled records (over {GOOD_ERROR}): label more.",
        )

    def to_json(self) -> str:
        """Write it down; `from_json` reads it back."""
        return json.dumps({**asdict(self), "why": self.why}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` has written."""
        facts = json.loads(text)
        facts.pop("why")
        facts["calibration"] = Calibration.from_json(facts["calibration"])
        weights = facts.get("weights")  # none by earlier versions
        return cls(**{**facts, "weights": LabelWeights(**weights) if weights else None})


def learn_from_labels(
    records: Sequence[Labelled], method: str, log_odds: Mapping[str, float]
) -> Calibrated:
    """Learn what is published, and what its confidences are worth; see `weigh` and `calibrate`.

    Args:
        records: in an order that is always the same.
        log_odds: agent → what its answer counts, as far as that is known without labels.
    """
    found = weigh(records, method, starts_of(log_odds))
    calibrated = calibrate(found.confidences, found.correct)
    own = np.array([record.confidence for record in records])
    right = np.array([record.right == 0 for record in records], dtype=np.float64)
    before = calibration_error(own, right)
    return replace(calibrated, error_before=before, weights=found.weights, chosen=found.why)


def calibrate(confidences: Floats, correct: Floats) -> Calibrated:
    """Fit all maps, and keep the one of the lowest squared error on records that it has not seen.

    The outcome depends on the pairs alone, not on their order.
    """
    order = np.lexsort((correct, confidences))
    confidences, correct = confidences[order], correct[order]
    random = np.random.default_rng(0)
    rounds = [random.permutation(len(confidences)) % NUM_FOLDS for _ in range(NUM_ROUNDS)]
    unseen = {
        kind: np.stack([cross_fitted(fit, confidences, correct, folds) for folds in rounds])
        for kind, fit in MAPS.items()
    }
    kind = min(MAPS, key=lambda each: float(((unseen[each] - correct) ** 2).mean()))
    mapped = unseen[kind]
    lucky = (random.random(mapped.shape) < mapped).astype(np.float64)
    fitted = MAPS[kind](confidences, correct)
    surest = 1 - 1 / (len(confidences) + 2)  # as sure as so many records can make, by Laplace
    values = np.clip(fitted.values, 1 - surest, surest)
    return Calibrated(
        replace(fitted, values=tuple(values.tolist())),
        kind,
        len(confidences),
        error=_mean_error(mapped, np.tile(correct, (NUM_ROUNDS, 1))),
        error_before=calibration_error(confidences, correct),
        noise=_mean_error(mapped, lucky),
    )


def _mean_error(confidences: Floats, correct: Floats) -> float:
    pairs = zip(confidences, correct, strict=True)
    return float(np.mean([calibration_error(*pair) for pair in pairs]))


def calibration_error(confidences: Floats, correct: Floats) -> float:
    """Return the expected calibration error: Σ n_b/n · |mean confidence - mean correct|.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017; 15 equal bins.
    """
    gaps = np.bincount(bin_numbers(confidences), confidences - correct, NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def bin_numbers(confidences: Floats) -> Any:
    """Number each confidence's bin among `NUM_BINS` equal ones over [0, 1]."""
    return np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def cross_fitted(
    fit: Callable[[Floats, Floats], Calibration], confidences: Floats, correct: Floats, folds: Any
) -> Floats:
    """Calibrate every record by a map that was fitted on the other folds."""
    mapped = np.empty(len(confidences))
    for fold in range(NUM_FOLDS):
        held = folds == fold
        mapped[held] = fit(confidences[~held], correct[~held]).apply(confidences[held])
    return mapped


def _pooled(
    left: tuple[float, float, int], right: tuple[float, float, int]
) -> tuple[float, float, int]:
    count = left[1] + right[1]
    return ((left[0] * left[1] + right[0] * right[1]) / count, count, left[2] + right[2])


def _logit(confidences: Floats) -> Floats:
    kept = np.clip(confidences, _LEAST_CONFIDENCE, 1 - _LEAST_CONFIDENCE)
    return np.asarray(np.log(kept / (1 - kept)))
