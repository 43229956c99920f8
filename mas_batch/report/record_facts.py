"""What a report says of single records, as plain values; texts are clipped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CandidateFacts:
    """A distinct answer to one record, and who backs it."""

    answer: str
    backers: tuple[str, ...]
    num_more_backers: int


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """A record worth a look; texts are clipped."""

    record_id: str
    text: str | None
    """None: the run keeps no texts, or the record has no result."""
    reference: str | None
    answer: str | None
    confidence: float | None
    confidence_kind: str | None
    tie: bool
    candidates: tuple[CandidateFacts, ...]
    num_more_candidates: int


@dataclass(frozen=True, slots=True)
class FailureExample:
    """One record without an answer."""

    record_id: str
    agent_id: str | None
    message: str


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Records without an answer, for one reason."""

    reason: str
    count: int
    examples: tuple[FailureExample, ...]


@dataclass(frozen=True, slots=True)
class FailedAnswers:
    """Answers of one agent that came to nothing, for one reason; others may have answered."""

    agent_id: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Scope:
    """How much of the run was read for what needs every answer."""

    stride: int
    """One partition of so many; 1: all of them."""
    num_records: int
    """Records in the partitions that were read."""
