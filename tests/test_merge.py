from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.errors import JobError, Reason, RunError
from mas_batch.records import ANSWERS, FAILURES, RECORD_FIELDS, RESULT_FIELDS

ACCURACIES = {"a": 0.9, "b": 0.6, "c": 0.55}


def spec(method: str = "vote", kind: str = "text", **changes: Any) -> MergeSpec:
    settings = {
        "utility": "chrf" if method == "mbr" else None,
        "accuracies": ACCURACIES if method == "weighted" else {},
        "weights": "log-odds",
        "abstain_below": 0.0,
        "num_labels": None,
    }
    return MergeSpec(method=method, answer_kind=kind, **{**settings, **changes})


def records(*ids: str, **columns: list[Any]) -> pa.Table:
    """Good records, but for the columns given."""
    staged: dict[str, Any] = {
        "record_id": list(ids),
        "text": [f"text of {i}" for i in ids],
        "context": [None] * len(ids),
        "reference": [None] * len(ids),
        "reason": [None] * len(ids),
        "message": [""] * len(ids),
    }
    leading = {f.name: pa.array(columns.pop(f.name, staged[f.name]), f.type) for f in RECORD_FIELDS}
    schema = pa.schema(
        [*RECORD_FIELDS, *(pa.field(k, pa.array(v).type) for k, v in columns.items())]
    )
    return pa.table([*leading.values(), *(pa.array(v) for v in columns.values())], schema=schema)


def answer(record: str, agent: str, text: str | None, **fields: Any) -> dict[str, Any]:
    row = {
        "record_id": record,
        "agent_id": agent,
        "family_id": f"family-{agent}",
        "sample_id": 0,
        "attempt": 1,
        "text": text,
        "finish_reason": "stop",
        "num_parts": 1,
    }
    return {**row, **fields}


def failed(record: str, agent: str, reason: Reason, **fields: Any) -> dict[str, Any]:
    message = f"{agent}: {reason}"
    return answer(
        record, agent, None, reason=reason, message=message, finish_reason="error", **fields
    )


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ANSWERS)


