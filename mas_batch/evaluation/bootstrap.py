"""Paired bootstrap: is a difference between two systems more than the luck of the sample?

Source: Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from mas_batch.evaluation.systems import Matrix, Vector

Key = TypeVar("Key", bound=Hashable)

_COUNTS_AT_ONCE = 1 << 22  # 32 MB of float64


def resampled_sums(
    statistics: Mapping[Key, Matrix], num_resamples: int, seed: int
) -> dict[Key, Matrix]:
    """Sum the rows of every table over the same resamples of the records.

    A resample draws as many records as there are, with replacement. All tables see the same
    draws, so that what makes a record hard for everybody cancels out of differences.

    Args:
        statistics: tables of shape [records, K], K may differ; at least one record.

    Returns:
        tables of shape [num_resamples, K].

    Cost: O(num_resamples · records · ΣK), in blocks of bounded memory.
    """
    stacked = np.hstack(list(statistics.values()))
    draws = _draws(len(stacked), num_resamples, np.random.default_rng(seed))
    sums = np.concatenate([counts @ stacked for counts in draws])
    ends = np.cumsum([table.shape[1] for table in statistics.values()])
    return dict(zip(statistics, np.split(sums, ends[:-1], axis=1), strict=True))


def interval(scores: Vector) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled scores; undefined ones (NaN) do not count.

    (NaN, NaN) if all are undefined.
    """
    defined = scores[np.isfinite(scores)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def p_value(differences: Vector) -> float:
    """Return the two-sided p of "no difference": twice the share of resamples beyond 0.

    Counted with one more on the far side, so that it is never 0: with R resamples nothing
    below 2 / (R + 1) can be told. NaN if no resample has a difference.
    """
    defined = differences[np.isfinite(differences)]
    if not len(defined):
        return float("nan")
    beyond = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return min(1.0, 2 * (1 + int(beyond)) / (len(defined) + 1))


def _draws(num_records: int, num_resamples: int, rng: np.random.Generator) -> Iterator[Matrix]:
    """Yield how often each record is drawn; blocks of shape [resamples, records]."""
    rows = max(1, _COUNTS_AT_ONCE // num_records)
    for first in range(0, num_resamples, rows):
        size = min(rows, num_resamples - first)
        drawn = rng.integers(0, num_records, size=(size, num_records))
        drawn += np.arange(size)[:, None] * num_records
        counts = np.bincount(drawn.ravel(), minlength=size * num_records)
        yield counts.reshape(size, num_records).astype(np.float64)
