"""A merge as a value: what it needs, what it can do, and how it makes one answer of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mas_batch import registries
from mas_batch.aggregate.reductions import Partial, Reduction
from mas_batch.registry import Registry

if TYPE_CHECKING:  # they import this module
    from mas_batch.aggregate.merge_spec import MergeSpec
    from mas_batch.aggregate.reliability import History
    from mas_batch.aggregate.vote import Ballot, Verdict

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
    uses_utility: bool = False
    """Whether it compares texts by `merge.utility`."""
    weights: Mapping[str | None, Learning | None] = field(default_factory=lambda: {None: None})
    """What `merge.weights` may be, None always → what is then learned from the whole corpus."""

    @property
    def keeps_history(self) -> bool:
        """Whether `merge.history` keeps what it has learned."""
        return any(each is not None and each.keeps_history for each in self.weights.values())


METHODS: Registry[Method] = registries.METHODS

EVERY_COLUMN = ("text", "label", "value")


def methods_that(holds: Callable[[Method], bool]) -> str:
    """Name the methods of which something is true, for an error message."""
    return ", ".join(name for name, method in METHODS.items() if holds(method))
