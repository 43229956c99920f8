"""Which records are escalated: within the budget, the same ones on every worker."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.escalation import (
    CONFIDENCES,
    Escalation,
    below,
    check_method,
    choose,
    picked,
)
from mas_batch.aggregate.method import MergeSpec
from mas_batch.errors import JobError

confidences = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=200)


def tables(values: Sequence[float | None]) -> tuple[pa.Table, pa.Table]:
    """Results and failures of records r0, r1, …; None: nobody answered."""
    answered = [(f"r{i}", value) for i, value in enumerate(values) if value is not None]
    results = pa.table(
        {
            "record_id": pa.array([record for record, _ in answered], pa.string()),
            "confidence": pa.array([value for _, value in answered], pa.float64()),
        }
    )
    failed = [f"r{i}" for i, value in enumerate(values) if value is None]
    return results, pa.table({"record_id": pa.array(failed, pa.string())})


def picks(escalation: Escalation, values: Sequence[float | None]) -> list[str]:
    records = pa.table(
        {
            "record_id": [f"r{i}" for i in range(len(values))],
            "reason": pa.nulls(len(values), pa.string()),
        }
    )
    rows: list[str] = picked(escalation, records, *tables(values))["record_id"].to_pylist()
    return rows


@given(confidences, st.floats(0.01, 1))
def test_the_least_confident_are_picked_and_none_above_one_that_is_not(
    values: list[float | None], fraction: float
) -> None:
    escalation = choose(CONFIDENCES.chunk(*tables(values)), "expert", fraction)
    chosen = set(picks(escalation, values))
    confident = {f"r{i}": value for i, value in enumerate(values) if value is not None}
    assert {f"r{i}" for i, value in enumerate(values) if value is None} <= chosen
    highest = max((confident[r] for r in chosen & confident.keys()), default=0.0)
    lowest_left = min((v for r, v in confident.items() if r not in chosen), default=1.0)
    assert highest <= lowest_left + 1e-3, "they are told apart to a thousandth"


def test_the_budget_is_kept_among_equals_by_lot() -> None:
    values: list[float | None] = [2 / 3] * 4000 + [1.0] * 6000
    counts = CONFIDENCES.chunk(*tables(values))
    escalation = choose(counts, "expert", 0.1)
    chosen = picks(escalation, values)
    assert escalation.expected(counts) == 1000
    assert 900 < len(chosen) < 1100
    assert chosen == picks(escalation, values)
    assert {int(record[1:]) < 4000 for record in chosen} == {True}


def test_everybody_is_picked_where_the_budget_is_all() -> None:
    values: list[float | None] = [0.2, None, 1.0, 0.7]
    assert len(picks(choose(CONFIDENCES.chunk(*tables(values)), "e", 1.0), values)) == 4


def test_below_is_strict() -> None:
    assert picks(below("expert", 0.29), [0.28, 0.29, 0.3, None]) == ["r0", "r3"]


@given(st.lists(confidences, max_size=8), st.randoms())
def test_counts_do_not_depend_on_order_or_grouping(
    partitions: list[list[float | None]], rng: object
) -> None:
    partials = [CONFIDENCES.chunk(*tables(values)) for values in partitions]
    whole = CONFIDENCES.combine(partials)
    rng.shuffle(partials)  # type: ignore[attr-defined]
    halves = [CONFIDENCES.combine(partials[:3]), CONFIDENCES.combine(partials[3:])]
    assert CONFIDENCES.combine(halves) == whole
    assert whole["records"] == sum(map(len, partitions))


@pytest.mark.parametrize("method", ["mean", "best"])
def test_a_method_whose_confidence_says_nothing_is_refused(method: str) -> None:
    with pytest.raises(JobError, match=r"routing\.escalate.*allowed: vote"):
        check_method(MergeSpec(method, None, {}, None, 0.0, "value", None))
