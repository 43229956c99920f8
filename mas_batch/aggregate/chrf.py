"""chrF of every pair of a record's candidates, at once and exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CHAR_ORDER = 6
BETA = 2

Matrix = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def chrf_matrix(texts: Sequence[str]) -> Matrix:
    """Score every text against every other: `[i, j]` is chrF2 of hypothesis i, reference j.

    Shape [N, N], values in [0, 1]. The definition is sacrebleu's sentence chrF with its
    defaults: character n-grams of order 1 to 6, whitespace removed, case kept, precision and
    recall averaged over the orders that both texts have. A text without a character scores 0,
    against itself too.

    Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.
    Cost: O(L log L + N² V) for L characters in all and V n-grams that two texts share.
    """
    codes = [_code_points(text) for text in texts]
    lengths = np.array([len(code) for code in codes], dtype=np.int64)
    precision = np.zeros((len(texts), len(texts)))
    effective_orders = np.zeros_like(precision)
    for order, matches in enumerate(shared_ngrams(codes, CHAR_ORDER), start=1):
        totals = np.maximum(lengths - order + 1, 0)
        both = (totals[:, None] > 0) & (totals[None, :] > 0)
        precision += np.divide(matches, totals[:, None], out=np.zeros_like(precision), where=both)
        effective_orders += both
    precision /= np.maximum(effective_orders, 1)
    recall = precision.T  # matches are symmetric: recall of (i, j) is precision of (j, i)
    denominator = BETA**2 * precision + recall
    product = (1 + BETA**2) * precision * recall
    return np.divide(product, denominator, out=np.zeros_like(product), where=denominator > 0)


def shared_ngrams(texts: Sequence[npt.NDArray[np.uint32]], max_order: int) -> list[Matrix]:
    """Count, per order from 1, the n-grams that each two texts have in common; [N, N] each.

    A text is its symbols, characters or numbered words; with itself it shares all its n-grams.
    An n-gram is numbered by (number of its prefix, last symbol), so equal numbers mean equal
    n-grams, without hashing. What only one text has is dropped before the next order: a longer
    n-gram that contains it is in one text too.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    text_of = np.repeat(np.arange(len(texts)), lengths)
    end_of = np.repeat(np.cumsum(lengths), lengths)
    alphabet, symbols = np.unique(
        np.concatenate([*texts, np.empty(0, np.uint32)]), return_inverse=True
    )
    symbols = symbols.astype(np.int64)
    starts = np.arange(len(symbols))
    numbers = np.zeros(len(symbols), dtype=np.int64)
    matches = []
    for order in range(1, max_order + 1):
        fits = starts + order <= end_of[starts]
        starts, prefixes = starts[fits], numbers[fits]
        keys = prefixes * len(alphabet) + symbols[starts + order - 1]
        starts, numbers = _in_two_texts(starts, keys, text_of)
        shared = _matches(text_of[starts], numbers, len(texts))
        np.fill_diagonal(shared, np.maximum(lengths - order + 1, 0))
        matches.append(shared)
    return matches


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    joined = "".join(text.split())
    return np.frombuffer(joined.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _in_two_texts(starts: Integers, keys: Integers, text_of: Integers) -> tuple[Integers, Integers]:
    """Keep the positions whose key occurs in at least two texts; number the keys from 0."""
    distinct, numbers = np.unique(keys, return_inverse=True)
    first = np.empty(len(distinct), dtype=np.int64)
    last = np.empty_like(first)
    # Positions ascend, and of several writes to one place NumPy keeps the last.
    last[numbers] = text_of[starts]
    first[numbers[::-1]] = text_of[starts[::-1]]
    shared = first != last
    kept = shared[numbers]
    return starts[kept], (np.cumsum(shared) - 1)[numbers[kept]]


def _matches(text_of: Integers, numbers: Integers, num_texts: int) -> Matrix:
    """Sum min(count in i, count in j) over the n-grams; exact in float64 below 2^53."""
    num_ngrams = int(numbers.max(initial=-1)) + 1
    flat = np.bincount(text_of * num_ngrams + numbers, minlength=num_texts * num_ngrams)
    counts = flat.reshape(num_texts, num_ngrams).astype(np.float64)
    repeated = counts.max(axis=0, initial=0) > 1
    single = counts[:, ~repeated]
    matches = single @ single.T  # of counts 0 and 1 the product is the minimum
    several = counts[:, repeated]
    for i, row in enumerate(several):
        matches[i] += np.minimum(several, row).sum(axis=1)
    return np.asarray(matches, dtype=np.float64)
