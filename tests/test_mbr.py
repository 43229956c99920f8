from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.mbr import minimum_bayes_risk
from mas_batch.aggregate.normalise import nfc
from mas_batch.aggregate.rouge import MAX_WORDS, rouge_l_matrix
from mas_batch.aggregate.utilities import UTILITIES, Utility

# Few letters, so that n-grams repeat and are shared; and everything else, so that nothing breaks.
FEW = st.text(alphabet="ab \u3000é", max_size=30)
ANY = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
WORDS = st.lists(st.sampled_from(["a", "B", "ab", "1", "é", "don't", "-"]), max_size=12).map(
    " ".join
)

CATS = (
    "The cat sat on the mat.",
    "A cat sat on the mat.",
    "The cat is sitting on the mat.",
    "Dogs bark at night.",
)


def ballots(*texts: str) -> list[Ballot]:
    return [Ballot(f"a{i}", f"f{i}", 0, nfc(text), text) for i, text in enumerate(texts)]


def sacrebleu_matrix(texts: list[str]) -> np.ndarray:
    metric = CHRF()
    return np.array([[metric.sentence_score(h, [r]).score / 100 for r in texts] for h in texts])


def google_matrix(texts: list[str]) -> np.ndarray:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return np.array([[scorer.score(r, h)["rougeL"].fmeasure for r in texts] for h in texts])


@given(st.lists(st.one_of(FEW, ANY), min_size=1, max_size=5))
@example(["", " ", "a", "a a", "abcdef", "abcdefg"])
@example(["aaaaaaaaaaaa", "aaaaaaa", "aaab"])
@example(["same", "same"])
@example(["\U0001f600\U0001f600", "\U0001f600"])
def test_chrf_is_sacrebleus(texts: list[str]) -> None:
    np.testing.assert_allclose(chrf_matrix(texts), sacrebleu_matrix(texts), rtol=0, atol=1e-12)


@given(st.lists(st.one_of(WORDS, ANY), min_size=1, max_size=5))
@example(["", "a", "a b c", "c b a"])
@example(["\u0130stanbul \u017f \u212a", "istanbul s k"])
def test_rouge_l_is_googles(texts: list[str]) -> None:
    np.testing.assert_allclose(rouge_l_matrix(texts), google_matrix(texts), rtol=0, atol=1e-12)


def test_rouge_l_compares_no_more_than_so_many_words() -> None:
    first = "a " * MAX_WORDS
    scores = rouge_l_matrix([first + "b " * 10**6, first + "c " * 10**6, first])
    np.testing.assert_array_equal(scores, np.ones((3, 3)))


def test_rouge_l_of_texts_longer_than_a_machine_word() -> None:
    rng = random.Random(3)
    texts = [" ".join(rng.choices("abcdefgh", k=length)) for length in (63, 64, 65, 200)]
    np.testing.assert_allclose(rouge_l_matrix(texts), google_matrix(texts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("utility", UTILITIES.values())
def test_no_texts_is_an_empty_matrix(utility: Utility) -> None:
    assert utility([]).shape == (0, 0)


@pytest.mark.parametrize("weights", [[1.0] * 6, [0.9, 0.5, 0.5, 0.3, 0.3, 0.8]])
def test_mbr_is_its_definition_over_all_answers(weights: list[float]) -> None:
    texts = [*CATS, CATS[1], CATS[3]]  # answers repeat; the definition does not merge them
    chrf = sacrebleu_matrix(texts)
    symmetric = (chrf + chrf.T) / 2
    expected = symmetric @ np.array(weights) / sum(weights)
    verdict = minimum_bayes_risk(ballots(*texts), weights, chrf_matrix)
    by_answer = {c.answer: c.weight for c in verdict.support}
    assert by_answer == pytest.approx(dict(zip(texts, expected, strict=True)), abs=1e-9)
    assert verdict.answer == texts[int(np.argmax(expected))]
    assert verdict.confidence == pytest.approx(max(expected), abs=1e-9)
    best, second = sorted(set(by_answer.values()), reverse=True)[:2]
    assert verdict.margin == pytest.approx(best - second)
    assert verdict.confidence_kind == "expected_utility"
    assert not verdict.tie


def test_the_outlier_is_last() -> None:
    verdict = minimum_bayes_risk(ballots(*CATS), [1.0] * 4, rouge_l_matrix)
    assert verdict.support[-1].answer == "Dogs bark at night."


def test_two_answers_tie_and_the_rule_decides() -> None:
    texts = ballots("zebra stripes", "apple pie")
    verdict = minimum_bayes_risk(texts, [1.0, 1.0], chrf_matrix)
    assert (verdict.tie, verdict.answer, verdict.margin) == (True, "apple pie", 0.0)
    assert minimum_bayes_risk(texts, [0.9, 0.8], chrf_matrix).answer == "zebra stripes"


def test_composed_and_decomposed_are_one_candidate_shown_in_its_frequent_form() -> None:
    texts = ballots("cafe\u0301", "café", "cafe\u0301")
    verdict = minimum_bayes_risk(texts, [1.0] * 3, chrf_matrix)
    assert len(verdict.support) == 1
    assert (verdict.answer, verdict.confidence, verdict.margin) == ("cafe\u0301", 1.0, 1.0)


def test_texts_that_the_utility_cannot_see_tie_at_zero() -> None:
    verdict = minimum_bayes_risk(ballots("да", "нет"), [1.0, 1.0], rouge_l_matrix)
    assert (verdict.confidence, verdict.tie) == (0.0, True)
    assert verdict.entropy == pytest.approx(math.log(2))


@given(st.lists(FEW, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(texts: list[str], shuffle: random.Random) -> None:
    votes = ballots(*texts)
    weights = {b.agent_id: 0.3 + 0.1 * (i % 3) for i, b in enumerate(votes)}
    shuffled = shuffle.sample(votes, len(votes))
    for utility in UTILITIES.values():
        one = minimum_bayes_risk(votes, [weights[b.agent_id] for b in votes], utility)
        other = minimum_bayes_risk(shuffled, [weights[b.agent_id] for b in shuffled], utility)
        assert one == other
