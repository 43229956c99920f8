"""What a report adds up is the same in any order.

Apart from the tests with a cluster, whose threads upset Hypothesis.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.records import SUPPORT
from mas_batch.report.agreeing_pairs import PAIRS
from mas_batch.report.timing import mean_overlap, stretches

AGENTS = ["a", "b", "b#1", "c"]
SUPPORTS = st.lists(
    st.dictionaries(st.sampled_from(AGENTS), st.integers(0, 2)).map(
        lambda answers: [
            {"answer": str(v), "weight": 1.0, "agents": [a for a in answers if answers[a] == v]}
            for v in sorted(set(answers.values()))
        ]
    ),
    max_size=8,
)


@given(SUPPORTS, st.integers(0, 8))
def test_agreement_adds_up_in_any_partitioning(records: list[Any], cut: int) -> None:
    def partial(rows: list[Any]) -> Any:
        return PAIRS.chunk(pa.table({"support": pa.array(rows, SUPPORT)}))

    whole = partial(records)
    assert PAIRS.combine([partial(records[cut:]), partial(records[:cut])]) == whole
    pairs: Counter[tuple[str, str, str]] = Counter()
    for support in records:
        said = [(agent, c["answer"]) for c in support for agent in c["agents"]]
        for (first, x), (second, y) in combinations(said, 2):
            left, right = sorted((first.split("#")[0], second.split("#")[0]))
            pairs[left, right, "pairs"] += 1
            pairs[left, right, "equal"] += x == y
    counted = {
        (a, b, k): n for a, row in whole.items() for b, c in row.items() for k, n in c.items()
    }
    assert counted == {key: n for key, n in pairs.items() if n or key[2] == "equal"}


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted), max_size=6),
    st.integers(1, 9),
)
def test_activity_is_the_mean_number_of_open_intervals(spans: list[list[float]], num: int) -> None:
    starts, stops = (np.array([span[i] for span in spans], float) for i in (0, 1))
    found = mean_overlap(starts, stops, 10.0, num)
    edges = np.linspace(0, 10, num + 1)
    for mean, low, high in zip(found, edges[:-1], edges[1:], strict=True):
        open_s = sum(max(0.0, min(stop, high) - max(start, low)) for start, stop in spans)
        assert mean == pytest.approx(open_s / (high - low), abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), min_size=1, max_size=8)
)
def test_a_host_is_busy_once_however_much_it_works_on(spans: list[list[int]]) -> None:
    starts, stops = stretches(*np.array(spans, float).T)
    assert all(stop < start for stop, start in zip(stops[:-1], starts[1:], strict=True))
    open_at = {at for start, stop in spans for at in range(start, stop)}
    assert (stops - starts).sum() == len(open_at)


# The command