def merge(
    staged: pa.Table, answers: pa.Table, how: MergeSpec
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    results, failures = merge_answers(staged, answers, how)
    assert failures.schema == FAILURES
    return results.to_pylist(), failures.to_pylist()


def test_coverage_is_counted_where_a_text_was_read_in_parts() -> None:
    staged = records("whole", "parts", "wordless", text=["A cat sat.", "A cat sat.", "A cat sat."])
    answers = table(
        answer("whole", "a", "the cat"),
        answer("parts", "a", "The cat", num_parts=2),
        answer("wordless", "a", "!?", num_parts=2),
    )
    results, _ = merge(staged, answers, spec("vote", covers_text=True))
    assert [row["coverage"] for row in results] == [None, 0.5, None]
    results, _ = merge(staged, answers, spec("vote"))
    assert [row["coverage"] for row in results] == [None, None, None]


def parquet(tables: tuple[pa.Table, pa.Table]) -> list[bytes]:
    contents = []
    for each in tables:
        sink = pa.BufferOutputStream()
        pq.write_table(each, sink)
        contents.append(sink.getvalue().to_pybytes())
    return contents


def test_results_keep_text_reference_and_passthrough_in_record_order() -> None:
    staged = records(
        "r2",
        "r1",
        reference=["ref", None],
        context=["c", None],
        stars=[5, 4],
        source_answer=["x", "y"],
    )
    results, _ = merge_answers(
        staged, table(answer("r1", "a", "one"), answer("r2", "a", "two")), spec()
    )
    kept = ["record_id", "text", "reference", "stars", "source_answer"]
    assert results.column_names == [*kept, *(f.name for f in RESULT_FIELDS)]
    assert tuple(results.schema)[len(kept) :] == RESULT_FIELDS
    assert results.select(["record_id", "reference", "stars", "answer"]).to_pylist() == [
        {"record_id": "r2", "reference": "ref", "stars": 5, "answer": "two"},
        {"record_id": "r1", "reference": None, "stars": 4, "answer": "one"},
    ]


def test_support_names_who_backs_what_best_first() -> None:
    rows = [
        answer("r", "b", "Cat."),
        answer("r", "a", "cat", sample_id=2),
        answer("r", "a", "dog"),
        answer("r", "a", "cat", sample_id=1, finish_reason="length", num_parts=3),
    ]
    [result], _ = merge(records("r"), table(*rows), spec())
    assert result["support"] == [
        {"answer": "cat", "weight": 3.0, "agents": ["a#1", "a#2", "b"]},
        {"answer": "dog", "weight": 1.0, "agents": ["a"]},
    ]
    assert (result["num_answers"], result["num_distinct"]) == (4, 2)
    assert (result["finish_reason"], result["num_parts"]) == ("length", 3)


@pytest.mark.parametrize(
    ("method", "kind", "answer_", "value", "confidence_kind"),
    [
        ("vote", "label", "spam", None, "agreement"),
        ("weighted", "label", "spam", None, "posterior"),
        ("vote", "value", "3.0", 3.0, "agreement"),
        ("mean", "value", "4.5", 4.5, "standard_error"),
        ("mbr", "text", "It is spam: 3", None, "expected_utility"),
    ],
)
def test_each_kind_of_answer_is_compared_by_its_column(
    method: str, kind: str, answer_: str, value: float | None, confidence_kind: str
) -> None:
    rows = [
        answer("r", "a", "It is spam: 3", label="spam", value=3.0),
        answer("r", "b", "It is spam: 3", label="spam", value=3.0),
        answer("r", "c", "ham, 7.5", label="Spam", value=7.5),
    ]
    [result], _ = merge(records("r"), table(*rows), spec(method, kind))
    assert (result["answer"], result["value"], result["method"]) == (answer_, value, method)
    assert result["confidence_kind"] == confidence_kind


def test_negative_zero_is_zero() -> None:
    rows = [answer("r", "a", "0", value=-0.0), answer("r", "b", "0", value=0.0)]
    [result], _ = merge(records("r"), table(*rows), spec("vote", "value"))
    assert (result["answer"], result["num_distinct"]) == ("0.0", 1)


def test_mbr_compares_texts_as_they_are() -> None:
    rows = [answer("r", "a", "Yes."), answer("r", "b", "yes"), answer("r", "c", "yes")]
    [result], _ = merge(records("r"), table(*rows), spec("mbr"))
    assert [entry["answer"] for entry in result["support"]] == ["yes", "Yes."]


def test_linear_weights() -> None:
    rows = [answer("r", "a", "x"), answer("r", "b", "y"), answer("r", "c", "y")]
    [linear], _ = merge(records("r"), table(*rows), spec("weighted", weights="linear"))
    assert (linear["answer"], linear["confidence_kind"]) == ("y", "weight-share")
    assert linear["confidence"] == pytest.approx(1.15 / 2.05)
    [optimal], _ = merge(records("r"), table(*rows), spec("weighted"))
    assert optimal["answer"] == "x"  # the odds of .9 outweigh those of .6 and .55


def test_num_labels_sets_the_number_of_wrong_answers() -> None:
    rows = [answer("r", "b", "x", label="x")]
    [result], _ = merge(records("r"), table(*rows), spec("weighted", "label", num_labels=4))
    assert result["support"][0]["weight"] == pytest.approx(1.504077397)  # ln(3 · .6 / .4)


def test_retries_vote_once() -> None:
    rows = [
        answer("r", "a", "no", attempt=2),
        answer("r", "a", "yes"),
        answer("r", "a", "no", attempt=3),
        answer("r", "b", "maybe"),
        answer("r", "b", "Maybe"),
    ]
    [result], _ = merge(records("r"), table(*rows), spec())
    assert result["support"] == [
        {"answer": "Maybe", "weight": 1.0, "agents": ["b"]},
        {"answer": "yes", "weight": 1.0, "agents": ["a"]},
    ]


def test_missing_answers_are_not_a_class() -> None:
    rows = [
        answer("r", "a", "yes"),
        failed("r", "b", Reason.EMPTY_ANSWER),
        failed("r", "c", Reason.EMPTY_ANSWER),
    ]
    [result], failures = merge(records("r"), table(*rows), spec())
    assert (result["answer"], result["num_answers"]) == ("yes", 1)
    assert (result["confidence"], result["margin"]) == (None, None), "it agrees only with itself"
    assert failures == []


def test_abstains_below_the_threshold_but_never_for_a_mean() -> None:
    votes = [answer("r", a, t, value=v) for a, t, v in (("a", "x", 1.0), ("b", "y", 1.5))]
    staged = records("r")
    assert merge(staged, table(*votes), spec(abstain_below=0.51))[0][0]["abstain"]
    assert not merge(staged, table(*votes), spec(abstain_below=0.5))[0][0]["abstain"]
    [mean], _ = merge(staged, table(*votes), spec("mean", "value", abstain_below=0.9))
    assert (mean["confidence"], mean["abstain"]) == (0.25, False)


def test_an_unusable_record_fails_at_its_own_stage_whatever_was_answered() -> None:
    staged = records("r", text=[None], reason=["empty"], message=["corpus.csv row 7: empty"])
    results, failures = merge(staged, table(answer("r", "a", "x")), spec())
    assert results == []
    assert failures == [
        {
            "record_id": "r",
            "stage": "corpus",
            "reason": "empty",
            "message": "corpus.csv row 7: empty",
            "agent_id": None,
            "attempt": None,
            "worth_retrying": False,
        }
    ]


def test_a_record_without_an_answer_fails_with_the_most_telling_reason() -> None:
    rows = [
        failed("r", "a", Reason.AGENT_FAILED),
        failed("r", "c", Reason.UNPARSABLE_ANSWER, attempt=2),
        failed("r", "b", Reason.UNPARSABLE_ANSWER, attempt=3),
    ]
    results, [failure] = merge(records("r"), table(*rows), spec())
    assert results == []
    assert failure == {
        "record_id": "r",
        "stage": "parse",
        "reason": "unparsable_answer",
        "message": "b: unparsable_answer",
        "agent_id": "b",
        "attempt": 3,
        "worth_retrying": False,
    }


def test_a_record_that_nobody_answered_fails() -> None:
    _, [failure] = merge(records("r"), table(), spec())
    assert (failure["stage"], failure["reason"]) == ("answer", "agent_failed")


def test_no_records() -> None:
    results, failures = merge_answers(records(), table(), spec())
    assert (results.num_rows, failures.num_rows) == (0, 0)
    assert tuple(results.schema)[3:] == RESULT_FIELDS


@pytest.mark.parametrize(
    ("staged", "rows", "kind", "message"),
    [
        (records("r", "r"), [], "text", "record_id 'r' is there twice"),
        (records("r"), [answer("s", "a", "x")], "text", "'a' answered record 's', which is not in"),
        (records("r"), [answer("r", "a", "x")], "label", "record 'r', agent 'a': label is None"),
        (records("r"), [answer("r", "a", "x", value=float("nan"))], "value", "value is nan"),
        (
            records("r"),
            [answer("r", "a", None, reason="tired")],
            "text",
            "reason 'tired' is unknown",
        ),
    ],
)
def test_tables_that_contradict_their_contract(
    staged: pa.Table, rows: list[dict[str, Any]], kind: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        merge_answers(staged, table(*rows), spec("vote", kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "median"},
            "merge.method: 'median' is not allowed; allowed: vote, mean, we",
        ),
        ({"method": "mean", "kind": "text"}, "merge.method: 'mean' merges answers of kind value"),
        ({"method": "mbr", "kind": "value"}, "merge.method: 'mbr' merges answers of kind text"),
        ({"method": "mbr", "utility": "ter"}, "merge.utility: 'ter' .* allowed: chrf, .*rouge-l"),
        ({"method": "mbr", "utility": None}, "merge.utility: None is not allowed"),
        ({"weights": "square"}, "merge.weights: 'square' .* allowed: None, log-odds, linear"),
        ({"weights": "learned"}, "merge.weights: 'vote' does not learn .* merge.method mbr"),
        ({"kind": "probs"}, "answer_kind: 'probs' .* allowed: text, label, value"),
        ({"num_labels": 1}, "task.labels: at least two, got 1"),
    ],
)
def test_a_spec_that_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        spec(**changes)


