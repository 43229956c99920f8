from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.reductions import RUN_STATISTICS
from mas_batch.errors import Reason
from mas_batch.records import ANSWERS, RECORD_FIELDS

VOTE = MergeSpec("vote", None, {}, "log-odds", 0.5, "text", None)


def row(record: str, agent: str, text: str | None, **fields: Any) -> dict[str, Any]:
    common = {
        "record_id": record,
        "agent_id": agent,
        "family_id": agent,
        "sample_id": 0,
        "attempt": 1,
        "text": text,
        "finish_reason": "stop",
        "num_parts": 1,
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "t_compute_s": 0.25,
        "t_transfer_s": 0.0000015,
        "t_processing_s": 0.1,
        "reason": None if text is not None else Reason.ENGINE_ERROR,
    }
    return {**common, **fields}


def partial(rows: list[dict[str, Any]], how: MergeSpec = VOTE) -> dict[str, Any]:
    ids = sorted({r["record_id"] for r in rows})
    staged = [{"record_id": i, "text": i} for i in ids]
    answers = pa.Table.from_pylist(rows, schema=ANSWERS)
    merged = merge_answers(pa.Table.from_pylist(staged, pa.schema(RECORD_FIELDS)), answers, how)
    return RUN_STATISTICS.chunk(*merged, answers, how.answer_kind)


FIRST = [
    row("r1", "a", "yes", finish_reason="length", num_parts=2),
    row("r1", "b", "Yes.", finish_reason="length", num_parts=2),
    row("r1", "b", "Yes.", sample_id=1, finish_reason="length", num_parts=2),
    row("r1", "c", "no"),
    row("r2", "a", "x"),
    row("r2", "b", None),
    row("r2", "c", "y"),
]
SECOND = [
    row("r3", "a", None),
    row("r4", "a", "p"),
    row("r4", "b", "q"),
    row("r4", "c", "r"),
]


def test_counts_of_a_partition() -> None:
    counts = partial(FIRST)
    agents = counts.pop("agents")
    histogram = counts.pop("confidence_histogram")
    assert counts == {
        "records": 2,
        "results": 2,
        "failures": 0,
        "failures_by_reason": {},
        "ties": 1,
        "abstained": 0,
        "cut": 1,
        "split": 1,
        "labels": {},
    }
    assert (histogram[15], histogram[10], sum(histogram)) == (1, 1, 2)  # 3 of 4, and 1 of 2
    assert agents["a"] == {
        "answers": 2,
        "failed_answers": 0,
        "reused": 0,
        "agreements": 2,
        "wins": 1,  # "yes" agrees with "Yes.", which was published
        "prompt_tokens": 20,
        "completion_tokens": 6,
        "compute_us": 500_000,
        "transfer_us": 4,  # each row is rounded by itself: 1.5 µs to even
        "processing_us": 200_000,
    }
    assert {k: agents["b"][k] for k in ("answers", "failed_answers", "agreements", "wins")} == {
        "answers": 2,
        "failed_answers": 1,
        "agreements": 2,
        "wins": 1,  # of one record, with both samples
    }
    assert agents["c"]["agreements"] == 0


def test_failures_and_abstentions_are_counted() -> None:
    counts = partial(SECOND)
    assert counts["failures_by_reason"] == {"engine_error": 1}
    assert (counts["records"], counts["failures"], counts["abstained"]) == (2, 1, 1)


def test_repeated_rows_count_once() -> None:
    assert partial([*FIRST, *FIRST[::-1], row("r1", "a", "late", attempt=2)]) == partial(FIRST)


def test_answers_of_an_earlier_run_count_as_said_and_not_as_spent() -> None:
    reused = [{**each, "reused_from": "yesterday"} for each in FIRST]
    old, new = (partial(rows)["agents"]["a"] for rows in (reused, FIRST))
    said = ("answers", "failed_answers", "agreements", "wins")
    assert [old[key] for key in said] == [new[key] for key in said]
    assert (old["reused"], old["prompt_tokens"], old["compute_us"]) == (new["answers"], 0, 0)
    mixed = RUN_STATISTICS.finalize(RUN_STATISTICS.combine([partial(reused), partial(SECOND)]))
    only_new = RUN_STATISTICS.finalize(partial(SECOND))
    for mean in ("mean_compute_s", "mean_prompt_tokens"):
        assert mixed["agents"]["a"][mean] == only_new["agents"]["a"][mean]


