"""Judge the confidences of the run's merge and of every other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mas_batch.aggregate.calibration import Calibration, calibration_error
from mas_batch.evaluation.calibration import (
    MIN_RECORDS,
    RiskCoverage,
    cross_fitted,
    reliability_bins,
    risk_coverage,
)
from mas_batch.evaluation.metrics import SumMetric
from mas_batch.evaluation.systems import Confidences, System
from mas_batch.quality import Bin, Kind
from mas_batch.records import STANDARD_ERROR


@dataclass(frozen=True, slots=True)
class ConfidenceQuality:
    """How far a merge's confidence can be believed."""

    kind: Kind
    name: str
    confidence_kind: str
    num_records: int
    """Records with a confidence; those without an answer have none."""
    risk: RiskCoverage
    """Mean loss: the share of wrong answers, 1 - score of a text, or a number's absolute error."""
    error: float | None
    """Expected calibration error; None: the confidence is not in [0, 1], or answers are numbers,
    which are not right or wrong."""
    calibrated_error: float | None
    """After isotonic calibration, each record by a map fitted on others; None: too few records."""
    bins: tuple[Bin, ...]
    """Reliability diagram."""
    calibration: Calibration | None
    """Fitted on all records, for the next run."""


def judge_confidence(
    system: System, confidences: Confidences, goal: SumMetric, seed: int
) -> ConfidenceQuality | None:
    """Compare confidences with the loss by the goal metric; None if no record has one."""
    there = np.isfinite(confidences.values)
    values = confidences.values[there]
    if not len(values):
        return None
    losses = goal.losses[system.first_answers[there]]
    trust = -values if confidences.kind == STANDARD_ERROR else values
    in_unit = confidences.kind != STANDARD_ERROR and bool(np.all((values >= 0) & (values <= 1)))
    right_or_wrong, enough = goal.perfect > 0 and in_unit, len(values) >= MIN_RECORDS
    correct = 1 - losses
    return ConfidenceQuality(
        kind=system.kind,
        name=system.name,
        confidence_kind=confidences.kind,
        num_records=len(values),
        risk=risk_coverage(trust, losses),
        error=calibration_error(values, correct) if right_or_wrong else None,
        calibrated_error=(
            calibration_error(cross_fitted(values, correct, seed), correct)
            if right_or_wrong and enough
            else None
        ),
        bins=reliability_bins(values, correct) if right_or_wrong else (),
        calibration=Calibration.fit(values, correct) if right_or_wrong and enough else None,
    )
