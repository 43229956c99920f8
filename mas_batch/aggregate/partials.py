"""What merges learn from the whole corpus: what a partition contributes, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mas_batch.aggregate.consensus import SUPPORT, loo_partial
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.method import Encode, Learning, Lesson, MergeSpec
from mas_batch.aggregate.normalise import deduplicate
from mas_batch.aggregate.patterns import add_patterns, count_answers
from mas_batch.aggregate.reductions import Partial, Reduction
from mas_batch.aggregate.reliability import History, Reliability
from mas_batch.aggregate.utilities import EMBEDDING, UTILITIES, Utility, embedding_utility
from mas_batch.aggregate.verdicts import ballots_of, key_of
from mas_batch.errors import RunError

PATTERNS = Reduction("patterns", count_answers, add_patterns, dict)
"""Pattern of agreement → records; see `aggregate.patterns`."""


def utility_of(spec: MergeSpec, encode: Encode | None) -> Utility:
    """Return the utility that the merge compares texts by.

    Raises:
        RunError: it needs an encoder, and none is given.
    """
    if spec.utility != EMBEDDING:
        return UTILITIES[spec.utility or ""]
    if encode is None:
        raise RunError("utility `embedding` needs the vectors of an encoder")
    return embedding_utility(encode)


def pattern_partial(
    answers: pa.Table, spec: MergeSpec, agents: Sequence[str], encode: Encode | None = None
) -> Partial:
    """Count who agreed with whom, for `reliability`; see `aggregate.patterns`."""
    kind, key = spec.kind, key_of(spec)

    def key_of_cell(cell: Any) -> str:
        return key(kind.shown(cell))

    return count_answers(deduplicate(answers), agents, spec.labels, kind.column, key_of_cell)


def support_partial(
    answers: pa.Table, spec: MergeSpec, agents: Sequence[str], encode: Encode | None = None
) -> Partial:
    """Add up how well the others' answers support each agent's, for learned weights of `mbr`.

    Args:
        encode: as `merge_answers` takes it.
    """
    utility = utility_of(spec, encode)
    answered = answers.group_by("record_id").aggregate([])
    replies = replies_by_record(answered, answers).values()
    return SUPPORT.combine([loo_partial(ballots_of(rows, spec), utility) for rows in replies])


def _find_reliability(
    patterns: Mapping[str, int],
    spec: MergeSpec,
    agents: Sequence[str],
    families: Mapping[str, str],
    prior: History | None,
) -> str:
    return learn(patterns, agents, families, spec.labels, prior).to_json()


def _read_reliability(spec: MergeSpec, text: str) -> Lesson:
    found = Reliability.from_json(text)
    taught = replace(spec, reliability=found)
    return Lesson(taught, frozenset(found.agents), found.accuracies, found.why)


def _find_weights(sums: Partial, *_: object) -> str:
    return json.dumps(SUPPORT.finalize(sums), indent=1)


def _read_weights(spec: MergeSpec, text: str) -> Lesson:
    weights = json.loads(text)
    why = f"weights by how well the others' answers support an agent's ({spec.utility})"
    return Lesson(replace(spec, accuracies=weights), frozenset(weights), dict(weights), why)


RELIABILITY_LEARNING = Learning(
    count=pattern_partial,
    reduction=PATTERNS,
    find=_find_reliability,
    read=_read_reliability,
    first_pass=lambda spec: replace(spec, method="vote"),
    keeps_history=True,
)
"""Of `reliability`: how often each agent is right, by who agrees with whom."""

SUPPORT_LEARNING = Learning(
    count=support_partial,
    reduction=SUPPORT,
    find=_find_weights,
    read=_read_weights,
    first_pass=lambda spec: replace(spec, weights=None),
)
"""Of `mbr` with `weights: learned`: weights of agents, in the place of their accuracies."""
