"""Adaptive number of answers: which records of a partition need one more agent.

Asked after every round, with the answers that are committed so far. The outcome depends on
which answers there are and on nothing else, so every worker that looks sees the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.ballots import Ballot, Candidate
from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.method import Encode, MergeSpec, Method, Stopping, methods_that
from mas_batch.aggregate.verdicts import ballots_of, verdict_of
from mas_batch.by_name import pickled_by_name
from mas_batch.errors import JobError

# Weights are rounded to 1e-9: one agent of accuracy .9 must count as 90 % sure.
_ROUNDING = 1e-8


@pickled_by_name
@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When the answers to a record are enough.

    Raises:
        JobError: a value is out of its range.
    """

    confidence: float | None
    """A record is decided when its merged answer is so sure, in (0, 1]; None: when no further
    answer can change it, which only some methods can tell (`Stopping.by_lead`)."""
    max_answers: int
    """Answers per record that may come in the end, counting all samples of an agent."""

    def __post_init__(self) -> None:
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise JobError(
                f"{self.confidence} is not allowed; allowed: above 0, at most 1",
                key="routing.adaptive.confidence",
            )
        if self.max_answers < 1:
            raise JobError(
                f"{self.max_answers} is not allowed; allowed: 1 or more",
                key="routing.answers_per_record",
            )


def check_rule(spec: MergeSpec, rule: StoppingRule) -> Stopping:
    """Return how the merge method follows the rule.

    Raises:
        JobError: it cannot, or not without a confidence.
    """
    stopping = spec.rules.stopping
    if isinstance(stopping, str):
        allowed = methods_that(lambda method: isinstance(method.stopping, Stopping), spec.kind)
        raise JobError(
            f"{spec.method!r} cannot stop early: {stopping}; allowed with merge.method: {allowed}",
            key="routing.adaptive",
        )
    if rule.confidence is None and not stopping.by_lead:
        certain = methods_that(_leads, spec.kind)
        raise JobError(
            f"{spec.method!r} needs one, above 0 and at most 1: which answers could still change "
            f"the winner is known for merge.method {certain!r} only",
            key="routing.adaptive.confidence",
        )
    return stopping


def _leads(method: Method) -> bool:
    return isinstance(method.stopping, Stopping) and method.stopping.by_lead


def undecided(
    records: pa.Table,
    answers: pa.Table,
    spec: MergeSpec,
    rule: StoppingRule,
    encode: Encode | None = None,
) -> list[str]:
    """Return the ids of the usable records, in their order, that need another answer.

    A record is decided when as many answers as may come are there, failed ones included: a
    failed answer says nothing, but its agent is not asked again. Before that:

    - Without a confidence: the winner leads by more answers than may still come. It then wins
      whatever they are; among spellings that agree, the most frequent one may still change.
    - With a confidence: the winner has at least that share of the answers (`vote`), of the
      weights (`weighted` by `linear`), that expected utility (`mbr`), that posterior probability
      (`weighted` by `log-odds`), or that mean probability (`mean` of labels). All but the last two
      need two answers, since any answer agrees with itself, as does `mean` where the answer comes
      without probabilities; all but `mbr`, where two answers always tie, need that there is no tie.

    Args:
        records: columns `record_id` and `reason`; a record with a reason is not usable.
        answers: `ANSWERS` rows for these records, in any order, repeated or not.
        encode: as `merge_answers` takes it.

    Raises:
        JobError: the rule does not go with the method; `weighted` lacks an agent's accuracy.
        RunError: the tables contradict each other or their contract.
    """
    check_rule(spec, rule)
    replies = replies_by_record(records, answers)
    usable = records.filter(pc.is_null(records["reason"]))["record_id"].to_pylist()
    return [r for r in usable if not is_decided(replies[r], spec, rule, encode)]


def is_decided(
    rows: Sequence[Mapping[str, Any]], spec: MergeSpec, rule: StoppingRule, encode: Encode | None
) -> bool:
    """Tell whether a record with these rows of `ANSWERS` needs no further one; see `undecided`."""
    num_open = rule.max_answers - len(rows)
    if num_open <= 0:
        return True
    ballots = ballots_of(rows, spec)
    if not ballots:
        return False
    if rule.confidence is None:
        # Not ">=": were the runner-up to draw level, the tie rule might prefer it.
        return _lead(verdict_of(ballots, spec).support) > num_open
    return _is_sure(ballots, spec, check_rule(spec, rule), rule.confidence, encode)


def _lead(support: Sequence[Candidate]) -> int:
    """Answers by which the best is ahead; an answer that no agent has given yet has 0."""
    counts = [len(candidate.backers) for candidate in support[:2]]
    return counts[0] - sum(counts[1:])


def _is_sure(
    ballots: Sequence[Ballot],
    spec: MergeSpec,
    stopping: Stopping,
    confidence: float,
    encode: Encode | None,
) -> bool:
    if len(ballots) < 2 and not stopping.trusts_one(spec):
        return False
    verdict = verdict_of(ballots, spec, encode)
    if verdict.tie and not stopping.allows_ties:
        return False
    reached = verdict.confidence
    return reached is not None and reached >= confidence - _ROUNDING
