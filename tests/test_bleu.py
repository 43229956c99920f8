from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sacrebleu import sentence_bleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from mas_batch.aggregate.bleu import bleu_matrix, tokenize_13a

# What the rules speak of, so that they meet; and everything else, so that nothing breaks.
RULES = st.lists(
    st.sampled_from(
        [
            *"aé19.,-'\"&;:!$()[]{}~ \n\t\u3000",
            "<skipped>",
            "-\n",
            "&quot;",
            "&amp;",
            "&lt;",
            "&gt;",
        ]
    ),
    max_size=25,
).map("".join)
ANY = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "a.", "1,5"]), max_size=12).map(" ".join)


@given(st.one_of(RULES, ANY))
@example("&amp;lt;b&amp;gt;")  # entities are decoded one kind after the other
@example("a..b 1.,2 ,.")  # a mark takes the character beside it
@example("3-4 x-1 -5 1-\n2 end-\n")
@example("\x1c.5\u2028,\x85")
def test_tokens_are_sacrebleus_13a(text: str) -> None:
    assert tokenize_13a(text) == Tokenizer13a()(text.rstrip()).split()


def sacrebleu_matrix(texts: list[str]) -> np.ndarray:
    return np.array([[sentence_bleu(h, [r]).score / 100 for r in texts] for h in texts])


@given(st.lists(st.one_of(WORDS, RULES), min_size=1, max_size=5))
@example(["", " ", "a", "a b", "a b c d", "d c b a"])
@example(["a a a a a", "a a", "a b a b a b a b"])
@example(["a x b y c z d", "a b c d e f g h i j k"])
def test_bleu_is_sacrebleus(texts: list[str]) -> None:
    np.testing.assert_allclose(bleu_matrix(texts), sacrebleu_matrix(texts), rtol=0, atol=1e-12)


def test_mbrs_published_rows() -> None:
    # naist-nlp/mbrs, mbrs/metrics/bleu_test.py, effective order
    hypotheses = [
        "this is a test",
        "another test",
        "this is a fest",
        "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;",
    ]
    references = ["ref", "this is a test", "producţia de zahăr brut se exprimă în zahăr alb;"]
    rows = 100 * bleu_matrix([*hypotheses, *references])[:4, 4:]
    published = [[0, 100, 0], [0, 18.394, 0], [0, 59.460, 0], [0, 0, 8.493]]
    np.testing.assert_allclose(rows, published, rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", range(4))
def test_mbrs_published_winners_and_scores(case: int) -> None:
    # naist-nlp/mbrs, mbrs/decoders/mbr_test.py: expected BLEU over references of their own
    tests = ["another test", "this is a test", "this is an test", "this is a fest"]
    romanian = "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;"
    hypotheses, references, winner, score = [
        (tests, tests, 1, 52.697),
        ([tests[0], tests[3], tests[1]], [tests[1], "ref1 ref2 ref3 ref4"], 2, 50.0),
        ([tests[1]], [tests[1]], 0, 100.0),
        ([romanian], ["producţia de zahăr brut se exprimă în zahăr alb;"], 0, 8.493),
    ][case]
    n = len(hypotheses)
    expected = 100 * bleu_matrix([*hypotheses, *references])[:n, n:].mean(axis=1)
    assert int(np.argmax(expected)) == winner
    assert expected[winner] == pytest.approx(score, abs=5e-4)
