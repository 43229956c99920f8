"""Sketches of seconds merge in any order; a task's and a batch's seconds add up. No cluster."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.agents.account import add
from mas_batch.engines.base import Completion
from mas_batch.engines.timing import share_time
from mas_batch.latency.sketch import (
    PARTS,
    RECORD_LATENCY,
    RELATIVE_ERROR,
    quantile,
    sketch,
    summary,
)
from mas_batch.latency.times import Stopwatch, TaskTimes
from mas_batch.records import ANSWERS, Answer

SECONDS = st.lists(st.floats(1.1e-6, 1e5), min_size=1, max_size=50)


@given(SECONDS, st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_off_by_one_percent_at_most(seconds: list[float], q: float) -> None:
    values = np.array(seconds)
    exact = np.quantile(values, q, method="inverted_cdf")
    assert quantile(sketch(values), q) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.001)


def answers_of(rows: list[tuple[str, float]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "record_id": str(i),
                "agent_id": agent,
                "family_id": "f",
                "sample_id": 0,
                "t_compute_s": seconds,
                "t_transfer_s": seconds / 2,
                "t_processing_s": None,
            }
            for i, (agent, seconds) in enumerate(rows)
        ],
        schema=ANSWERS,
    )


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 1e4)), min_size=1), st.data())
def test_sketches_are_the_same_however_the_answers_are_cut(
    rows: list[tuple[str, float]], data: st.DataObject
) -> None:
    whole = RECORD_LATENCY.chunk(answers_of(rows))
    shuffled = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(0, len(rows)))
    parts = [RECORD_LATENCY.chunk(answers_of(part)) for part in (shuffled[:cut], shuffled[cut:])]
    # A sum of rounded microseconds does not depend on the order either.
    assert RECORD_LATENCY.combine(parts) == RECORD_LATENCY.combine([whole])
    assert RECORD_LATENCY.combine([*parts, RECORD_LATENCY.combine([])]) == whole


def test_an_answers_parts_and_their_sum_are_summarised() -> None:
    found = RECORD_LATENCY.finalize(RECORD_LATENCY.chunk(answers_of([("a", 2.0), ("a", 4.0)])))
    assert tuple(found["a"]) == PARTS
    assert found["a"]["compute"]["mean_s"] == 3.0
    assert found["a"]["total"]["max_s"] == pytest.approx(6.0, rel=RELATIVE_ERROR)
    assert found["a"]["processing"]["p99_s"] == 0.0
    assert summary(sketch(np.array([0.0, 1e-9])))["p95_s"] == 0.0


def test_a_batchs_time_is_shared_without_a_rest() -> None:
    prompts, new = [3, 5], [[2, 4], [1, 1]]
    for prefill_s in (None, 1.5):
        shares = [share for row in share_time(6.0, prefill_s, prompts, new) for share in row]
        assert sum(compute_s for compute_s, _ in shares) == pytest.approx(6.0)
        if prefill_s is not None:
            assert sum(known or 0.0 for _, known in shares) == pytest.approx(prefill_s)
        else:
            assert {known for _, known in shares} == {None}


def test_one_unknown_prefill_makes_the_sum_unknown() -> None:
    blank = Answer("r", "a", "f", 0, text=None, t_prefill_s=0.0)
    known = Completion("x", (), None, 1, "stop", 1, compute_s=2.0, prefill_s=0.5)
    unknown = Completion("x", (), None, 1, "stop", 1, compute_s=2.0)
    assert add(blank, [known, known]).t_prefill_s == 1.0
    assert add(blank, [known, unknown]).t_prefill_s is None


def test_one_unknown_count_of_cached_tokens_makes_the_sum_unknown() -> None:
    blank = Answer("r", "a", "f", 0, text=None, cached_tokens=0)
    known, unknown = (
        Completion("x", (), None, 1, "stop", 9, cached_tokens=number) for number in (4, None)
    )
    assert add(blank, [known, known]).cached_tokens == 8
    assert add(blank, [known, unknown]).cached_tokens is None


def test_laps_follow_one_another() -> None:
    start = time.perf_counter()
    watch = Stopwatch()
    time.sleep(0.01)
    watch.lap("read")
    time.sleep(0.02)
    answer = Answer("r", "a", "f", 0, text="x", t_compute_s=0.01, t_prefill_s=0.006)
    rest_s = watch.model([answer], asked_s=0.016)
    watch.lap("write")
    times = watch.times(idle_s=1.0)
    assert times.own_s <= time.perf_counter() - start
    assert (times.compute_s, times.prefill_s, times.idle_s) == (0.01, 0.006, 1.0)
    assert times.decode_s == pytest.approx(0.004)
    assert times.wait_s == pytest.approx(0.006)
    assert times.wait_s + times.process_s == pytest.approx(rest_s)
    heard = times.heard_after(10.0)
    assert heard["compute_s"] + heard["transfer_s"] + heard["processing_s"] == pytest.approx(10.0)
    assert heard["queue_s"] == pytest.approx(10.0 - times.own_s)


def test_a_journals_seconds_are_not_this_tasks() -> None:
    watch = Stopwatch()
    answer = Answer("r", "a", "f", 0, text="x", t_compute_s=100.0, t_prefill_s=50.0)
    watch.model([answer], asked_s=0.0)
    times = watch.times()
    assert times.own_s < 50.0
    assert (times.compute_s, times.wait_s) == (0.0, 0.0)
    assert times.prefill_s is None


def test_news_that_comes_early_does_not_make_waiting_negative() -> None:
    heard = TaskTimes(compute_s=2.0).heard_after(1.5)  # two clocks, of two machines
    assert (heard["queue_s"], heard["wall_s"]) == (0.0, 2.0)
