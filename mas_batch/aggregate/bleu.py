"""Sentence BLEU of every pair of a record's candidates, at once and exactly."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

from mas_batch.aggregate.chrf import shared_ngrams

MAX_ORDER = 4

Matrix = npt.NDArray[np.float64]

_UNMARKED = (("<skipped>", ""), ("-\n", ""), ("\n", " "))
# The order matters: "&amp;lt;" becomes "<".
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# ASCII punctuation stands alone, save the four marks that numbers and words contain.
_ALONE = str.maketrans({mark: f" {mark} " for mark in string.punctuation if mark not in "',-."})
# Each of these consumes the character beside the mark: "a..b" and "a.,b" depend on their order.
_NUMBERS = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])-"), r"\1 - "),
)


def bleu_matrix(texts: Sequence[str]) -> Matrix:
    """Score every text against every other: `[i, j]` is BLEU of hypothesis i, reference j.

    Shape [N, N], values in [0, 1]. The definition is sacrebleu's `sentence_bleu` with its
    defaults: tokens of `tokenize_13a`, orders 1 to 4 as far as the hypothesis has n-grams,
    case kept; of the orders without a match the k-th counts as 1/2^k matches (smoothing
    "exp"), and without any match the score is 0. A text without a token scores 0, against
    itself too.

    Source: Papineni et al., "BLEU: a method for automatic evaluation of machine translation",
    ACL 2002; smoothing: Chen and Cherry, "A systematic comparison of smoothing techniques for
    sentence-level BLEU", WMT 2014, method 3. Cost: as `chrf_matrix`, over tokens.
    """
    sequences = _numbered([tokenize_13a(text) for text in texts])
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.float64)
    shape = (len(texts), len(texts))
    log_precision, num_zero, any_match = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for order, matches in enumerate(shared_ngrams(sequences, MAX_ORDER), start=1):
        totals = np.maximum(lengths - order + 1, 0)[:, None]
        none = (matches == 0) & (totals > 0)
        num_zero += none
        smoothed = np.where(none, 0.5**num_zero, matches)
        ratio = np.divide(smoothed, totals, out=np.ones(shape), where=totals > 0)
        log_precision += np.log(ratio)
        any_match |= matches > 0
    orders = np.clip(lengths, 1, MAX_ORDER)[:, None]
    return np.where(any_match, np.exp(log_precision / orders) * _brevity_penalty(lengths), 0.0)


def tokenize_13a(text: str) -> list[str]:
    """Split like NIST's mteval-v13a.pl, which WMT scores with.

    Four entities are decoded, ASCII punctuation stands alone; periods and commas stay inside
    numbers, hyphens and apostrophes inside words. Other scripts are split at white space only.
    """
    text = text.rstrip()
    for old, new in (*_UNMARKED, *_ENTITIES):
        text = text.replace(old, new)
    text = f" {text} ".translate(_ALONE)
    for pattern, spaced in _NUMBERS:
        text = pattern.sub(spaced, text)
    return text.split()


def _numbered(token_lists: Sequence[Sequence[str]]) -> list[npt.NDArray[np.uint32]]:
    """Give every distinct token a number, the same in all texts."""
    number: defaultdict[str, int] = defaultdict(count().__next__)
    return [np.array([number[t] for t in tokens], dtype=np.uint32) for tokens in token_lists]


def _brevity_penalty(lengths: Matrix) -> Matrix:
    """[i, j] is exp(1 - |j| / |i|) where hypothesis i is shorter than reference j, else 1."""
    hypothesis = np.maximum(lengths, 1)[:, None]  # an empty one has no match: its score is 0
    return np.exp(np.minimum(0.0, 1 - lengths[None, :] / hypothesis))
