"""What is compared: who answered which record with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mas_batch.aggregate.normalise import normalise_text
from mas_batch.quality import Key, Kind

Matrix: TypeAlias = npt.NDArray[np.float64]
Vector: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """One way of answering the records. Several answers to a record count as their mean."""

    kind: Kind
    name: str
    """Unique among the systems of its kind."""
    records: Indices
    """Position of the record, ascending; one entry per answer."""
    candidates: Indices
    """Which of the candidates the answer is; same shape."""
    num_records: int
    """Of the evaluation; those that are not in `records` were never asked of this system."""

    @property
    def key(self) -> Key:
        """Return what tells it from all others."""
        return (self.kind, self.name)

    @property
    def weights(self) -> Vector:
        """Return 1 / (the record's number of answers), one per answer."""
        return np.asarray(1.0 / np.bincount(self.records, minlength=1)[self.records])

    @property
    def covered(self) -> Mask:
        """Return which records it was asked about; shape [records]."""
        return np.bincount(self.records, minlength=self.num_records).astype(np.bool_)

    @property
    def first_answers(self) -> Indices:
        """Return the candidate of its first answer to each record, -1 if not asked; [records]."""
        first = np.full(self.num_records, -1, np.int64)
        first[self.records[::-1]] = self.candidates[::-1]  # of several writes the last stays
        return first

    def within(self, records: Mask) -> System:
        """Return the system on these records only: itself, if it was asked about no others."""
        kept = records[self.records]
        if kept.all():
            return self
        return replace(self, records=self.records[kept], candidates=self.candidates[kept])

    def per_record(self, statistics: Matrix) -> Matrix:
        """Average statistics of candidates [candidates, K] per record; others get 0.

        Shape [records, K].
        """
        result = np.zeros((self.num_records, statistics.shape[1]))
        starts = np.flatnonzero(np.diff(self.records, prepend=-1))
        weighted = statistics[self.candidates] * self.weights[:, None]
        result[self.records[starts]] = np.add.reduceat(weighted, starts, axis=0)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Confidences:
    """How far a merge trusts its answers."""

    kind: str
    """As in the results' `confidence_kind`."""
    values: Vector
    """Shape [records]; NaN where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All answers to the records that have a reference, each distinct one once per record."""

    references: Sequence[str]
    """Shape [records]."""
    answers: Sequence[str | None]
    """Shape [candidates]; None is a missing answer."""
    record_of: Indices
    """Candidate → its record."""
    systems: Sequence[System]
    """Agents, the random agent, the run, then other merges."""
    confidences: Mapping[Key, Confidences]
    skipped: Mapping[str, str]
    """Merge method → why it is not among the systems."""
    num_without_reference: int
    num_unusable: int
    """Records that no agent was asked about, because they had no usable text."""

    @property
    def num_records(self) -> int:
        """How many records are evaluated."""
        return len(self.references)

    def of(self, kind: Kind) -> list[System]:
        """Return the systems of a kind."""
        return [system for system in self.systems if system.kind is kind]


@dataclass(slots=True)
class EvidenceBuilder:
    """Collects records and their answers, one record after the other."""

    references: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    record_of: list[int] = field(default_factory=list)
    _pairs: dict[Key, tuple[list[int], list[int]]] = field(default_factory=dict)
    _current: dict[str | None, int] = field(default_factory=dict)

    def start_record(self, reference: str) -> None:
        """Begin the next record; what is added from now on answers it."""
        self.references.append(reference)
        self._current = {}

    def add(self, kind: Kind, name: str, answers: Iterable[str | None]) -> None:
        """Note a system's answers to the current record; none at all: it was not asked."""
        records, candidates = self._pairs.setdefault((kind, name), ([], []))
        for answer in answers:
            records.append(len(self.references) - 1)
            candidates.append(self._candidate(answer))

    def discard(self, kind: Kind, name: str) -> None:
        """Forget a system that turned out not to be able to answer."""
        self._pairs.pop((kind, name), None)

    def systems(self) -> list[System]:
        """Return all systems that were asked anything, in the order in which they came."""
        return [
            System(kind, name, _indices(records), _indices(candidates), len(self.references))
            for (kind, name), (records, candidates) in self._pairs.items()
            if records
        ]

    def _candidate(self, answer: str | None) -> int:
        if answer not in self._current:
            self._current[answer] = len(self.answers)
            self.answers.append(answer)
            self.record_of.append(len(self.references) - 1)
        return self._current[answer]


def number_texts(texts: Sequence[str]) -> tuple[list[str], Indices]:
    """Number texts that are equal in normalised form: (the distinct ones, the number of each)."""
    normalised = np.array([normalise_text(text) for text in texts], dtype=object)
    names, numbers = np.unique(normalised, return_inverse=True)
    return names.tolist(), numbers.astype(np.int64)


def oracle(evidence: Evidence, losses: Vector) -> System:
    """Choose for each record the agents' answer of least loss (of equals the first given).

    Args:
        losses: of the candidates; shape [candidates].
    """
    (pool,) = evidence.of(Kind.RANDOM)
    order = np.lexsort((pool.candidates, losses[pool.candidates], pool.records))
    records, first = np.unique(pool.records[order], return_index=True)
    best = pool.candidates[order][first]
    return System(Kind.ORACLE, "oracle", records, best, evidence.num_records)


def _indices(values: Sequence[int]) -> Indices:
    return np.asarray(values, dtype=np.int64)
