"""Read a run's records, answers and results, partition by partition, and merge them anew."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.verdicts import ballots_of, verdict_of
from mas_batch.errors import JobError, RunError
from mas_batch.evaluation.systems import Confidences, Evidence, EvidenceBuilder
from mas_batch.quality import Key, Kind
from mas_batch.records import join_answers
from mas_batch.run_folder.commits import read_results
from mas_batch.run_folder.names import partition_stem
from mas_batch.run_folder.plan import Plan, read_plan, read_records
from mas_batch.run_folder.read import Run

Published: TypeAlias = tuple[str, float | None, str]
"""An answer, its confidence and the confidence's kind."""

Reply: TypeAlias = dict[str, Any]
"""A row of the answers table."""

_PUBLISHED = ("record_id", "answer", "confidence", "confidence_kind")
_NOTHING: tuple[None, None, str] = (None, None, "")


@dataclass(frozen=True, slots=True)
class EvidenceRequest:
    """What to gather."""

    reference: str
    """Column of the corpus that holds the right answers."""
    own: MergeSpec
    """The run's merge."""
    others: Mapping[str, MergeSpec]
    """Method → how to merge the stored answers once more."""
    merges: Mapping[str, pa.Table]
    """Name → merged already: `record_id`, `answer`, `confidence` and `confidence_kind`."""
    alone: Mapping[str, tuple[str, MergeSpec]]
    """Name → an agent, and how to merge its own samples without the other agents' answers."""
    agents: tuple[str, ...]
    """In the job's order."""
    always_asked: frozenset[str]
    """Agents that were asked about every record: an answer of theirs that is not there failed."""


def gather(run: Run, request: EvidenceRequest) -> Evidence:
    """Gather all answers to the records that have a reference.

    Files are read one partition at a time; what is kept is one string per distinct answer to a
    record, and some integers per answer.

    Raises:
        RunError: there is no such column, no record has a reference, a file is missing.
    """
    plan = plan_of(run)
    gathering = _Gathering(request)
    for partition, answers in enumerate(answers_by_partition(run, plan)):
        records = read_records(run.store, partition, plan.passthrough)
        merged = read_results(run.store, partition)
        gathering.add_partition(records, answers, _published(merged.results))
    return gathering.evidence()


def plan_of(run: Run) -> Plan:
    """Return how the run's corpus was cut into partitions.

    Raises:
        RunError: the run's folder does not say.
    """
    plan = read_plan(run.store)
    if plan is None:
        raise RunError(f"{run.store.location('plan.parquet')} is missing; evaluation needs it")
    return plan


