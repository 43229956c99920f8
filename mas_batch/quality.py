"""How good agents and merges are, as values: what an evaluation finds and a report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, TypeAlias

from mas_batch.run_folder.names import EVALUATION
from mas_batch.run_folder.read import Run


class Kind(StrEnum):
    """What a system is."""

    AGENT = "agent"
    RANDOM = "random"
    """Any one of a record's answers: the mean over them."""
    RUN = "run"
    """The answers that the run published."""
    MERGE = "merge"
    """The stored answers, merged in another way."""
    ORACLE = "oracle"
    """The best answer that any agent gave to each record: no choice among them can do better."""


Key: TypeAlias = tuple[Kind, str]
"""A system's kind and name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A system minus the best single agent, on the records that both were asked about."""

    value: float
    low: float
    high: float
    """95 % interval."""
    p: float
    """Two-sided, of no difference."""


@dataclass(frozen=True, slots=True)
class MetricScore:
    """One metric of one system."""

    metric: str
    value: float | None
    """None where the metric is not defined, as a correlation with a constant is not."""
    low: float | None = None
    high: float | None = None
    """95 % interval; None for metrics that are not made of sums."""
    difference: Difference | None = None
    """None for the best single agent itself, for a system that was never asked about the same
    record as that, and where there is no interval."""


@dataclass(frozen=True, slots=True)
class Quality:
    """All scores of one system."""

    kind: Kind
    name: str
    num_records: int
    """Records it was asked about."""
    num_missing: int
    """Answers of those that are missing and count as wrong."""
    scores: tuple[MetricScore, ...]
    """The first metric decides who is best."""

    @property
    def key(self) -> Key:
        """Return what tells it from all others."""
        return (self.kind, self.name)

    def score(self, metric: str) -> MetricScore:
        """Return its score by a metric."""
        return next(score for score in self.scores if score.metric == metric)


@dataclass(frozen=True, slots=True)
class Bin:
    """Records of like confidence in a reliability diagram."""

    low: float
    """Not in the bin, but for 0."""
    high: float
    """In the bin."""
    num_records: int
    mean_confidence: float
    mean_correct: float


@dataclass(frozen=True, slots=True)
class KeptEvaluation:
    """What the last `mas-batch evaluate` has left in a run."""

    qualities: tuple[Quality, ...]
    bins: tuple[Bin, ...]
    """Reliability diagram of the run's own merge."""
    calibration_error: float | None
    """Of the run's own merge."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Name the metrics; the first decides who is best."""
        return tuple(score.metric for score in self.qualities[0].scores)

    @property
    def num_records(self) -> int:
        """How many records are judged."""
        return max(quality.num_records for quality in self.qualities)


def read_evaluation(run: Run) -> KeptEvaluation | None:
    """Read what `evaluation.write` has left in the run's folder; None: it was not evaluated.

    Raises:
        RunError: a file cannot be read.
    """
    name = f"{EVALUATION}/quality.parquet"
    rows = run.store.read_table(name).to_pylist() if run.store.exists(name) else []
    if not rows:
        return None
    systems = groupby(rows, key=lambda row: (row["kind"], row["name"]))
    own = _own_confidence(run)
    return KeptEvaluation(
        qualities=tuple(_quality(list(of_system)) for _, of_system in systems),
        bins=tuple(Bin(**each) for each in own.get("bins", [])),
        calibration_error=own.get("error"),
    )


def _quality(rows: Sequence[Mapping[str, Any]]) -> Quality:
    first = rows[0]
    return Quality(
        Kind(first["kind"]),
        first["name"],
        first["num_records"],
        first["num_missing"],
        tuple(map(_score, rows)),
    )


def _score(row: Mapping[str, Any]) -> MetricScore:
    names = ("difference", "difference_low", "difference_high", "p")
    difference = None if row["difference"] is None else Difference(*(row[name] for name in names))
    return MetricScore(row["metric"], row["value"], row["low"], row["high"], difference)


def _own_confidence(run: Run) -> dict[str, Any]:
    if not run.store.exists(f"{EVALUATION}/calibration.json"):
        return {}
    judged = json.loads(run.store.read_json(f"{EVALUATION}/calibration.json"))
    return next((each for each in judged if each["kind"] == Kind.RUN), {})
