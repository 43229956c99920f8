"""Calibration, risk and agreement, against hand-checked figures and scikit-learn."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.calibration import Calibration, calibration_error
from mas_batch.evaluation.agreement import pairwise_agreement
from mas_batch.evaluation.calibration import (
    cross_fitted,
    reliability_bins,
    risk_coverage,
)
from mas_batch.evaluation.confidence import judge_confidence
from mas_batch.evaluation.metrics import metrics_for
from mas_batch.evaluation.systems import Confidences
from mas_batch.quality import Kind
from tests.test_evaluation_metrics import LABELS, SCORES, TEXTS, evidence_of

unit = st.integers(0, 20).map(lambda n: n / 20)
judged = st.lists(st.tuples(unit, unit), min_size=1, max_size=40)


def columns(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.array(pairs).T
    return left, right


# Isotonic calibration


@given(judged)
def test_the_map_is_scikit_learns(pairs: list[tuple[float, float]]) -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    confidences, correct = columns(pairs)
    model = isotonic.IsotonicRegression(out_of_bounds="clip").fit(confidences, correct)
    asked = np.linspace(-0.1, 1.1, 49)
    ours = Calibration.fit(confidences, correct).apply(asked)
    assert ours == pytest.approx(model.predict(asked), abs=1e-12)


@given(judged)
def test_the_map_never_falls_and_keeps_the_mean(pairs: list[tuple[float, float]]) -> None:
    confidences, correct = columns(pairs)
    fitted = Calibration.fit(confidences, correct)
    assert (np.diff(fitted.values) >= 0).all()
    assert (np.diff(fitted.confidences) > 0).all()
    assert fitted.apply(confidences).mean() == pytest.approx(correct.mean())
    assert calibration_error(fitted.apply(confidences), correct) < 1e-9


def test_violators_are_pooled_by_hand() -> None:
    fitted = Calibration.fit(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 1.0, 0.0, 1.0]))
    assert fitted == Calibration((0.1, 0.2, 0.3, 0.4), (0.0, 0.5, 0.5, 1.0))
    assert fitted.apply(0.15) == pytest.approx(0.25)
    assert fitted.apply(0.9) == 1.0


def test_a_calibration_survives_json() -> None:
    fitted = Calibration.fit(np.array([0.2, 0.9]), np.array([0.1, 0.7]))
    assert Calibration.from_json(json.loads(json.dumps(asdict(fitted)))) == fitted


def test_cross_fitting_does_not_flatter() -> None:
    """Confidences that say nothing: a map that has seen the answers looks perfect."""
    rng = np.random.default_rng(0)
    confidences, correct = rng.random(400), (rng.random(400) < 0.5).astype(float)
    seen = calibration_error(Calibration.fit(confidences, correct).apply(confidences), correct)
    honest = calibration_error(cross_fitted(confidences, correct, seed=0), correct)
    assert seen < 1e-9 < 0.01 < honest


def test_cross_fitting_repairs_overconfidence() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(2000)
    correct = (rng.random(2000) < truth).astype(float)
    confidences = np.sqrt(truth)
    assert calibration_error(confidences, correct) == pytest.approx(2 / 3 - 1 / 2, abs=0.02)
    assert calibration_error(cross_fitted(confidences, correct, seed=0), correct) < 0.05


# Error and risk


def test_the_calibration_error_by_hand() -> None:
    confidences, correct = np.array([0.0, 0.05, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    first, last = reliability_bins(confidences, correct)
    assert (first.num_records, first.mean_confidence, first.mean_correct) == (2, 0.025, 0.5)
    assert (last.low, last.high, last.num_records) == (14 / 15, 1.0, 2)
    assert calibration_error(confidences, correct) == pytest.approx(0.475)


@given(judged, st.integers(0, 99))
def test_no_figure_depends_on_the_order(pairs: list[tuple[float, float]], seed: int) -> None:
    shuffled = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    one, other = columns(pairs), columns(shuffled)
    assert calibration_error(*one) == pytest.approx(calibration_error(*other))
    assert asdict(risk_coverage(*one)) == pytest.approx(asdict(risk_coverage(*other)))


@given(judged)
def test_risk_is_between_best_and_worst(pairs: list[tuple[float, float]]) -> None:
    trust, losses = columns(pairs)
    risk = risk_coverage(trust, losses)
    assert risk.best - 1e-12 <= risk.area <= risk_coverage(losses, losses).area + 1e-12
    assert risk_coverage(np.ones_like(trust), losses).area == pytest.approx(risk.random)


def test_risk_by_hand() -> None:
    risk = risk_coverage(np.array([0.9, 0.8, 0.1]), np.array([0.0, 1.0, 0.0]))
    assert risk.area == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert risk.random == pytest.approx(1 / 3)
    assert risk.best == pytest.approx((0 + 0 + 1 / 3) / 3)


# Confidence of a merge


def test_few_records_are_not_calibrated_and_a_missing_answer_has_no_confidence() -> None:
    evidence = evidence_of(["x", "y", "x"], {"a": ["x", "x", None]})
    metrics = metrics_for(LABELS, "label", evidence)
    (merge,) = evidence.of(Kind.RUN)
    confidences = Confidences("agreement", np.array([1.0, 0.5, np.nan]))
    result = judge_confidence(merge, confidences, metrics.goal, seed=0)
    assert result is not None
    assert (result.num_records, result.error) == (2, pytest.approx(0.25))
    assert result.calibration is None
    assert result.calibrated_error is None
    nothing = Confidences("agreement", np.full(3, np.nan))
    assert judge_confidence(merge, nothing, metrics.goal, seed=0) is None


def test_a_small_standard_error_is_trusted() -> None:
    evidence = evidence_of(["1", "5"], {"a": ["1.0", "9.0"]})
    metrics = metrics_for(SCORES, "value", evidence)
    (merge,) = evidence.of(Kind.RUN)
    confidences = Confidences("standard_error", np.array([0.1, 3.0]))
    result = judge_confidence(merge, confidences, metrics.goal, seed=0)
    assert result is not None
    assert result.risk.area == pytest.approx(result.risk.best)
    assert result.error is None
    assert result.bins == ()


# Agreement


def test_agreement_by_hand() -> None:
    evidence = evidence_of(
        ["x", "y", "z", "x", "x"],
        {"a": ["x", "x", "x", "y", None], "b": ["x", "x", "Z.", "z", "x"]},
    )
    (pair,) = pairwise_agreement(evidence, "label", seed=0)
    assert (pair.agent_a, pair.agent_b, pair.num_records) == ("a", "b", 4)
    assert pair.equal == 0.5
    assert pair.kappa == pytest.approx((0.5 - 3 / 4 * 2 / 4) / (1 - 3 / 4 * 2 / 4))
    assert pair.same_error == 0.5  # both wrong twice, once alike


@given(st.lists(st.tuples(*[st.sampled_from("xyz")] * 2), min_size=1, max_size=30))
def test_kappa_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    left, right = ([*side] for side in zip(*pairs, strict=True))
    (pair,) = pairwise_agreement(evidence_of(left, {"a": left, "b": right}), "label", seed=0)
    if len({*left, *right}) == 1:
        assert pair.kappa is None
    else:
        assert pair.kappa == pytest.approx(sklearn.cohen_kappa_score(left, right))


def test_texts_agree_by_chrf_and_numbers_by_their_difference() -> None:
    texts = evidence_of(["r", "r"], {"a": ["same text", "one"], "b": ["same text", "xyz"]})
    metrics_for(TEXTS, "text", texts)
    (pair,) = pairwise_agreement(texts, "text", seed=0)
    assert (pair.equal, pair.utility) == (0.5, pytest.approx(0.5))
    numbers = evidence_of(["1", "1"], {"a": ["1.0", "4.0"], "b": ["1.0", "2.0"]})
    (pair,) = pairwise_agreement(numbers, "value", seed=0)
    assert (pair.equal, pair.mean_difference, pair.kappa) == (0.5, 1.0, None)
