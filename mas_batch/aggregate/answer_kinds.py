"""Kinds of answer: how one is published, when two are one, and by what it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mas_batch import registries
from mas_batch.aggregate.normalise import nfc, normalise_text
from mas_batch.errors import RunError
from mas_batch.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKind:
    """What a task's answers are. A merge travels with the name, not with the value."""

    column: str
    """Of the answers table: `text`, `label` or `value`."""
    shown: Callable[[Any], str]
    """What the column holds, in the form that is published; raises ValueError where that is
    no answer."""
    normalise: Callable[[str], str]
    """Published forms that this makes equal are one answer to most merges."""
    exact: Callable[[str], str]
    """The same for merges that choose or compare words (`Method.exact`)."""
    right_or_wrong: bool
    """Whether an answer is right if, and only if, it equals the reference."""
    metrics: str
    """`module:function` of `evaluation.metrics.Judge`: how good answers are."""
    agreement: str
    """`module:function` of `evaluation.agreement.PairFacts`: how alike two agents' answers are."""

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """Return the answer of a row of the answers table in the form that is published.

        Raises:
            RunError: there is none, or it is not allowed, and no reason why.
        """
        answer = row[self.column]
        try:
            if answer is not None:
                return self.shown(answer)
        except ValueError:
            pass
        raise RunError(
            f"answers: record {row['record_id']!r}, agent {row['agent_id']!r}: {self.column} is "
            f"{answer!r} and reason is empty; allowed: a {self.column}, or a reason for none"
        )

    def number_of(self, shown: str) -> float | None:
        """Return the number that a published answer is; None for other kinds."""
        return float(shown) if self.column == "value" else None


ANSWER_KINDS: Registry[AnswerKind] = registries.ANSWER_KINDS


def _finite(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(value)
    return repr(value + 0.0)  # no negative zero


TEXT = AnswerKind(
    column="text",
    shown=str,
    normalise=normalise_text,
    exact=nfc,
    right_or_wrong=False,
    metrics="mas_batch.evaluation.metrics:text_metrics",
    agreement="mas_batch.evaluation.agreement:text_agreement",
)
LABEL = AnswerKind(
    column="label",
    shown=str,
    normalise=str,
    exact=str,
    right_or_wrong=True,
    metrics="mas_batch.evaluation.metrics:label_metrics",
    agreement="mas_batch.evaluation.agreement:label_agreement",
)
VALUE = AnswerKind(
    column="value",
    shown=_finite,
    normalise=str,
    exact=str,
    right_or_wrong=False,
    metrics="mas_batch.evaluation.metrics:value_metrics",
    agreement="mas_batch.evaluation.agreement:value_agreement",
)
