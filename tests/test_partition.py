"""Partitions: cut greedily under both budgets, lazily, nothing lost."""

import math
from collections.abc import Iterator
from itertools import count, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.errors import Reason
from mas_batch.partition import Partition, estimate_tokens, partition
from mas_batch.records import Record

RECORDS = st.lists(
    st.builds(
        lambda text, context: Record("r", text, context, reason=None if text else Reason.EMPTY),
        st.none() | st.text(min_size=1, max_size=60),
        st.none() | st.text(max_size=20),
    ),
    max_size=40,
)
BUDGETS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "max_records": st.integers(1, 8),
        "tokens_per_record": st.integers(0, 12),
    }
)


def cost(record: Record, tokens_per_record: int) -> int:
    if record.text is None:
        return 0
    parts = (record.text, record.context or "")
    return sum(math.ceil(len(part.encode()) / 4) for part in parts) + tokens_per_record


@given(RECORDS, BUDGETS)
def test_partitions_are_the_corpus_in_order(records: list[Record], budgets: dict[str, int]) -> None:
    cut = list(partition(records, **budgets))
    assert [record for part in cut for record in part.records] == records
    assert [part.index for part in cut] == list(range(len(cut)))
    assert [part.first_record for part in cut] == [
        sum(len(earlier.records) for earlier in cut[:i]) for i in range(len(cut))
    ]
    assert all(part.records for part in cut)


@given(RECORDS, BUDGETS)
def test_budgets_hold_and_no_cut_is_early(records: list[Record], budgets: dict[str, int]) -> None:
    max_tokens, max_records = budgets["max_tokens"], budgets["max_records"]
    extra = budgets["tokens_per_record"]
    cut = list(partition(records, **budgets))
    for part in cut:
        tokens = sum(cost(record, extra) for record in part.records)
        assert part.estimated_tokens == tokens
        assert len(part.records) <= max_records
        assert tokens <= max_tokens or len(part.records) == 1
    for part, following in pairwise(cut):
        full = len(part.records) == max_records
        grown = part.estimated_tokens + cost(following.records[0], extra)
        assert full or grown > max_tokens


@given(RECORDS, RECORDS, BUDGETS)
def test_a_growing_corpus_keeps_its_partitions(
    records: list[Record], more: list[Record], budgets: dict[str, int]
) -> None:
    before = list(partition(records, **budgets))
    after = list(partition(records + more, **budgets))
    assert after[: max(0, len(before) - 1)] == before[:-1]


def test_a_record_over_the_budget_stands_alone() -> None:
    small, large, bad = Record("a", "xxxx"), Record("b", "x" * 400), Record("c", None)
    cut = list(
        partition(
            [small, bad, large, bad, small], max_tokens=10, max_records=9, tokens_per_record=1
        )
    )
    assert [part.records for part in cut] == [(small, bad), (large,), (bad, small)]
    assert [part.estimated_tokens for part in cut] == [2, 101, 2]


def test_an_endless_corpus_is_cut_as_it_is_read() -> None:
    taken = []

    def corpus() -> Iterator[Record]:
        for i in count():
            taken.append(i)
            yield Record(str(i), "text")

    parts = islice(partition(corpus(), max_tokens=100, max_records=3, tokens_per_record=0), 2)
    assert [part.first_record for part in parts] == [0, 3]
    assert taken == list(range(7))


def test_no_records_no_partitions() -> None:
    assert list(partition([], max_tokens=1, max_records=1, tokens_per_record=0)) == []


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"max_records": 0}, {"tokens_per_record": -1}]
)
def test_wrong_budgets_are_refused_before_reading(wrong: dict[str, int]) -> None:
    budgets = {"max_tokens": 1, "max_records": 1, "tokens_per_record": 0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        partition([], **budgets)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("abcd", 1), ("abcde", 2), ("é" * 4, 2), ("日本", 2), ("\ud800", 1)],
)
def test_tokens_are_estimated_from_bytes(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


def test_partition_is_a_frozen_value() -> None:
    with pytest.raises(AttributeError):
        Partition(0, 0, (), 0).index = 1  # type: ignore[misc]