def test_weighted_names_the_agent_without_an_accuracy() -> None:
    with pytest.raises(JobError, match=r"merge.accuracies: .*'z' has none; given: a, b, c"):
        merge_answers(records("r"), table(answer("r", "z", "x")), spec("weighted"))


TEXTS = st.sampled_from(["Yes", "yes.", "no", "é", "e\u0301", "a b c", "a c b", "", None])
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["r0", "r1", "r2", "r3"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 1),
        st.integers(1, 2),
        TEXTS,
        st.sampled_from([0.1, 0.2, 0.30000000000000004, -0.0, 0.0]),
    ),
    max_size=24,
)
SPECS = [
    spec(),
    spec("vote", "label"),
    spec("vote", "value"),
    spec("weighted"),
    spec("weighted", weights="linear"),
    spec("mean", "value"),
    spec("mean", "value", accuracies={"a": 0.7}),
    spec("mbr"),
    spec("mbr", utility="rouge-l", accuracies=ACCURACIES),
]


@given(ROWS, st.sampled_from(SPECS), st.integers(0, 4), st.randoms(use_true_random=False))
def test_row_order_repeats_and_partitioning_change_no_byte(
    drawn: list[tuple[Any, ...]], how: MergeSpec, cut: int, shuffle: random.Random
) -> None:
    rows = [
        answer(record, agent, text, sample_id=sample, attempt=attempt, label=text, value=value)
        if text is not None
        else failed(record, agent, Reason.EMPTY_ANSWER, sample_id=sample, attempt=attempt)
        for record, agent, sample, attempt, text, value in drawn
    ]
    staged = records("r0", "r1", "r2", "r3", stars=[1, 2, 3, 4])
    whole = merge_answers(staged, table(*rows), how)
    ids = [row["record_id"] for part in whole for row in part.to_pylist()]
    assert sorted(ids) == ["r0", "r1", "r2", "r3"]

    again = [*rows, *shuffle.choices(rows, k=5)] if rows else []
    shuffle.shuffle(again)
    assert parquet(merge_answers(staged, table(*again), how)) == parquet(whole)

    chunked = pa.concat_tables([table(row) for row in again]) if again else table()
    assert parquet(merge_answers(staged, chunked, how)) == parquet(whole)

    halves = []
    for part in (staged.slice(0, cut), staged.slice(cut)):
        own = set(part["record_id"].to_pylist())
        halves.append(merge_answers(part, table(*(r for r in again if r["record_id"] in own)), how))
    joined = [pa.concat_tables(parts).combine_chunks() for parts in zip(*halves, strict=True)]
    assert parquet((joined[0], joined[1])) == parquet(whole)
