"""Quantiles of seconds that add up in any order: a histogram whose bins grow by a constant factor.

The sketch of Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees" (VLDB 2019), without its bound on the number of bins, which seconds
do not need: from a microsecond to a day there are 1,260. Merging adds integers, so a quantile is
the same to the byte whatever the partitions and the tree; t-digests are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mas_batch.aggregate.reductions import Partial, Reduction, add_up

RELATIVE_ERROR = 0.01
"""A quantile is off by at most this part of itself."""

_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SMALLEST_S = 1e-6
"""Anything shorter counts as nothing."""

PARTS = ("compute", "transfer", "processing", "total")
QUANTILES = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99, "max_s": 1.0}


def sketch(seconds: NDArray[np.float64]) -> Partial:
    """Count seconds, none of them negative, in bins: {"count", "sum_us", "bins": {bin: count}}."""
    bins, counts = np.unique(_bins(seconds), return_counts=True)
    return {
        "count": len(seconds),
        "sum_us": int(np.rint(seconds * 1e6).astype(np.int64).sum()),
        "bins": dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True)),
    }


def quantile(partial: Partial, q: float) -> float:
    """Return the q-quantile (lower, as `numpy.quantile(…, method="inverted_cdf")`) of a sketch.

    Args:
        partial: of at least one value.
        q: in [0, 1].
    """
    rank = max(1, math.ceil(q * partial["count"]))
    bins = sorted(map(int, partial["bins"]))
    up_to = np.cumsum([partial["bins"][str(index)] for index in bins])
    return _middle(bins[np.searchsorted(up_to, rank)])


def summary(partial: Partial) -> dict[str, float]:
    """Return count, mean and `QUANTILES` of a sketch of at least one value."""
    mean_s = partial["sum_us"] / 1e6 / partial["count"]
    found = {name: quantile(partial, q) for name, q in QUANTILES.items()}
    return {"count": partial["count"], "mean_s": mean_s, **found}


def _bins(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    # Bin i holds (growth^(i-1), growth^i] times the smallest; 0 holds what is shorter.
    with np.errstate(divide="ignore"):
        found = np.ceil(np.log(seconds / _SMALLEST_S) / math.log(_GROWTH))
    return np.maximum(found, 0).astype(np.int64)


def _middle(index: int) -> float:
    """Return the value that is off by the same part of itself from both ends of a bin."""
    if index == 0:
        return 0.0
    return float(_SMALLEST_S * 2 * _GROWTH**index / (_GROWTH + 1))


def _sketch_answers(answers: pa.Table) -> Partial:
    """Sketch each agent's seconds per answer, by part; unknown seconds count as 0."""
    agents = np.asarray(answers["agent_id"].to_pylist(), dtype=object)
    parts = {
        part: np.nan_to_num(answers[f"t_{part}_s"].to_numpy().astype(np.float64))
        for part in PARTS[:-1]
    }
    parts["total"] = np.sum(list(parts.values()), axis=0)
    return {
        agent: {part: sketch(seconds[agents == agent]) for part, seconds in parts.items()}
        for agent in sorted(set(agents))
    }


def _finalize(partial: Mapping[str, Mapping[str, Partial]]) -> dict[str, Any]:
    return {
        agent: {part: summary(each) for part, each in parts.items()}
        for agent, parts in partial.items()
    }


RECORD_LATENCY = Reduction("record_latency", _sketch_answers, add_up, _finalize)
"""Answers → agent → part of `PARTS` → count, mean and quantiles of an answer's seconds."""
