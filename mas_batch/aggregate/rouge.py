"""ROUGE-L of every pair of a record's candidates, exactly."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MAX_WORDS = 4096
"""Further words of a text are not compared: the cost grows with the square of their number."""

_TOKEN = re.compile("[a-z0-9]+")


def rouge_l_matrix(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Score every text against every other: `[i, j]` is the ROUGE-L F1 of i and j.

    Shape [N, N], symmetric, values in [0, 1]. Tokens are those of Google's rouge_score
    without a stemmer: lowercase runs of a–z and 0–9. A text without one, which is every text
    in another script, scores 0, against itself too: use chrF there. Of a text of more than
    `MAX_WORDS` tokens, the first so many are compared.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004.
    Cost: O(N² n ⌈n/w⌉) for texts of n tokens and machine words of w bits.
    """
    tokens = [_TOKEN.findall(text.lower())[:MAX_WORDS] for text in texts]
    scores = np.zeros((len(texts), len(texts)))
    for i, row in enumerate(tokens):
        places = _places(row)
        for j in range(i + 1):
            common = _lcs_length(places, len(row), tokens[j])
            scores[i, j] = scores[j, i] = _f1(common, len(row), len(tokens[j]))
    return scores


def _places(tokens: Sequence[str]) -> dict[str, int]:
    """Map each token to a bit set of its positions."""
    places: dict[str, int] = defaultdict(int)
    for position, token in enumerate(tokens):
        places[token] |= 1 << position
    return places


def _lcs_length(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table per addition.

    Bit p of `row` is 0 where the table rises at p. Source: Hyyrö, "Bit-parallel LCS-length
    computation revisited", 2004.
    """
    full = (1 << length) - 1
    row = full
    for token in other:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return length - row.bit_count()


def _f1(common: int, length: int, other_length: int) -> float:
    if common == 0:
        return 0.0
    precision, recall = common / other_length, common / length
    return 2 * precision * recall / (precision + recall)
