"""Which records one more agent is asked about: the least confident ones, within a budget.

The choice needs one number per run, found by a reduction; then every worker can tell its own
records, and two workers that look at the same record always agree.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.method import METHODS, methods_that
from mas_batch.aggregate.reductions import Partial, Reduction
from mas_batch.by_name import pickled_by_name
from mas_batch.errors import JobError

NUM_BINS = 1000
"""Confidences are told apart to a thousandth."""

_UNANSWERED = -1


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Escalation:
    """Picks records by confidence. Those without an answer always are, unless unusable."""

    agent_id: str
    below: int
    """Every record of a lower confidence bin."""
    share: float
    """Of the records in that bin, the part that the budget has room for, chosen by their ids."""

    def picks(self, record_id: str, confidence: float | None) -> bool:
        """Whether the agent is asked about the record; confidence None: no agent answered it."""
        own = _bin(confidence)
        return own < self.below or (own == self.below and _lot(record_id) < self.share)

    def expected(self, counts: Partial) -> int:
        """Return how many records it picks, of those of `CONFIDENCES`, to within the lots' luck."""
        bins: dict[int, int] = {int(number): count for number, count in counts["bins"].items()}
        lower = sum(count for number, count in bins.items() if number < self.below)
        return lower + round(self.share * bins.get(self.below, 0))


def choose(counts: Partial, agent_id: str, fraction: float) -> Escalation:
    """Return the escalation that takes the least confident `fraction` of all records.

    Records that no agent answered are taken first, so of them there may be more.

    Args:
        counts: of `CONFIDENCES`.
    """
    ordered = sorted((int(number), count) for number, count in counts["bins"].items())
    budget = fraction * counts["records"]
    for (number, count), total in zip(
        ordered, accumulate(count for _, count in ordered), strict=True
    ):
        if total > budget and number != _UNANSWERED:
            return Escalation(agent_id, number, max(0.0, (budget - total + count) / count))
    return Escalation(agent_id, NUM_BINS + 1, 0.0)  # everybody


def below(agent_id: str, confidence: float) -> Escalation:
    """Return the escalation that takes every record of a lower confidence."""
    return Escalation(agent_id, _bin(confidence), 0.0)


def check_method(method: str) -> None:
    """Refuse a merge method whose confidence says nothing of how sure an answer is.

    Raises:
        JobError: it is such a method.
    """
    if (why := METHODS[method].not_escalated) is not None:
        allowed = methods_that(lambda each: each.not_escalated is None)
        raise JobError(
            f"merge.method {method!r} does not say how sure an answer is: {why}; "
            f"allowed: {allowed}",
            key="routing.escalate",
        )


def _count(results: pa.Table, failures: pa.Table) -> Partial:
    """Count a partition's records by confidence bin.

    Args:
        failures: without the records that no agent can be asked about.
    """
    bins = Counter(str(_bin(confidence)) for confidence in results["confidence"].to_pylist())
    if failures.num_rows:
        bins[str(_UNANSWERED)] = failures.num_rows
    return {"records": results.num_rows + failures.num_rows, "bins": dict(bins)}


def _add(partials: Sequence[Partial]) -> Partial:
    total: Counter[str] = Counter()
    for partial in partials:
        total.update(partial["bins"])
    return {"records": sum(p["records"] for p in partials), "bins": dict(sorted(total.items()))}


def _as_is(partial: Partial) -> dict[str, Any]:
    return partial


CONFIDENCES = Reduction("confidences", _count, _add, _as_is)
"""Records per confidence bin, from (results, failures)."""


def picked(
    escalation: Escalation, records: pa.Table, results: pa.Table, failures: pa.Table
) -> pa.Table:
    """Return the rows of `records` that the agent is asked about, in their order."""
    confidences = dict.fromkeys(failures["record_id"].to_pylist()) | dict(
        zip(results["record_id"].to_pylist(), results["confidence"].to_pylist(), strict=True)
    )
    usable = records.filter(pc.is_null(records["reason"]))
    mask = [
        escalation.picks(record_id, confidences[record_id])
        for record_id in usable["record_id"].to_pylist()
    ]
    return usable.filter(pa.array(mask, pa.bool_()))


def _bin(confidence: float | None) -> int:
    # Rounded, not floored: 0.29 must not fall below 0.29 for its binary digits.
    return _UNANSWERED if confidence is None else round(confidence * NUM_BINS)


def _lot(record_id: str) -> float:
    """Return a number in [0, 1) that only the id decides."""
    digest = hashlib.blake2b(record_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