def answers_by_partition(run: Run, plan: Plan) -> Iterator[pa.Table]:
    """Yield the answers of one partition after the other."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in run.files("answers"):
        names[name.rsplit("/", 1)[-1]].append(name)
    for partition in range(plan.num_partitions):
        of_partition = names[f"{partition_stem(partition)}.parquet"]
        yield join_answers(run.store.read_table(name) for name in of_partition)


def _published(table: pa.Table) -> dict[str, Published]:
    ids, *rest = (table[name].to_pylist() for name in _PUBLISHED)
    return dict(zip(ids, zip(*rest, strict=True), strict=True))


@dataclass(slots=True)
class _Gathering:
    request: EvidenceRequest
    builder: EvidenceBuilder = field(default_factory=EvidenceBuilder)
    merges: dict[str, dict[str, Published]] = field(init=False)
    others: dict[str, MergeSpec] = field(init=False)
    confidences: dict[Key, list[float]] = field(default_factory=dict)
    confidence_kinds: dict[Key, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    num_without_reference: int = 0
    num_unusable: int = 0

    def __post_init__(self) -> None:
        self.others = dict(self.request.others)
        self.merges = {name: _published(t) for name, t in self.request.merges.items()}
        for name in self.merges:
            self.others.pop(name, None)  # it is there already

    def add_partition(
        self, records: pa.Table, answers: pa.Table, published: Mapping[str, Published]
    ) -> None:
        replies = replies_by_record(records, answers)
        references = _references(records, self.request.reference)
        columns = (records[name].to_pylist() for name in ("record_id", "reason"))
        for record_id, reason, reference in zip(*columns, references, strict=True):
            if reason is not None:
                self.num_unusable += 1
            elif reference is None:
                self.num_without_reference += 1
            else:
                self.builder.start_record(reference)
                self._add_agents(replies[record_id])
                self._add_merges(record_id, replies[record_id], published)

    def _add_agents(self, rows: Sequence[Reply]) -> None:
        given: dict[str, list[str | None]] = {agent: [] for agent in self.request.agents}
        for row in rows:
            failed = row["reason"] is not None
            answer = None if failed else self.request.own.kind.answer_of(row)
            given[row["agent_id"]].append(answer)
        pool: list[str | None] = []
        for agent, answers in given.items():
            if not answers and agent in self.request.always_asked:
                answers.append(None)
            self.builder.add(Kind.AGENT, agent, answers)
            pool += answers
        self.builder.add(Kind.RANDOM, "random agent", pool or [None])

    def _add_merges(
        self, record_id: str, rows: Sequence[Reply], published: Mapping[str, Published]
    ) -> None:
        own = self.request.own
        self._add_merge((Kind.RUN, own.method), published.get(record_id))
        for name, table in self.merges.items():
            self._add_merge((Kind.MERGE, name), table.get(record_id))
        for name, (agent, spec) in self.request.alone.items():
            if own_rows := [row for row in rows if row["agent_id"] == agent]:
                self._add_merge((Kind.MERGE, name), _merge(own_rows, spec))
            else:
                self._add_merge((Kind.MERGE, name), None, asked=agent in self.request.always_asked)
        for method, spec in list(self.others.items()):
            try:
                merged = _merge(rows, spec)
            except JobError as error:  # an agent without an accuracy
                self._give_up(method, str(error))
            else:
                self._add_merge((Kind.MERGE, method), merged)

    def _add_merge(self, key: Key, merged: Published | None, *, asked: bool = True) -> None:
        answer, confidence, kind = merged or _NOTHING
        self.builder.add(*key, [answer] if asked else [])
        self.confidences.setdefault(key, []).append(math.nan if confidence is None else confidence)
        if kind:
            self.confidence_kinds[key] = kind

    def _give_up(self, method: str, why: str) -> None:
        del self.others[method]
        self.skipped[method] = why
        self.builder.discard(Kind.MERGE, method)
        self.confidences.pop((Kind.MERGE, method), None)

    def evidence(self) -> Evidence:
        if not self.builder.references:
            raise RunError(
                f"no usable record has a reference in column {self.request.reference!r}: "
                f"{self.num_without_reference:,} have none"
            )
        systems = self.builder.systems()
        if not any(system.kind is Kind.AGENT for system in systems):
            raise RunError("no agent was asked about a record that has a reference")
        return Evidence(
            references=self.builder.references,
            answers=self.builder.answers,
            record_of=np.array(self.builder.record_of, np.int64),
            systems=systems,
            confidences={
                key: Confidences(self.confidence_kinds[key], np.array(values))
                for key, values in self.confidences.items()
                if key in self.confidence_kinds
            },
            skipped=self.skipped,
            num_without_reference=self.num_without_reference,
            num_unusable=self.num_unusable,
        )


def _merge(rows: Sequence[Reply], spec: MergeSpec) -> Published | None:
    """Merge the answers to a record; None if there is none."""
    ballots = ballots_of(rows, spec)
    if not ballots:
        return None
    verdict = verdict_of(ballots, spec)
    return verdict.answer, verdict.confidence, verdict.confidence_kind


def _references(records: pa.Table, column: str) -> list[str | None]:
    """Return the column as text; what is null, blank or not a number counts as not there.

    Raises:
        RunError: there is no such column, or it holds lists, structs or bytes.
    """
    if column not in records.column_names:
        allowed = ", ".join(records.column_names)
        raise RunError(f"no column {column!r} to judge by; allowed: {allowed}")
    values = records[column].to_pylist()
    for record_id, value in zip(records["record_id"].to_pylist(), values, strict=True):
        if not isinstance(value, str | int | float | None):
            raise RunError(
                f"record {record_id!r}: column {column!r} holds {type(value).__name__}; "
                "allowed: text or a number"
            )
    texts = [None if value is None else str(value) for value in values]
    return [text if text and text.strip() and text != "nan" else None for text in texts]
