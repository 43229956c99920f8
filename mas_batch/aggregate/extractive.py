"""Choose the sentences of a text that say most of it: a summary without a model.

Sentences come in and positions go out; a cut into sentences is `tasks.splitting.sentences`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

NEAR_DUPLICATE = 0.7
"""Two sentences whose cosine is higher say the same."""

# Scripts that write no spaces between words: a character is the term.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_TERM = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

_Vector = Mapping[str, float]


def terms(text: str) -> list[str]:
    """Return the words of a text, without case; single characters of scripts without spaces."""
    return _TERM.findall(text.casefold())


def select(
    sentences: Sequence[str], fits: Callable[[str], bool], limit: int | None = None
) -> list[int]:
    """Return the positions of the most central sentences, in the text's order.

    They are taken best first, of equals the earlier one. Left out is what says nothing (score
    0), what nearly repeats one taken, and what no longer fits: then a shorter one may. So the
    list is empty when no sentence says anything and fits.

    Args:
        sentences: in the text's order.
        fits: whether the chosen sentences, joined by a space in the text's order, are within
            the budget.
        limit: at most so many; None: as many as fit.
    """
    vectors = _unit_vectors(sentences)
    # Rounded: a difference in the last bit, which a platform's `log` may make, decides nothing.
    scores = [round(score, 9) for score in _centrality(vectors)]
    chosen: list[int] = []
    for i in sorted(range(len(sentences)), key=lambda i: (-scores[i], i)):
        if scores[i] == 0 or len(chosen) == limit:
            break
        if any(_dot(vectors[i], vectors[j]) > NEAR_DUPLICATE for j in chosen):
            continue
        longer = sorted([*chosen, i])
        if fits(" ".join(sentences[j] for j in longer)):
            chosen = longer
    return chosen


def _centrality(vectors: Sequence[_Vector]) -> list[float]:
    """Score each sentence by the sum of its tf-idf cosines to all sentences, itself included.

    This is continuous LexRank without damping: the matrix of cosines is symmetric, so its
    random walk's stationary distribution is the degree and needs no iteration. A sum of
    cosines is one dot product with the sum of all vectors: O(terms) time and memory, the
    matrix is never made. A sentence without a letter or digit scores 0.

    Source: Erkan and Radev, "LexRank: graph-based lexical centrality as salience in text
    summarization", 2004. Inverse document frequencies are of these sentences, ln((1 + n) / df).
    """
    total: dict[str, float] = {}
    for vector in vectors:
        for term, weight in vector.items():
            total[term] = total.get(term, 0.0) + weight
    return [_dot(vector, total) for vector in vectors]


def _unit_vectors(sentences: Sequence[str]) -> list[_Vector]:
    """Weigh terms by tf-idf, scaled to length 1; no term, no entries."""
    counts = [Counter(terms(sentence)) for sentence in sentences]
    occurs_in = Counter(term for count in counts for term in count)
    idf = {term: math.log((1 + len(sentences)) / n) for term, n in occurs_in.items()}
    weighted = [{term: n * idf[term] for term, n in count.items()} for count in counts]
    norms = [math.hypot(*vector.values()) for vector in weighted]
    return [
        {term: weight / norm for term, weight in vector.items()}
        for vector, norm in zip(weighted, norms, strict=True)
    ]


def _dot(vector: _Vector, other: _Vector) -> float:
    return math.fsum(weight * other.get(term, 0.0) for term, weight in vector.items())
