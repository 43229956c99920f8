"""A cascade with a guarantee: how much must be escalated so that the rest agrees often enough.

Records are ordered by the confidence of their merge. A sample of them goes to the stronger agent,
and whether its answers agree with the merged ones tells how far down the order the merge can be
trusted. With probability 1 - delta over the draw of the sample, merged answers agree with the
stronger agent's on at least `target` of all records: for any records, any order and any number of
labels, since the bound is the exact one of a sample without replacement (hypergeometric; with
replacement it would be Clopper and Pearson's, 1934).

Sources. A threshold from a labelled sample that holds with probability 1 - delta: Kang et al.,
"Approximate selection with guarantees using proxies" (SUPG), VLDB 2020; for cascades of language
models: Patel et al., LOTUS, 2024. One test at level delta is enough for all thresholds, because
errors only grow as the threshold falls (Bates et al., "Distribution-free, risk-controlling
prediction sets", 2021). The sample is uniform: SUPG's weights draw doubtful records, which are
escalated anyway, and its asymptotic bound misses more often (`benchmarks/cascade.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A record's place in the order of confidence."""

    bin: int
    """Confidence in thousandths."""
    lot: float
    """In [0, 1): orders the records of one bin."""


def num_tolerated(num_records: int, num_labels: int, *, target: float, delta: float) -> int:
    """Return how many errors a sample may show if all records are to have few enough.

    Were more than (1 - target) · num_records records wrong, a sample would show so few errors
    with probability delta at most. -1: not even a sample without an error would tell. Labelled
    records count as wrong though they get the stronger agent's answer, so that the promise is
    kept with room to spare where many of all are labelled.
    """
    least_wrong = math.floor((1 - target) * num_records + 1e-9) + 1
    most = min(least_wrong, num_labels)
    tail = 0.0
    for errors in range(most + 1):
        tail += _hypergeometric(errors, num_records, least_wrong, num_labels)
        if tail > delta:
            return errors - 1
    return most


def last_escalated(
    disagreeing: Sequence[Place], num_records: int, num_labels: int, *, target: float, delta: float
) -> Place | None:
    """Return the surest place that must be escalated, with all below it; None: none must.

    Args:
        disagreeing: places of the labelled records whose merged answers the stronger agent
            contradicts; one that it could not answer counts as contradicted.
        num_records: from which the labelled ones were drawn, each subset of that size alike.
    """
    tolerated = num_tolerated(num_records, num_labels, target=target, delta=delta)
    if tolerated < 0:
        return Place(1000, 1.0)
    surest_first = sorted(disagreeing, reverse=True)
    return surest_first[tolerated] if len(surest_first) > tolerated else None


def _hypergeometric(errors: int, num_records: int, num_wrong: int, num_labels: int) -> float:
    """Return the probability that so many of the labelled records are among the wrong ones."""
    if num_labels - errors > num_records - num_wrong or num_wrong > num_records:
        return 0.0
    return math.exp(
        _log_choose(num_wrong, errors)
        + _log_choose(num_records - num_wrong, num_labels - errors)
        - _log_choose(num_records, num_labels)
    )


def _log_choose(number: int, chosen: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(chosen + 1) - math.lgamma(number - chosen + 1)
