"""The pure parts of a pool: batches of what waits, whom to ask, how long things take."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.errors import Reason, RecordError
from mas_batch.records import ANSWERS, RECORD_FIELDS, Answer, Record
from mas_batch.serving.backlog import MicroBatcher
from mas_batch.serving.measure import RECENT, Meter
from mas_batch.serving.question import Quorum
from mas_batch.serving.reply import make_record, merged_reply, rows_of


class Batching(RuleBasedStateMachine):
    """Items come, are taken and withdrawn at any times; a list says what is right."""

    def __init__(self) -> None:
        super().__init__()
        self.max_batch, self.max_wait_s = 3, 2.0
        self.batcher: MicroBatcher[int] = MicroBatcher(self.max_batch, self.max_wait_s)
        self.now = 0.0
        self.next = 0
        self.waiting: list[tuple[int, float]] = []
        self.taken: list[int] = []
        self.withdrawn: set[int] = set()

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def comes(self) -> None:
        self.batcher.add(self.next, self.now)
        self.waiting.append((self.next, self.now))
        self.next += 1

    @precondition(lambda self: self.next)
    @rule(data=st.data())
    def is_withdrawn(self, data: st.DataObject) -> None:
        item = data.draw(st.integers(0, self.next - 1))
        known = item in [each for each, _ in self.waiting]
        assert self.batcher.discard(item) is known
        self.waiting = [(each, since) for each, since in self.waiting if each != item]
        if known:
            self.withdrawn.add(item)

    @rule()
    def is_taken(self) -> None:
        expected = [item for item, _ in self.waiting[: self.max_batch]]
        is_full = len(expected) == self.max_batch
        if not (is_full or (expected and self.now >= self.waiting[0][1] + self.max_wait_s)):
            expected = []
        assert self.batcher.take(self.now) == expected
        self.waiting = self.waiting[len(expected) :]
        self.taken += expected

    @rule()
    def due_is_when_something_can_be_taken(self) -> None:
        if self.now < self.batcher.due < math.inf:
            assert self.batcher.take(math.nextafter(self.batcher.due, 0.0)) == []
            self.now = self.batcher.due
            self.is_taken()
            assert self.taken

    @invariant()
    def nothing_is_lost_or_doubled_and_the_order_is_kept(self) -> None:
        assert len(self.batcher) == len(self.waiting)
        assert self.taken == sorted(set(self.taken))
        left = [item for item, _ in self.waiting]
        assert sorted([*self.taken, *left, *self.withdrawn]) == list(range(self.next))


TestBatching = Batching.TestCase


def test_a_free_host_takes_at_once_what_waits() -> None:
    batcher: MicroBatcher[str] = MicroBatcher(max_batch=4)
    batcher.add("a", 1.0)
    assert batcher.take(1.0) == ["a"]
    assert batcher.take(9.0) == []


def test_an_item_cannot_wait_twice() -> None:
    batcher: MicroBatcher[str] = MicroBatcher(max_batch=4)
    batcher.add("a", 1.0)
    with pytest.raises(ValueError, match="waits already"):
        batcher.add("a", 2.0)


SAMPLES = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), min_size=1)


@given(SAMPLES, st.data())
def test_a_quorum_asks_as_few_as_needed_and_always_ends(
    samples: Mapping[str, int], data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, sum(samples.values())))
    race = data.draw(st.booleans())
    quorum = Quorum(samples, wanted, race)
    num_wasted = 0
    while not quorum.is_over:
        while quorum.wants_more():
            expected = quorum.num_answers + sum(samples[agent] for agent in quorum.open)
            assert race or expected < wanted, "one more than needed"
            quorum.ask(data.draw(st.sampled_from(quorum.unasked)))
        assert quorum.open, "nobody is asked, and it is not over"
        agent = data.draw(st.sampled_from(quorum.open))
        num_answers = data.draw(st.integers(0, samples[agent]))
        num_wasted += samples[agent] - num_answers
        quorum.settle(agent, num_answers)
    assert quorum.is_complete is (quorum.num_answers >= wanted)
    if not quorum.is_complete:
        assert quorum.settled.keys() == samples.keys(), "somebody could still have been asked"
    if not race:
        asked = {*quorum.settled, *quorum.open}
        smallest = min(samples[agent] for agent in asked)
        assert sum(samples[a] for a in asked) - num_wasted < wanted + max(samples.values())
        assert smallest > 0


def test_a_race_asks_everybody_and_one_answer_ends_it() -> None:
    quorum = Quorum({"a": 1, "b": 1, "c": 1}, wanted=1, race=True)
    while quorum.wants_more():
        quorum.ask(quorum.unasked[0])
    assert quorum.open == ("a", "b", "c")
    quorum.settle("a", 0)
    assert not quorum.is_over
    quorum.settle("c", 1)
    assert quorum.is_over
    assert quorum.open == ("b",)


def test_somebody_else_is_asked_for_one_who_fails_or_is_stalled() -> None:
    quorum = Quorum({"a": 1, "b": 1, "c": 1}, wanted=1)
    quorum.ask("a")
    assert not quorum.wants_more()
    assert quorum.wants_more(stalled=["a"])
    quorum.ask("b")
    assert not quorum.wants_more(stalled=["a"])
    quorum.settle("b", 0)
    assert quorum.wants_more(stalled=["a"])
    assert not quorum.wants_more()


def test_only_who_is_asked_can_answer_and_only_once() -> None:
    quorum = Quorum({"a": 1}, wanted=1)
    with pytest.raises(ValueError, match="'a' is not open"):
        quorum.settle("a", 1)
    quorum.ask("a")
    with pytest.raises(ValueError, match="'a' cannot be asked"):
        quorum.ask("a")


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=3 * RECENT))
def test_a_meter_forgets_nothing_in_its_summary(seconds: list[float]) -> None:
    meter = Meter()
    for each in seconds:
        meter.note(each)
    summary = meter.summary()
    assert summary["count"] == len(seconds)
    exact = np.quantile(seconds, 0.95, method="inverted_cdf")
    assert summary["p95_s"] == pytest.approx(exact, rel=0.011)


def test_what_is_late_follows_the_recent_seconds() -> None:
    meter = Meter()
    for _ in range(19):
        meter.note(1.0)
    assert meter.late_s is None, "too few are known"
    meter.note(1.0)
    assert meter.late_s == pytest.approx(1.0)
    for _ in range(RECENT):
        meter.note(3.0)
    assert meter.late_s == pytest.approx(3.0)


def spec_of(method: str, kind: str = "text") -> MergeSpec:
    accuracies = {"a": 0.9, "b": 0.7, "c": 0.6}
    return MergeSpec(method, "chrf", accuracies, None, 0.55, kind, None, agents=("a", "b", "c"))


WORDS = st.sampled_from(["yes", "Yes.", "no", "a longer answer", "another long answer"])
ANSWER = st.tuples(st.sampled_from("abc"), st.integers(0, 1), WORDS, st.floats(-9, 9))


@given(
    st.lists(ANSWER, min_size=1, max_size=6, unique_by=lambda a: a[:2]),
    st.sampled_from(["vote", "weighted", "mbr", "best", "rover", "mean"]),
)
def test_a_text_is_merged_as_a_record_of_a_run(
    given_answers: list[tuple[str, int, str, float]], method: str
) -> None:
    record = Record("r", "the text")
    spec = spec_of(method, "value" if method == "mean" else "text")
    answers = [
        Answer("r", agent, f"family {agent}", sample, text, value=value, completion_tokens=2)
        for agent, sample, text, value in given_answers
    ]
    table = pa.Table.from_pylist(rows_of(answers), schema=ANSWERS)
    records = pa.Table.from_pylist(
        [{"record_id": "r", "text": "the text"}], schema=pa.schema(RECORD_FIELDS)
    )
    (row,) = merge_answers(records, table, spec)[0].to_pylist()
    reply = merged_reply(record, answers, [], ["a"], spec)
    for name in ("answer", "value", "method", "confidence", "confidence_kind", "margin", "tie"):
        assert getattr(reply, name) == row[name], name
    assert reply.abstain == row["abstain"]
    backed = [(each.answer, each.weight, list(each.agents)) for each in reply.support]
    assert backed == [(s["answer"], s["weight"], s["agents"]) for s in row["support"]]


def test_what_no_corpus_may_hold_no_pool_is_asked() -> None:
    for text, reason in [
        ("", Reason.EMPTY),
        (" \n", Reason.WHITESPACE),
        ("a\0", Reason.NUL_CHARACTER),
    ]:
        with pytest.raises(RecordError) as caught:
            make_record(text, None)
        assert caught.value.reason == reason
    with pytest.raises(RecordError, match="not a string"):
        make_record(7, None)


def test_equal_texts_are_one_record_and_others_are_not() -> None:
    same = make_record("a", "b"), make_record("a", "b")
    assert same[0] == same[1]
    ids = {
        make_record(*each).record_id for each in [("a", "b"), ("a", None), ("ab", None), ("b", "a")]
    }
    assert len(ids) == 4
