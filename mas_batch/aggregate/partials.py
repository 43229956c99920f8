"""What one partition contributes to what a merge learns from the whole corpus."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from mas_batch.aggregate.consensus import SUPPORT, loo_partial
from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.merge_spec import MergeSpec
from mas_batch.aggregate.normalise import deduplicate
from mas_batch.aggregate.patterns import count_answers
from mas_batch.aggregate.reductions import Partial
from mas_batch.aggregate.verdicts import Encode, ballots_of, key_of, utility_of


def pattern_partial(answers: pa.Table, spec: MergeSpec, agents: Sequence[str]) -> Partial:
    """Count who agreed with whom, for `reliability`; see `aggregate.patterns`."""
    distinct = deduplicate(answers)
    return count_answers(distinct, agents, spec.labels, spec.answer_kind, key_of(spec))


def support_partial(
    records: pa.Table, answers: pa.Table, spec: MergeSpec, encode: Encode | None = None
) -> Partial:
    """Add up how well the others' answers support each agent's, for learned weights of `mbr`.

    Args:
        records: column `record_id`.
        encode: as `merge_answers` takes it.
    """
    utility = utility_of(spec, encode)
    replies = replies_by_record(records, answers).values()
    return SUPPORT.combine([loo_partial(ballots_of(rows, spec), utility) for rows in replies])
