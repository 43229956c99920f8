"""Which records one more agent is asked about: the least confident ones.

How many is a budget's matter, or a sample's of that agent's answers (module `guarantee`). Either
way the choice is a few numbers per run, found by reductions; then every worker can tell its own
records, and two workers that look at the same record always agree.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.guarantee import Place
from mas_batch.aggregate.method import MergeSpec, methods_that
from mas_batch.aggregate.reductions import Partial, Reduction, add_up
from mas_batch.by_name import pickled_by_name
from mas_batch.errors import JobError

NUM_BINS = 1000
"""Confidences are told apart to a thousandth."""

_UNANSWERED = -1


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Sample:
    """Records that the agent is asked about to find the threshold: any answered one alike."""

    seed: str
    size: int
    """Records of it, at most."""
    last_lot: float = 1.0
    """The highest lot of a record in it."""

    def lot(self, record_id: str) -> float:
        """Return the record's lot in [0, 1), which has nothing to do with other seeds' lots."""
        return _lot(record_id, self.seed)


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Escalation:
    """Picks records by confidence. Those without an answer always are, unless unusable."""

    agent_id: str
    below: int
    """Every record of a lower confidence bin."""
    share: float
    """Of the records in that bin, the part that the budget has room for, chosen by their ids."""
    sample: Sample | None = None
    """Whose records are picked too."""

    def picks(self, record_id: str, own: int) -> bool:
        """Whether the agent is asked about the record of that bin; -1: no agent answered it."""
        if own < self.below or (own == self.below and _lot(record_id) < self.share):
            return True
        sample = self.sample
        return sample is not None and own >= 0 and sample.lot(record_id) <= sample.last_lot

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


def sample_only(agent_id: str, sample: Sample) -> Escalation:
    """Return the escalation that takes the records of the sample and no others."""
    return Escalation(agent_id, _UNANSWERED, 0.0, sample)


def up_to(agent_id: str, place: Place | None, sample: Sample | None) -> Escalation:
    """Return the escalation that takes all records up to the place, itself included, and the
    sample; None: of the answered ones only the sample."""
    if place is None:
        return Escalation(agent_id, 0, 0.0, sample)
    return Escalation(agent_id, place.bin, math.nextafter(place.lot, math.inf), sample)


def check_method(spec: MergeSpec, *, compares: bool = False) -> None:
    """Refuse a merge whose confidence says nothing of how sure an answer is.

    Args:
        compares: whether merged answers are compared with the agent's: then they must not be
            texts of which no two are the same.

    Raises:
        JobError: it is such a method.
    """
    if compares and spec.rules.exact:
        allowed = methods_that(
            lambda each: not each.exact and each.not_escalated is None, spec.kind
        )
        raise JobError(
            f"merge.method {spec.method!r} publishes free texts, and two agents' are hardly ever "
            f"the same; allowed: fraction or below, or merge.method {allowed}",
            key="routing.escalate.target",
        )
    if (why := spec.rules.not_escalated) is not None:
        allowed = methods_that(lambda each: each.not_escalated is None, spec.kind)
        raise JobError(
            f"merge.method {spec.method!r} does not say how sure an answer is: {why}; "
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


def _lowest_lots(results: pa.Table, sample: Sample) -> Partial:
    lots = (sample.lot(record_id) for record_id in results["record_id"].to_pylist())
    return {"size": sample.size, "lots": heapq.nsmallest(sample.size, lots)}


def _lowest_of_all(partials: Sequence[Partial]) -> Partial:
    size = max((partial["size"] for partial in partials), default=0)
    lots = chain.from_iterable(partial["lots"] for partial in partials)
    return {"size": size, "lots": heapq.nsmallest(size, lots)}


SAMPLE = Reduction("sample", _lowest_lots, _lowest_of_all, _as_is)
"""The lots of the records in the sample, ascending, from (results, sample)."""


def _compare(results: pa.Table, theirs: Mapping[str, str | None]) -> Partial:
    """Compare merged answers with the agent's; both in the form in which equal ones are equal.

    Args:
        results: `record_id`, `confidence`, and `key`, the merged answer in that form.
        theirs: record → the agent's answer in that form; None: it has none.
    """
    places = []
    columns = (results[name].to_pylist() for name in ("record_id", "confidence", "key"))
    for record_id, confidence, key in zip(*columns, strict=True):
        if record_id in theirs and theirs[record_id] != key:
            places.append([_bin(confidence), _lot(record_id)])
    return {"labels": len(theirs), "disagreeing": places}


def _join(partials: Sequence[Partial]) -> Partial:
    both = add_up([{"labels": partial["labels"]} for partial in partials])
    places = chain.from_iterable(partial["disagreeing"] for partial in partials)
    return {"labels": both.get("labels", 0), "disagreeing": sorted(places)}


LABELS = Reduction("labels", _compare, _join, _as_is)
"""How many records of the sample the agent was asked about, and the places of those on which its
answer is another."""


def picked(
    escalation: Escalation, records: pa.Table, results: pa.Table, failures: pa.Table
) -> pa.Table:
    """Return the rows of `records` that the agent is asked about, in their order."""
    bins = dict.fromkeys(failures["record_id"].to_pylist(), _UNANSWERED)
    columns = (results[name].to_pylist() for name in ("record_id", "confidence"))
    bins.update((record_id, _bin(value)) for record_id, value in zip(*columns, strict=True))
    usable = records.filter(pc.is_null(records["reason"]))
    mask = [
        escalation.picks(record_id, bins[record_id])
        for record_id in usable["record_id"].to_pylist()
    ]
    return usable.filter(pa.array(mask, pa.bool_()))


def _bin(confidence: float | None) -> int:
    # Nothing is known of how sure a single answer is: it comes before all others.
    # Rounded, not floored: 0.29 must not fall below 0.29 for its binary digits.
    return 0 if confidence is None else round(confidence * NUM_BINS)


def _lot(record_id: str, seed: str = "") -> float:
    """Return a number in [0, 1) that only the id and the seed decide."""
    digest = hashlib.blake2b(record_id.encode(), digest_size=8, key=_key(seed)).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@lru_cache(maxsize=64)
def _key(seed: str) -> bytes:
    return hashlib.blake2b(seed.encode(), digest_size=16).digest() if seed else b""
