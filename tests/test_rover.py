from __future__ import annotations

import math
import random
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.normalise import nfc_bytes
from mas_batch.aggregate.rover import MAX_WORDS, rover

WORDS = st.lists(st.sampled_from(["a", "b", "c", "bb", "é"]), min_size=1, max_size=6).map(" ".join)


def ballots(*texts: str) -> list[Ballot]:
    return [Ballot(f"a{i}", "f", 0, text, text) for i, text in enumerate(texts)]


def test_crowd_kits_published_example() -> None:
    verdict = rover(ballots("a b c d", "b z d e", "b c d e f"))
    assert verdict.answer == "b c d e"
    # slots: a|∅∅, bbb, c|z|c, ddd, ∅ee, ∅∅f
    assert verdict.confidence == pytest.approx((2 + 3 + 2 + 3 + 2 + 2) / 18)
    assert verdict.margin == pytest.approx((1 + 3 + 1 + 3 + 1 + 1) / 18)
    assert verdict.confidence_kind == "word_agreement"
    assert not verdict.tie
    agreement = {c.answer: c.weight for c in verdict.support}
    assert agreement == pytest.approx({"a b c d": 4 / 6, "b z d e": 5 / 6, "b c d e f": 5 / 6})
    assert verdict.chosen.shown == "b c d e f"  # of two equally close, the smaller bytes


@given(st.lists(WORDS, min_size=1, max_size=5, unique=True))
@example(["a b c d", "b z d e", "b c d e f"])
@example(["a", "b a", "a b", "b b a", "c a"])
def test_it_is_crowd_kits(texts: list[str]) -> None:
    # Before a text's first word crowd-kit charges for slots that some text skips, after it not;
    # we never do. A first word that all share makes the difference vanish.
    texts = [f"^ {text}" for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aggregation = pytest.importorskip("crowdkit.aggregation")
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame({"task": 0, "text": sorted(texts, key=nfc_bytes)})
        theirs = aggregation.ROVER(str.split, " ".join).fit_predict(table.assign(worker=0))
    assert rover(ballots(*texts)).answer == theirs[0]


def test_a_slot_that_a_text_skips_costs_nothing_at_the_start_too() -> None:
    # a|-|-, c|c|c, -|-|b, -|-|b; charged for the first slot, the third text would go a|-|c.
    assert rover(ballots("a c", "c", "c b b")).answer == "c"


def test_weights_decide_and_equal_texts_add_theirs_up() -> None:
    texts = ballots("a good day", "a bad day", "a bad day")
    assert rover(texts).answer == "a bad day"
    assert rover(texts, [3.0, 1.0, 1.0]).answer == "a good day"
    assert rover(texts, [2.0, 1.0, 1.0]).tie


def test_line_breaks_become_blanks() -> None:
    verdict = rover(ballots("one\ntwo", "one two", "one  two three"))
    assert verdict.answer == "one two"


def test_texts_without_words() -> None:
    verdict = rover(ballots(" ", "\n"))
    assert (verdict.confidence, verdict.margin, verdict.tie) == (0.0, 0.0, False)
    assert verdict.answer.strip() == ""
    assert verdict.entropy == pytest.approx(math.log(2))


def test_where_most_say_nothing_the_closest_is_published() -> None:
    verdict = rover(ballots(" ", "word"), [2.0, 1.0])
    assert verdict.answer == " "
    assert verdict.chosen.shown == " "


@given(st.lists(WORDS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(texts: list[str], shuffle: random.Random) -> None:
    votes = ballots(*texts)
    weights = {b.agent_id: 0.3 + 0.1 * (i % 3) for i, b in enumerate(votes)}
    shuffled = shuffle.sample(votes, len(votes))
    one = rover(votes, [weights[b.agent_id] for b in votes])
    assert one == rover(shuffled, [weights[b.agent_id] for b in shuffled])
    assert set(one.answer.split()) <= {word for text in texts for word in text.split()}
    assert one.answer
    assert 0 < (one.confidence or 0) <= 1


@given(WORDS, st.integers(1, 4))
def test_what_all_say_is_published_in_full_confidence(text: str, number: int) -> None:
    verdict = rover(ballots(*[text] * number))
    assert (verdict.answer, verdict.confidence, verdict.margin) == (text, 1.0, 1.0)


def test_texts_that_are_too_long_to_align_are_voted_on_whole() -> None:
    long = "a b " * MAX_WORDS
    verdict = rover(ballots(long, "a b c", long))
    assert verdict.answer == long
    assert verdict.confidence == pytest.approx(2 / 3)
    assert verdict.margin == pytest.approx(1 / 3)
    assert [c.answer for c in verdict.support] == [long, "a b c"]
    longest = " ".join(["a"] * MAX_WORDS)
    assert rover(ballots(longest, longest, "b")).support[0].weight == 1, "these are still aligned"
