"""Central sentences: scored as LexRank scores them, chosen under a budget, in the text's order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.extractive import NEAR_DUPLICATE, _centrality, _unit_vectors, select

WORDS = ["rain", "falls", "on", "the", "town", "river", "rose", "9", "été", "雨", "?"]
SENTENCES = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), max_size=12).map(
    lambda rows: [" ".join(words) for words in rows]
)
STORM = [
    "The storm closed the harbour and the railway.",
    "A dog slept.",
    "The storm closed the harbour.",
    "The railway and the harbour are closed by the storm until Monday.",
    "Bakers worked through the night.",
]


def centrality(sentences: Sequence[str]) -> list[float]:
    return _centrality(_unit_vectors(sentences))


def at_most_words(limit: int) -> Callable[[str], bool]:
    return lambda text: len(text.split()) <= limit


def cosines(sentences: list[str]) -> np.ndarray:
    """The matrix of tf-idf cosines written out, for words between spaces."""
    words = [[w for w in s.split() if w != "?"] for s in sentences]
    vocabulary = sorted({w for row in words for w in row})
    counts = np.array([[row.count(w) for w in vocabulary] for row in words], dtype=float)
    occurs_in = (counts > 0).sum(axis=0)
    weights = counts * np.log((1 + len(sentences)) / occurs_in)
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    unit = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0)
    return unit @ unit.T


def test_a_hand_checked_table():
    # idf: ln(4/2) for a and c, ln(4/1) = 2 ln 2 for b and d: vectors (1, 2, 0, 0), (1, 0, 1, 0)
    # and (0, 0, 1, 2) over a, b, c, d, of lengths √5, √2 and √5.
    side = 1 + 1 / math.sqrt(10)
    assert centrality(["a b", "a c", "c d"]) == pytest.approx(
        [side, 1 + 2 / math.sqrt(10), side], abs=1e-12
    )


@given(SENTENCES.filter(len))
def test_scores_are_row_sums_of_the_matrix_of_cosines(sentences):
    assert centrality(sentences) == pytest.approx(cosines(sentences).sum(axis=1), abs=1e-9)


@given(st.lists(st.text(st.sampled_from("abcdef"), min_size=1, max_size=2), min_size=2))
def test_scores_are_the_stationary_distribution_of_the_random_walk(words):
    matrix = cosines([" ".join(words[i : i + 3]) for i in range(len(words))])
    scores = np.array(centrality([" ".join(words[i : i + 3]) for i in range(len(words))]))
    walk = matrix / matrix.sum(axis=1, keepdims=True)
    assert (scores / scores.sum()) @ walk == pytest.approx(scores / scores.sum(), abs=1e-9)


@given(SENTENCES)
def test_scores_do_not_depend_on_the_order(sentences):
    backwards = centrality(sentences[::-1])[::-1]
    assert centrality(sentences) == pytest.approx(backwards, abs=1e-9)


def test_case_and_punctuation_do_not_count_and_scripts_without_spaces_are_read():
    assert centrality(["Rain, rain!"]) == centrality(["rain RAIN"])
    apart, together = centrality(["雨 水", "x"]), centrality(["雨水。", "x"])
    assert apart == together
    assert (
        centrality(["北京下雨", "北京出太阳", "x"])[2]
        < centrality(["北京下雨", "北京出太阳", "x"])[0]
    )


def test_the_most_said_is_chosen_once_and_in_order():
    assert select(STORM, at_most_words(100), limit=1) == [0]
    assert select(STORM, at_most_words(100), limit=2) == [0, 3]


def test_a_near_duplicate_is_left_out():
    text = ["It rained all day in Rome.", "It rained all day in Rome!", "Rome has seven hills."]
    assert select(text, at_most_words(100)) == [0, 2]


def test_what_does_not_fit_makes_room_for_something_shorter():
    assert select(STORM, at_most_words(8)) == [0]
    assert select(STORM, at_most_words(7)) == [2]
    assert select(STORM, at_most_words(2)) == []


def test_of_equals_the_earlier_is_taken():
    assert select(["alpha beta", "gamma delta"], at_most_words(2)) == [0]


@pytest.mark.parametrize("sentences", [[], ["?"], ["…", "--"]])
def test_nothing_said_nothing_chosen(sentences):
    assert select(sentences, at_most_words(100)) == []


@given(SENTENCES, st.integers(min_value=0, max_value=30), st.none() | st.integers(0, 5))
def test_a_choice_is_in_order_within_budget_and_without_repetition(sentences, budget, limit):
    chosen = select(sentences, at_most_words(budget), limit)
    assert chosen == sorted(set(chosen))
    assert len(" ".join(sentences[i] for i in chosen).split()) <= budget
    assert limit is None or len(chosen) <= limit
    matrix = cosines(sentences) if sentences else np.zeros((0, 0))
    for i in chosen:
        assert all(matrix[i, j] <= NEAR_DUPLICATE + 1e-9 for j in chosen if j != i)
    if limit is None:  # nothing that could still be taken was left
        for i in set(range(len(sentences))) - set(chosen):
            rest = " ".join(sentences[j] for j in sorted([*chosen, i])).split()
            says_nothing = matrix[i, i] < 0.5
            repeats = any(matrix[i, j] > NEAR_DUPLICATE - 1e-9 for j in chosen)
            assert len(rest) > budget or says_nothing or repeats