def test_standard_errors_are_not_in_the_histogram() -> None:
    mean = MergeSpec("mean", None, {}, "log-odds", 0.0, "value", None)
    rows = [
        row("r", "a", "1", value=1.0),
        row("r", "b", "1.5", value=1.5),
        row("r", "c", "1.25", value=1.25),
    ]
    counts = partial(rows, mean)
    assert sum(counts["confidence_histogram"]) == 0
    assert [counts["agents"][a]["wins"] for a in "abc"] == [0, 0, 1]


def test_figures_for_people() -> None:
    figures = RUN_STATISTICS.finalize(RUN_STATISTICS.combine([partial(FIRST), partial(SECOND)]))
    assert (figures["records"], figures["results"], figures["failures"]) == (4, 3, 1)
    assert next(iter(figures)) == "records"
    a = figures["agents"]["a"]
    assert (a["answers"], a["failed_answers"], a["failed_fraction"]) == (3, 1, 0.25)
    assert a["agreement"] == 1.0
    assert (a["compute_s"], a["mean_compute_s"]) == (1.0, 0.25)
    assert (a["mean_prompt_tokens"], a["mean_completion_tokens"]) == (10.0, 3.0)
    assert all(not isinstance(fact, dict | list) for fact in a.values())  # a row of a table


def test_an_agent_that_only_failed_has_no_agreement() -> None:
    figures = RUN_STATISTICS.finalize(partial([row("r", "a", None)]))
    assert figures["agents"]["a"]["agreement"] is None
    assert figures["agents"]["a"]["failed_fraction"] == 1.0


def test_nothing_is_an_empty_corpus() -> None:
    nothing = RUN_STATISTICS.combine([])
    figures = RUN_STATISTICS.finalize(nothing)
    assert (figures["records"], figures["agents"]) == (0, {})
    assert RUN_STATISTICS.combine([nothing, partial(FIRST)]) == partial(FIRST)


def as_bytes(counts: dict[str, Any]) -> bytes:
    return json.dumps(counts).encode()


TEXT = st.sampled_from(["yes", "Yes.", "no", None])
PARTITIONS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("abc"), TEXT, st.floats(0, 9)),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=4,
)


@given(PARTITIONS)
def test_combine_is_associative_and_commutative_to_the_byte(
    drawn: list[list[tuple[Any, ...]]],
) -> None:
    partials = [
        partial([row(f"r{p}-{r}", agent, text, t_compute_s=s) for r, agent, text, s in rows])
        for p, rows in enumerate(drawn)
    ]
    combine = RUN_STATISTICS.combine
    whole = as_bytes(combine(partials))
    for order in itertools.permutations(partials):
        assert as_bytes(combine(order)) == whole
        for cut in range(len(order) + 1):
            assert as_bytes(combine([combine(order[:cut]), combine(order[cut:])])) == whole


def test_partials_survive_json_and_the_reduction_pickles() -> None:
    counts = partial([*FIRST, *SECOND])
    assert json.loads(json.dumps(counts)) == counts
    copy = pickle.loads(pickle.dumps(RUN_STATISTICS))
    assert copy.combine([counts]) == counts


def test_combine_does_not_change_its_partials() -> None:
    one, other = partial(FIRST), partial(SECOND)
    before = as_bytes(one)
    RUN_STATISTICS.combine([one, other])
    assert as_bytes(one) == before


@pytest.mark.parametrize(
    ("confidence", "place"),
    [(0.0, 0), (0.049, 0), (0.05, 1), (0.5, 10), (0.6, 12), (0.999, 19), (1.0, 19)],
)
def test_histogram_bins_are_half_open_but_the_last(confidence: float, place: int) -> None:
    rows = [row("r", "a", "x"), row("r", "b", "x")]
    answers = pa.Table.from_pylist(rows, schema=ANSWERS)
    staged = pa.Table.from_pylist([{"record_id": "r"}], pa.schema(RECORD_FIELDS))
    results, failures = merge_answers(staged, answers, VOTE)
    at = results.column_names.index("confidence")
    results = results.set_column(at, results.schema.field(at), pa.array([confidence]))
    histogram = RUN_STATISTICS.chunk(results, failures, answers, "text")["confidence_histogram"]
    assert [i for i, n in enumerate(histogram) if n] == [place]
