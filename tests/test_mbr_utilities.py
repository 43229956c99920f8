"""Utilities beyond their own definitions: published tables, vectors, and what MBR makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.mbr import minimum_bayes_risk
from mas_batch.aggregate.utilities import cosine_utility, embedding_utility

TEST, FEST = "this is a test", "this is a fest"
PRODUCTION = "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;"
REFERENCE = "producţia de zahăr brut se exprimă în zahăr alb;"


def test_mbrs_published_chrf_rows() -> None:
    # naist-nlp/mbrs, mbrs/metrics/chrf_test.py
    hypotheses = [TEST, "another test", FEST, PRODUCTION]
    rows = 100 * chrf_matrix([*hypotheses, "ref", TEST, REFERENCE])[:4, 4:]
    published = [
        [7.246, 100.0, 3.411],
        [14.493, 23.060, 4.386],
        [14.493, 60.628, 3.411],
        [6.849, 7.224, 46.161],
    ]
    np.testing.assert_allclose(rows, published, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("hypotheses", "references", "winner", "score"),
    [
        (["another test", TEST, FEST, "x", "this is test"], None, 1, 48.912),
        (
            ["another test", FEST, TEST],
            [TEST, "ref", "these are tests", "this is the test"],
            2,
            44.239,
        ),
        ([TEST], None, 0, 100.0),
        ([PRODUCTION], [REFERENCE], 0, 46.161),
    ],
)
def test_mbrs_published_chrf_winners(
    hypotheses: list[str], references: list[str] | None, winner: int, score: float
) -> None:
    # naist-nlp/mbrs, mbrs/decoders/pruning_mbr_test.py; pruning must not change the outcome
    n = len(hypotheses)
    matrix = chrf_matrix([*hypotheses, *(references or hypotheses)])[:n, n:]
    expected = 100 * matrix.mean(axis=1)
    assert int(np.argmax(expected)) == winner
    assert expected[winner] == pytest.approx(score, abs=5e-4)
    if references is None:  # the same answers vote and stand
        ballots = [Ballot(f"a{i}", "f", 0, text, text) for i, text in enumerate(hypotheses)]
        assert minimum_bayes_risk(ballots, [1.0] * n, chrf_matrix).answer == hypotheses[winner]


VECTORS = arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    elements=st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-3 else 0.0),
)


@given(VECTORS)
def test_cosine_is_its_definition(vectors: npt.NDArray[np.float64]) -> None:
    matrix = cosine_utility(vectors)
    assert matrix.shape == (len(vectors), len(vectors))
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            norm = float(np.sqrt(np.dot(a, a) * np.dot(b, b)))
            cosine = float(np.dot(a, b)) / norm if norm else 0.0
            assert matrix[i, j] == pytest.approx(max(0.0, cosine), abs=1e-9)
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_cosine_of_vectors_whose_squares_leave_the_range_of_floats() -> None:
    vectors = np.array([[1e300, 0.0], [1e300, 1e300], [1e-300, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    half = 0.5**0.5
    expected = np.array(
        [
            [1, half, 1, 0, 0],
            [half, 1, half, 0, 0],
            [1, half, 1, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1],
        ]
    )
    np.testing.assert_allclose(cosine_utility(vectors), expected, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match="vector 1 has a component that is not finite"):
        cosine_utility(np.array([[1.0, 2.0], [0.0, bad]]))


def letter_counts(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return np.array([[text.count(c) for c in "abcdef"] for text in texts], dtype=np.float32)


def test_mbr_by_embedding_chooses_the_central_text() -> None:
    texts = ["aab", "abb", "aabb", "ffff"]
    ballots = [Ballot(f"a{i}", "f", 0, text, text) for i, text in enumerate(texts)]
    verdict = minimum_bayes_risk(ballots, [1.0] * 4, embedding_utility(letter_counts))
    assert verdict.answer == "aabb"
    assert verdict.support[-1].answer == "ffff"
    # cosines of aabb: itself, 3/√10 twice, 0
    assert verdict.confidence == pytest.approx((1 + 2 * 3 / 10**0.5) / 4, abs=1e-8)


def test_no_text_is_not_encoded() -> None:
    assert embedding_utility(letter_counts)([]).shape == (0, 0)


@pytest.mark.parametrize("shape", [(2,), (6,), (1, 2), (2, 1, 1)])
def test_an_encoder_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    message = re.escape(f"shape {shape} for 2 texts; allowed: (2, d)")
    with pytest.raises(ValueError, match=message):
        embedding_utility(lambda texts: np.ones(shape))(["a", "b"])
