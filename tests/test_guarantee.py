"""A cascade's guarantee: exact bounds, and two hundred samples of real agents' answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.escalation import (
    LABELS,
    SAMPLE,
    Escalation,
    Sample,
    picked,
    up_to,
)
from mas_batch.aggregate.guarantee import Place, last_escalated, num_tolerated
from mas_batch.job import Escalate

REAL = {
    "three weak agents": {0.333: (44, 58), 0.5: (117, 209), 0.667: (196, 75), 1.0: (737, 64)},
    "two good agents": {0.5: (176, 227), 1.0: (1053, 44)},
}
"""Confidence → records on which the vote and a stronger agent (k nearest neighbours among 1,740
examples) agree and differ: 1,500 of Debian's package descriptions, in eight sections. Weak: MiniLM
centroids, naive Bayes and keywords, of 200 examples; good: centroids and naive Bayes of 1,740."""


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.5, 0.99), st.floats(0.01, 0.2))
def test_the_bound_is_scipys_hypergeometric(
    num_records: int, num_labels: int, target: float, delta: float
) -> None:
    hypergeom = pytest.importorskip("scipy.stats").hypergeom
    num_labels = min(num_labels, num_records)
    tolerated = num_tolerated(num_records, num_labels, target=target, delta=delta)
    wrong = int((1 - target) * num_records + 1e-9) + 1
    if wrong > num_records:
        return
    law = hypergeom(num_records, wrong, num_labels)
    if tolerated >= 0:
        assert law.cdf(tolerated) <= delta * (1 + 1e-6)
    if tolerated < min(wrong, num_labels):
        assert law.cdf(tolerated + 1) > delta * (1 - 1e-6)


def test_as_many_errors_may_be_left_as_the_sample_can_tell() -> None:
    everything = [Place(500, lot / 100) for lot in range(100)]
    place = last_escalated(everything, 100, 100, target=0.95, delta=0.05)
    assert place == Place(500, 0.94), "all are known: five are allowed"
    assert num_tolerated(10**7, 400, target=0.95, delta=0.05) == 12
    assert num_tolerated(10**7, 59, target=0.95, delta=0.05) == 0
    assert num_tolerated(10**7, 58, target=0.95, delta=0.05) == -1
    surest = sorted(everything, reverse=True)[:14]
    assert last_escalated(surest, 10**7, 400, target=0.95, delta=0.05) == Place(500, 0.87)


def test_too_few_answered_records_are_all_escalated() -> None:
    place = last_escalated([], 1000, 20, target=0.95, delta=0.05)
    assert place is not None
    assert up_to("e", place, None).picks("any", 1000)


@pytest.mark.parametrize("agents", REAL)
def test_of_two_hundred_samples_of_real_answers_less_than_delta_miss(agents: str) -> None:
    target = 0.95
    confidence, agrees = records_of(agents)
    ids = [f"r{i}" for i in range(len(agrees))]
    results = pa.table({"record_id": ids, "confidence": confidence})
    theirs = {record: "same" if same else "other" for record, same in zip(ids, agrees, strict=True)}
    missed, asked = 0, []
    for seed in range(200):
        escalation = found(results, theirs, Sample(f"seed {seed}", 300), target)
        chosen = np.isin(ids, escalated(escalation, results))
        missed += (agrees | chosen).mean() < target
        asked.append(chosen.mean())
    assert missed / 200 <= 0.05
    assert np.mean(asked) < 0.75, "it is no use to escalate everything"
    print(f"{agents}: {missed} of 200 miss {target}, {np.mean(asked):.1%} are escalated")


def records_of(agents: str) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    parts = [(c, ok, n) for c, (yes, no) in REAL[agents].items() for ok, n in ((1, yes), (0, no))]
    confidence = np.concatenate([np.full(n, c) for c, _, n in parts])
    agrees = np.concatenate([np.full(n, bool(ok)) for _, ok, n in parts])
    return confidence, agrees


def found(results: pa.Table, theirs: dict[str, str], sample: Sample, target: float) -> Escalation:
    """What a run does, but that all answers are known."""
    lots = SAMPLE.chunk(results, sample)["lots"]
    sample = Sample(sample.seed, len(lots), lots[-1])
    mask = [sample.lot(record) <= sample.last_lot for record in theirs]
    rows = results.filter(pa.array(mask)).to_pylist()
    labelled = pa.Table.from_pylist([{**row, "key": "same"} for row in rows])
    labels = LABELS.chunk(labelled, {row["record_id"]: theirs[row["record_id"]] for row in rows})
    assert labels["labels"] == sample.size
    places = [Place(*place) for place in labels["disagreeing"]]
    place = last_escalated(places, results.num_rows, sample.size, target=target, delta=0.05)
    return up_to("expert", place, sample)


def escalated(escalation: Escalation, results: pa.Table) -> list[str]:
    records = results.select(["record_id"]).append_column(
        "reason", pa.nulls(len(results), "string")
    )
    failures = pa.table({"record_id": pa.array([], pa.string())})
    rows: list[str] = picked(escalation, records, results, failures)["record_id"].to_pylist()
    return rows


@given(st.lists(st.integers(0, 50), max_size=8), st.randoms())
def test_the_sample_does_not_depend_on_how_records_are_cut(sizes: list[int], rng: object) -> None:
    ids = iter(range(10_000))
    tables = [pa.table({"record_id": [f"r{next(ids)}" for _ in range(n)]}) for n in sizes if n]
    sample = Sample("seed", 20)
    partials = [SAMPLE.chunk(table, sample) for table in tables]
    whole = SAMPLE.combine(partials)
    rng.shuffle(partials)  # type: ignore[attr-defined]
    halves = [SAMPLE.combine(partials[:3]), SAMPLE.combine(partials[3:])]
    assert SAMPLE.combine(halves) == whole
    assert len(whole["lots"]) == min(20, sum(sizes))


@pytest.mark.parametrize(
    ("escalate", "why"),
    [
        ({"target": 0.95, "labels": 58}, "58 cannot show target 0.95 .* 0.05; allowed: 59 or more"),
        ({"target": 0.95, "fraction": 0.1}, "give either fraction or below or target"),
        ({"fraction": 0.1, "labels": 100}, "delta and labels go with target only"),
        ({"target": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_promised_is_refused(escalate: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Escalate(agent="large", **escalate)  # type: ignore[arg-type]
