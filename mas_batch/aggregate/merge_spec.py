"""How the answers to a record become one, as values that go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mas_batch.aggregate.answer_kinds import ANSWER_KINDS, AnswerKind
from mas_batch.aggregate.method import METHODS, Learning, Method, methods_that
from mas_batch.aggregate.reliability import Reliability
from mas_batch.aggregate.utilities import EMBEDDING, UTILITIES
from mas_batch.aggregate.vote import Ballot
from mas_batch.errors import JobError


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the answers to a record become one.

    Raises:
        JobError: the method, utility, weights and kind of answer do not go together.
    """

    method: str
    """One of `METHODS`: the name travels, and the `Method` is looked up where it is used."""
    utility: str | None
    """Of `mbr`: one of `UTILITIES` or `EMBEDDING`; ignored by methods that use none."""
    accuracies: Mapping[str, float]
    """Agent → how often it is right. `weighted` needs every agent's; in `mbr`, `rover` and `mean`
    an agent without one weighs 1; `best` prefers the highest."""
    weights: str | None
    """One of the method's `weights`; what only weighs in other methods counts as None."""
    abstain_below: float
    """Lower confidences are marked; does not apply to a standard error."""
    answer_kind: str
    """One of `ANSWER_KINDS`, by name."""
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
        rules, kind = self.rules, self.kind
        if kind.column not in rules.columns:
            raise JobError(
                f"{self.method!r} merges answers of kind {', '.join(rules.columns)}; "
                f"this task's are of kind {self.answer_kind!r}",
                key="merge.method",
            )
        if self.weights not in rules.weights:
            self._check_weights_of_others()
        if rules.uses_utility and self.utility not in (allowed := (*UTILITIES, EMBEDDING)):
            raise JobError(
                f"{self.utility!r} is not allowed; allowed: {', '.join(allowed)}",
                key="merge.utility",
            )
        if self.num_labels is not None and self.num_labels < 2:
            raise JobError(f"at least two, got {self.num_labels}", key="task.labels")

    def _check_weights_of_others(self) -> None:
        """Pass over what weighs in other methods; but refuse what learns, since that is missed."""
        learns = {word: each for m in METHODS.values() for word, each in m.weights.items()}
        if self.weights not in learns:
            raise JobError(
                f"{self.weights!r} is not allowed; allowed: {', '.join(map(str, learns))}",
                key="merge.weights",
            )
        if learns[self.weights] is not None:
            takers = methods_that(lambda method: self.weights in method.weights)
            raise JobError(
                f"{self.method!r} does not learn weights; allowed: with merge.method {takers}",
                key="merge.weights",
            )

    @property
    def rules(self) -> Method:
        """What the method needs and can do."""
        return METHODS[self.method]

    @property
    def kind(self) -> AnswerKind:
        """What is known of answers of this kind."""
        return ANSWER_KINDS[self.answer_kind]

    @property
    def learning(self) -> Learning | None:
        """What must be learned from all records before one is merged."""
        weights = self.rules.weights
        return weights.get(self.weights, weights[None])

    @property
    def first_pass(self) -> MergeSpec:
        """How to merge while the corpus is not complete."""
        return self if self.learning is None else self.learning.first_pass(self)

    @property
    def needs_encoder(self) -> bool:
        """Whether texts are compared by their vectors."""
        return self.rules.uses_utility and self.utility == EMBEDDING

    def weights_of(self, ballots: Sequence[Ballot]) -> list[float]:
        """Return each agent's accuracy, 1 where none is known.

        Where the accuracies are learned weights, an agent without one weighs what an average
        one does.
        """
        default = 1.0
        if self.learning is not None and self.accuracies:
            default = math.fsum(self.accuracies.values()) / len(self.accuracies)
        return [self.accuracies.get(ballot.agent_id, default) for ballot in ballots]
