"""The data contracts: what every table holds, column by column.

All tables are Parquet and readable by pandas, DuckDB, Polars and Dask. Times are seconds
(`_s`), counts are `num_` or `_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mas_batch.by_name import pickled_by_name
from mas_batch.errors import Reason


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the corpus, as read. Either `text` is usable or `reason` says why not."""

    record_id: str
    """Unique in the corpus: the given id column, else a stable hash of file and position."""
    text: str | None
    """What the agents are asked about; None when the row has no usable text."""
    context: str | None = None
    """Optional background for `reply` tasks (dialogue history, a customer's order…)."""
    reference: str | None = None
    """Optional human answer, kept for evaluation, never shown to an agent."""
    reason: Reason | None = None
    """Why this record cannot be asked about; None for a good one."""
    message: str = ""
    """The reason in words, naming file and row."""
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, kept unchanged into the results."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """An agent's reply after its task's parser: text always, label or value where it applies."""

    text: str
    label: str | None = None
    value: float | None = None
    probs: tuple[float, ...] | None = None
    """Of the job's labels, in their order; None: the answer says no more than itself."""


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Answer:
    """One agent's reply to one record: a row of the answers table. `reason` set = no answer."""

    record_id: str
    agent_id: str
    family_id: str
    sample_id: int
    text: str | None
    label: str | None = None
    value: float | None = None
    probs: tuple[float, ...] | None = None
    sum_logprob: float | None = None
    finish_reason: str = "stop"
    prompt_tokens: int | None = 0
    cached_tokens: int | None = None
    completion_tokens: int | None = 0
    num_parts: int = 1
    t_compute_s: float = 0.0
    t_prefill_s: float | None = None
    reason: Reason | None = None
    message: str = ""


RECORD_FIELDS: tuple[pa.Field, ...] = (
    pa.field("record_id", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("context", pa.string()),
    pa.field("reference", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
)
"""Leading columns of a staged partition; the passthrough columns follow."""

ANSWERS = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("agent_id", pa.string(), nullable=False),  # the agent's name in the job: the voter
        pa.field(
            "family_id", pa.string(), nullable=False
        ),  # the model; voters of one family err alike
        pa.field("sample_id", pa.int32(), nullable=False),
        pa.field("worker", pa.string()),  # which host of the agent answered
        pa.field("attempt", pa.int32()),
        pa.field("text", pa.string()),  # null when `reason` is set
        pa.field("label", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("probs", pa.list_(pa.float64())),  # of the job's labels, in their order
        pa.field("sum_logprob", pa.float64()),
        pa.field("finish_reason", pa.string()),  # stop, length (cut by max_new_tokens) or error
        pa.field("prompt_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),  # of those, read before for others; null: not known
        pa.field("completion_tokens", pa.int32()),
        pa.field("num_parts", pa.int32()),  # >1: the text was over the context and was split
        pa.field("t_compute_s", pa.float64()),  # the record's share of its batch's model time
        pa.field("t_prefill_s", pa.float64()),  # of that, for reading the prompt; null: not known
        pa.field("t_transfer_s", pa.float64()),  # its share of reading the records
        pa.field("t_processing_s", pa.float64()),  # its share of tokenising, waiting, parsing
        pa.field("prompt_hash", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("reused_from", pa.string()),  # the run that asked; null: this one
    ]
)


def join_answers(tables: Iterable[pa.Table]) -> pa.Table:
    """Put tables of answers together; a column that an earlier version did not write is null."""
    joined = pa.concat_tables([ANSWERS.empty_table(), *tables], promote_options="default")
    return joined.select(ANSWERS.names)


SUPPORT = pa.list_(
    pa.struct(
        [
            pa.field("answer", pa.string()),
            pa.field("weight", pa.float64()),
            pa.field("agents", pa.list_(pa.string())),
        ]
    )
)
"""Every distinct candidate, best first, with its score and `agent` or `agent#sample` backers."""

STANDARD_ERROR = "standard_error"
"""The one `confidence_kind` that is in the values' unit, and smaller for surer answers; all
others are in [0, 1], and larger for surer ones."""

RESULT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("answer", pa.string(), nullable=False),
    pa.field("value", pa.float64()),
    pa.field("method", pa.string(), nullable=False),
    pa.field("confidence", pa.float64()),
    pa.field("confidence_kind", pa.string(), nullable=False),
    pa.field("margin", pa.float64()),
    pa.field("entropy", pa.float64()),  # nats, over the normalised support weights
    pa.field("num_answers", pa.int32(), nullable=False),
    pa.field("num_distinct", pa.int32(), nullable=False),
    pa.field("support", SUPPORT),
    pa.field("tie", pa.bool_(), nullable=False),
    pa.field("abstain", pa.bool_(), nullable=False),
    pa.field("finish_reason", pa.string()),  # of the chosen answer: `length` means it was cut
    pa.field("num_parts", pa.int32()),  # of the chosen answer
    # Share of the answer's words that the text has; of summaries of texts read in parts.
    pa.field("coverage", pa.float64()),
)
"""Trailing columns of the results table; record_id, text, reference and passthrough lead."""

FAILURES = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string()),
        pa.field("agent_id", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("worth_retrying", pa.bool_()),  # by `submit --retry-failed`; see `errors.Reason`
    ]
)

PLAN = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("first_record", pa.int64(), nullable=False),  # position in the corpus, from 0
        pa.field("num_records", pa.int32(), nullable=False),
        pa.field("estimated_tokens", pa.int64(), nullable=False),
    ]
)

LEDGER = pa.schema(
    [
        pa.field("execution", pa.string(), nullable=False),  # which process: its start
        # A task on a worker (`answer`, `failed answer`, `merge`, `load`), or a phase of the
        # submitting process: see `latency.phases`.
        pa.field("stage", pa.string(), nullable=False),
        pa.field("partition", pa.int32()),
        pa.field("agent_id", pa.string()),  # null: of a load, that several agents share it
        pa.field("worker", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("at_s", pa.float64(), nullable=False),  # after the execution's start
        pa.field("wall_s", pa.float64(), nullable=False),  # from sending it to hearing of it
        pa.field("queue_s", pa.float64()),  # of that, waiting at scheduler and worker, and news
        pa.field("read_s", pa.float64()),
        pa.field("write_s", pa.float64()),
        pa.field("compute_s", pa.float64()),  # the model's own time
        pa.field("prefill_s", pa.float64()),  # of that, reading prompts; null: not known
        pa.field("decode_s", pa.float64()),  # and the rest of it
        pa.field("wait_s", pa.float64()),  # with the engine, which worked for other tasks
        pa.field("process_s", pa.float64()),  # tokenising, parsing, merging
        # Since the host's task before it the engine had nothing to do for so long; no part of it.
        pa.field("idle_s", pa.float64()),
        pa.field("num_records", pa.int32()),
        pa.field("num_answers", pa.int32()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),  # of those, read before for others; null: not known
        pa.field("completion_tokens", pa.int64()),
        pa.field("peak_memory_bytes", pa.int64()),  # of the worker's process, so far
    ]
)
"""One row per thing that took time. Of a task, `wall_s` = queue + read + write + compute + wait +
process; phases follow one another and add up to the execution's wall time."""

RESERVED_COLUMNS = frozenset(f.name for f in (*RECORD_FIELDS, *RESULT_FIELDS))
"""A passthrough column of one of these names is kept as `source_<name>`."""
