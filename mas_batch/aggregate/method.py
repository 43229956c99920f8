"""A merge as values: what a method needs and can do, and how a job merges by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mas_batch import registries
from mas_batch.aggregate.answer_kinds import ANSWER_KINDS, AnswerKind
from mas_batch.aggregate.ballots import Ballot, Verdict, log_odds
from mas_batch.aggregate.calibration import Calibrated
from mas_batch.aggregate.reductions import Partial, Reduction
from mas_batch.aggregate.reliability import History, Reliability
from mas_batch.aggregate.utilities import EMBEDDING, UTILITIES
from mas_batch.by_name import pickled_by_name
from mas_batch.errors import JobError
from mas_batch.registry import Registry

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Texts → vectors [N, d] of length 1."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the merges of one partition's records share."""

    encode: Encode | None = None
    """Where the job has a `merge.encoder`."""
    known: MutableMapping[str, Any] = field(default_factory=dict)
    """The method's own: what it found for one record and may use again for others."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """How a merge tells that a record needs no further answer: by the winner's confidence."""

    by_lead: bool = False
    """Also without a wanted confidence, since every answer counts 1: the winner is certain when
    it leads by more answers than may still come."""
    trusts_one: Callable[[MergeSpec], bool] = lambda spec: False
    """Whether the confidence of a single answer says how sure it is; most are then 1, since any
    answer agrees with itself."""
    allows_ties: bool = False
    """Whether a tie can be sure enough."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A merge that has learned from all answers."""

    spec: MergeSpec
    agents: frozenset[str]
    """Of whom something is known."""
    accuracies: Mapping[str, float]
    """For people: agent → what was learned, as far as something was."""
    why: str
    """For people: by what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """What a merge learns from all answers of a corpus before it merges one record."""

    count: Callable[[pa.Table, MergeSpec, Sequence[str], Encode | None], Partial]
    """(`ANSWERS` rows of one partition, the merge, whose answers, encode) → the partial."""
    reduction: Reduction
    """Combines partials."""
    find: Callable[[Any, MergeSpec, Sequence[str], Mapping[str, str], History | None], str]
    """(Combined partial, the merge, agents, agent → family, what earlier runs have learned) →
    what was learned, as it is written down."""
    read: Callable[[MergeSpec, str], Lesson]
    """(The merge, what was written down) → the merge that knows it; raises ValueError."""
    first_pass: Callable[[MergeSpec], MergeSpec]
    """How to merge while the corpus is not complete."""
    keeps_history: bool = False
    """Whether `merge.history` keeps what was learned for the next run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What `merge.method` may name."""

    verdict: Callable[[Sequence[Ballot], MergeSpec, Shared], Verdict]
    """At least one ballot of one record → the merged answer; depends on these alone, and not on
    the ballots' order."""
    columns: tuple[str, ...]
    """Columns of the answers table that it merges: kinds of answer that are in others are
    refused."""
    exact: bool
    """Whether texts that differ in case, spacing or final punctuation are two answers."""
    confidence_kinds: tuple[str, ...]
    """What a verdict's `confidence_kind` may be."""
    stopping: Stopping | str
    """How an adaptive job can tell that a record needs no further answer; else why it cannot."""
    not_escalated: str | None
    """Why one cannot tell the least confident records by its confidence; None: one can."""
    needs_accuracies: bool = False
    """Whether every agent needs one."""
    calibrates: bool = False
    """Whether its confidence is of an answer that is right or wrong, so that labels can tell what
    it is worth."""
    of_labels: Method | None = None
    """What it is for labels, where that is something else."""
    uses_utility: bool = False
    """Whether it compares texts by `merge.utility`."""
    weights: Mapping[str | None, Learning | None] = field(default_factory=lambda: {None: None})
    """What `merge.weights` may be, None always → what is then learned from the whole corpus."""

    def of(self, kind: AnswerKind) -> Method:
        """Return what it is for such answers."""
        return self.of_labels or self if kind.column == "label" else self

    @property
    def keeps_history(self) -> bool:
        """Whether `merge.history` keeps what it has learned."""
        return any(each is not None and each.keeps_history for each in self.weights.values())


METHODS: Registry[Method] = registries.METHODS

EVERY_COLUMN = ("text", "label", "value")


def methods_that(holds: Callable[[Method], bool], kind: AnswerKind) -> str:
    """Name the methods of which something is true for such answers, for an error message."""
    named = ((name, method.of(kind)) for name, method in METHODS.items())
    return ", ".join(
        name for name, method in named if kind.column in method.columns and holds(method)
    )


@pickled_by_name
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
    """That set, in the order of the answers' `probs`: for `reliability`, and `mean` of labels."""
    agents: tuple[str, ...] = ()
    """All that may have answered, in the job's order: `best` prefers the first, all else equal."""
    encoder: str | None = None
    """Source of the sentence-embedding model of `utility: embedding`."""
    covers_text: bool = False
    """Whether answers are to say what the text says: of a text that was read in parts their
    coverage is counted."""
    chosen: str | None = None
    """Why `auto` has chosen the method; None: the job did."""
    last_word: str | None = None
    """The agent whose answer is published where it has one: of a cascade with a guarantee."""
    reliability: Reliability | None = None
    """What `reliability` has learned from the whole corpus; the method cannot do without."""
    calibrate: str | None = None
    """Where records with known answers are; None: confidences stay as the method gives them."""
    calibrated: Calibrated | None = None
    """What those records have taught; None until all are answered."""

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
        if self.calibrate is not None and not rules.calibrates:
            raise JobError(
                f"{self.method!r} has no confidence that an answer is right; allowed: with "
                f"merge.method {methods_that(lambda method: method.calibrates, kind)}",
                key="merge.calibrate",
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
            takers = methods_that(lambda method: self.weights in method.weights, self.kind)
            raise JobError(
                f"{self.method!r} does not learn weights; allowed: with merge.method {takers}",
                key="merge.weights",
            )

    @property
    def rules(self) -> Method:
        """What the method needs and can do."""
        return METHODS[self.method].of(self.kind)

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
    def needs_corpus(self) -> bool:
        """Whether records can be merged only when all are answered."""
        return self.learning is not None or self.calibrate is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for people: what is wrong with what was learned of the whole corpus."""
        learned = self.reliability.warnings if self.reliability is not None else ()
        if self.calibrated is None:
            return learned
        if self.calibrated.weights is not None and self.reliability is not None:
            # That the vote is published for want of something to learn from is no longer so.
            learned = () if self.reliability.method == "vote" else learned
        return learned + self.calibrated.warnings

    @property
    def log_odds(self) -> dict[str, float]:
        """Agent → log-odds of its being right, as far as they are known."""
        if self.reliability is not None:
            return self.reliability.weights
        num_wrong = max(1, (self.num_labels or 0) - 1)
        return {agent: log_odds(p, num_wrong) for agent, p in self.accuracies.items()}

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
