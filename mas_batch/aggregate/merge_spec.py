"""How the answers to a record become one, as values that go together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mas_batch.aggregate.mbr import UTILITIES
from mas_batch.aggregate.reliability import Reliability
from mas_batch.errors import JobError

# method: the kinds of answer that it can merge
_METHODS = {
    "vote": ("text", "label", "value"),
    "weighted": ("text", "label", "value"),
    "reliability": ("text", "label"),
    "best": ("text", "label", "value"),
    "mean": ("value",),
    "mbr": ("text",),
    "rover": ("text",),
}
_WEIGHTS = (None, "log-odds", "linear", "learned")

EMBEDDING = "embedding"
"""The utility that needs a model: cosines of sentence vectors."""


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the answers to a record become one.

    Raises:
        JobError: the method, utility, weights and kind of answer do not go together.
    """

    method: str
    """`vote`, `weighted`, `reliability`, `mean`, `mbr`, `rover` or `best`."""
    utility: str | None
    """Of `mbr`: one of `UTILITIES` or `embedding`; ignored by the other methods."""
    accuracies: Mapping[str, float]
    """Agent → how often it is right. `weighted` needs every agent's; in `mbr`, `rover` and `mean`
    an agent without one weighs 1; `best` prefers the highest."""
    weights: str | None
    """Of `weighted`: `linear`, else log-odds. Of `mbr`: `learned`, and then `learned_from` puts
    what the corpus says in the place of the accuracies."""
    abstain_below: float
    """Lower confidences are marked; does not apply to `mean`, whose is a standard error."""
    answer_kind: str
    """Which column answers are compared by: `text`, `label` or `value`."""
    num_labels: int | None
    """Size of the closed set that the answers come from; None for an open one."""
    labels: tuple[str, ...] | None = None
    """That set, for `reliability`."""
    agents: tuple[str, ...] = ()
    """All that may have answered, in the job's order: `best` prefers the first, all else equal."""
    encoder: str | None = None
    """Source of the sentence-embedding model of `utility: embedding`."""
    covers_text: bool = False
    """Whether answers are to say what the text says: of a text that was read in parts their
    coverage is counted."""
    reliability: Reliability | None = None
    """What `reliability` has learned from the whole corpus; the method cannot do without."""

    def __post_init__(self) -> None:
        _check_word("merge.method", self.method, _METHODS)
        _check_word("merge.weights", self.weights, _WEIGHTS)
        _check_word("task's answer_kind", self.answer_kind, _METHODS["vote"])
        kinds = _METHODS[self.method]
        if self.answer_kind not in kinds:
            raise JobError(
                f"{self.method!r} merges answers of kind {', '.join(kinds)}; "
                f"this task's are of kind {self.answer_kind!r}",
                key="merge.method",
            )
        if self.method == "mbr":
            _check_word("merge.utility", self.utility, (*UTILITIES, EMBEDDING))
        if self.weights == "learned" and self.method != "mbr":
            raise JobError(
                f"{self.method!r} does not learn weights; allowed: with merge.method mbr. "
                "Of labels and short answers, merge.method reliability learns",
                key="merge.weights",
            )
        if self.num_labels is not None and self.num_labels < 2:
            raise JobError(f"at least two, got {self.num_labels}", key="task.labels")

    @property
    def default_weight(self) -> float:
        """Of an agent without an accuracy; where weights are learned, that of an average one."""
        if self.weights != "learned" or not self.accuracies:
            return 1.0
        return math.fsum(self.accuracies.values()) / len(self.accuracies)

    @property
    def needs_corpus(self) -> bool:
        """Whether the merge of one record needs statistics of all."""
        return self.method == "reliability" or self.weights == "learned"

    @property
    def first_pass(self) -> MergeSpec:
        """How to merge while the corpus is not complete."""
        if self.method == "reliability":
            return replace(self, method="vote")
        return replace(self, weights=None) if self.weights == "learned" else self


def _check_word(key: str, word: str | None, allowed: Collection[str | None]) -> None:
    if word not in allowed:
        raise JobError(f"{word!r} is not allowed; allowed: {', '.join(map(str, allowed))}", key=key)
