"""The reply to a text: the merged answer as in a run's results, and its times. Knows no Dask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from mas_batch.agents.encoding import encoder_for
from mas_batch.aggregate.merge import result_row
from mas_batch.aggregate.method import Encode, MergeSpec
from mas_batch.aggregate.verdicts import ballots_of, verdict_of
from mas_batch.corpus import problem_of
from mas_batch.errors import RecordError
from mas_batch.records import ANSWERS, Answer, Record


@dataclass(frozen=True, slots=True)
class Support:
    """One distinct answer and the agents that gave it."""

    answer: str
    weight: float
    agents: tuple[str, ...]
    """`agent`, or `agent#sample` for an agent's further samples."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An agent without a valid answer."""

    agent_id: str
    reason: str
    """A code of `errors.Reason`."""
    message: str


@dataclass(frozen=True, slots=True)
class ReplyTimes:
    """Where the seconds of a reply went, along the answer that came last.

    T = T_compute + T_transfer + T_processing. `queue_s`, which a run's ledger counts as a part of
    T_processing, is on its own here; `total_s` is the sum of all four.
    """

    queue_s: float
    """Waiting for a host, in its worker, and for agents that failed or were late before."""
    compute_s: float
    """The model's time on the batch that the text was in."""
    transfer_s: float
    """To the worker and back."""
    processing_s: float
    """Tokenising, batching, parsing on the worker; merging in the asking process."""

    @property
    def total_s(self) -> float:
        """From asking to the reply."""
        return self.queue_s + self.compute_s + self.transfer_s + self.processing_s


@dataclass(frozen=True, slots=True)
class Reply:
    """The merged answer to one text; fields as in a run's `results` table."""

    answer: str
    value: float | None
    method: str
    confidence: float | None
    confidence_kind: str
    margin: float | None
    tie: bool
    abstain: bool
    finish_reason: str | None
    support: tuple[Support, ...]
    """Every distinct answer, best first."""
    agents: tuple[str, ...]
    """Agents whose answers were merged, in the order in which they came."""
    failures: tuple[Failure, ...]
    latency: ReplyTimes


def make_record(text: object, context: str | None) -> Record:
    """Return the text as a record; equal texts with equal contexts are the same record.

    Raises:
        RecordError: the text would be unusable in a corpus too.
    """
    if (problem := problem_of(text)) is not None:
        raise RecordError(problem[0], f"the text {problem[1]}")
    assert isinstance(text, str)
    # JSON escapes a lone surrogate in the context, which could not be encoded otherwise.
    content = json.dumps([text, context]).encode()
    return Record(hashlib.blake2b(content, digest_size=16).hexdigest(), text, context)


def rows_of(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """Return the answers as rows of `ANSWERS`, in the order in which a batch run merges them."""
    return [asdict(a) for a in sorted(answers, key=lambda a: (a.agent_id, a.sample_id))]


def merged_reply(
    record: Record,
    answers: Sequence[Answer],
    failures: Sequence[Failure],
    agents: Sequence[str],
    spec: MergeSpec,
) -> Reply:
    """Merge at least one valid answer; the reply's latency is all zeros, for the caller to fill."""
    rows = rows_of(answers)
    verdict = verdict_of(ballots_of(rows, spec), spec, encoder_of(spec, answers))
    row = result_row(verdict, spec, record.text if spec.covers_text else None)
    names = ("answer", "value", "method", "confidence", "confidence_kind", "margin")
    return Reply(
        **{name: row[name] for name in (*names, "tie", "abstain", "finish_reason")},
        support=tuple(
            Support(each["answer"], each["weight"], tuple(each["agents"]))
            for each in row["support"]
        ),
        agents=tuple(agents),
        failures=tuple(failures),
        latency=ReplyTimes(0.0, 0.0, 0.0, 0.0),
    )


def encoder_of(spec: MergeSpec, answers: Sequence[Answer]) -> Encode | None:
    """Return the encoder that the merge needs, None if it needs none; its model is held here."""
    if not spec.needs_encoder:
        return None
    return encoder_for(spec, pa.Table.from_pylist(rows_of(answers), schema=ANSWERS))
