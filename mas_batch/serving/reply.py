"""What comes back for a text: a batch run's verdict, and what it took. Knows no Dask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from mas_batch.agents.encoding import encoder_for
from mas_batch.aggregate.merge import result_row
from mas_batch.aggregate.merge_spec import MergeSpec
from mas_batch.aggregate.method import Encode
from mas_batch.aggregate.verdicts import ballots_of, verdict_of
from mas_batch.corpus import problem_of
from mas_batch.errors import RecordError
from mas_batch.records import ANSWERS, Answer, Record


@dataclass(frozen=True, slots=True)
class Support:
    """One distinct answer and who backs it."""

    answer: str
    weight: float
    agents: tuple[str, ...]
    """`agent`, or `agent#sample` for its further samples."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An agent that gave no answer that counts."""

    agent_id: str
    reason: str
    """A code of `errors.Reason`."""
    message: str


@dataclass(frozen=True, slots=True)
class ReplyTimes:
    """Where the seconds of a reply went, along the answer that was waited for last.

    T = T_compute + T_transfer + T_processing, of which `queue_s` is a part: `total_s` is the sum
    of all four.
    """

    queue_s: float
    """Waiting: for a replica, in its worker, and for agents that failed or were late before."""
    compute_s: float
    """The model's time on the batch that the text was in."""
    transfer_s: float
    """To the worker and back."""
    processing_s: float
    """Tokenising, batching, parsing on the worker; merging here."""

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
    """Whose answers were merged, in the order in which they came."""
    failures: tuple[Failure, ...]
    latency: ReplyTimes


def make_record(text: object, context: str | None) -> Record:
    """Return the text as a record; equal texts with equal contexts are the same record.

    Raises:
        RecordError: it is a text that a corpus may not hold either.
    """
    if (problem := problem_of(text)) is not None:
        raise RecordError(problem[0], f"the text {problem[1]}")
    assert isinstance(text, str)
    # Half a surrogate in the context must not end in a traceback: JSON escapes it.
    content = json.dumps([text, context]).encode()
    return Record(hashlib.blake2b(content, digest_size=16).hexdigest(), text, context)


def rows_of(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """Return the answers as rows of `ANSWERS`, in the order in which a batch run merges them."""
    return [asdict(a) for a in sorted(answers, key=lambda a: (a.agent_id, a.sample_id))]


def merged(
    record: Record,
    answers: Sequence[Answer],
    failures: Sequence[Failure],
    agents: Sequence[str],
    spec: MergeSpec,
) -> Reply:
    """Merge at least one valid answer; the latency is still to be put in."""
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
    """Return the vectors that the merge needs, if it needs any: the model is held here."""
    if not spec.needs_encoder:
        return None
    return encoder_for(spec, pa.Table.from_pylist(rows_of(answers), schema=ANSWERS))
