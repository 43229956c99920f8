"""The ledger of a run: a row for everything that took time, made from the run's events."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pyarrow as pa

from mas_batch.events import (
    AgentReady,
    AnswerFailed,
    Event,
    PartitionAnswered,
    PartitionMerged,
    PartitionUndecided,
    PhaseEnded,
    TaskEnded,
)
from mas_batch.records import LEDGER
from mas_batch.run_folder.names import LEDGER_FOLDER
from mas_batch.run_folder.storage import Store

_TIMES = tuple(field.name for field in fields(TaskEnded) if field.name in LEDGER.names)


class Ledger:
    """Turns events into rows of `LEDGER` and writes them to the run, many to a file.

    A killed process loses the rows since the last file, and never an answer.

    Args:
        execution: name of this execution, unique in the run.
        start: when the execution started, by `time.perf_counter`.
    """

    def __init__(
        self,
        store: Store,
        execution: str,
        start: float,
        *,
        flush_every: int = 5000,
        flush_s: float = 60.0,
    ) -> None:
        self._store = store
        self._execution = execution
        self._start = start
        self._flush_every = flush_every
        self._flush_s = flush_s
        self._last_flush = time.perf_counter()
        self._rows: list[dict[str, Any]] = []
        self._num_files = 0

    def __call__(self, event: Event) -> None:
        """Keep a row if the event took time."""
        now = time.perf_counter()
        row = _row_of(event, now - self._start)
        if row is not None:
            self._rows.append({"execution": self._execution, **row})
        is_late = now - self._last_flush >= self._flush_s
        if len(self._rows) >= self._flush_every or is_late:
            self.flush()

    def flush(self) -> None:
        """Write the rows kept so far to a file."""
        self._last_flush = time.perf_counter()
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=LEDGER)
            name = f"{LEDGER_FOLDER}/{self._execution}-{self._num_files:04d}.parquet"
            self._store.commit_table(name, table)
            self._num_files += 1
            self._rows.clear()


def _row_of(event: Event, now_s: float) -> dict[str, Any] | None:
    match event:
        case PartitionAnswered():
            identity = {
                "agent_id": event.agent_id,
                "attempt": event.attempt,
                "num_answers": event.num_answers,
                "prompt_tokens": event.prompt_tokens,
                "completion_tokens": event.completion_tokens,
                "peak_memory_bytes": event.peak_memory_bytes,
            }
            return {
                **_task_columns("answer", event, now_s),
                **identity,
                "num_records": event.num_records,
            }
        case PartitionMerged():
            num_records = event.num_results + event.num_failures
            return {**_task_columns("merge", event, now_s), "num_records": num_records}
        case PartitionUndecided():
            return {**_task_columns("merge", event, now_s), "num_records": event.num_records}
        case AnswerFailed():
            spent = {"at_s": now_s - event.wall_s, "wall_s": event.wall_s, "queue_s": event.wall_s}
            return {
                "stage": "failed answer",
                "partition": event.partition,
                "agent_id": event.agent_id,
                "worker": event.worker,
                "attempt": event.attempt,
                **spent,
            }
        case AgentReady(agent_id, worker, load_s):
            times = {"at_s": now_s - load_s, "wall_s": load_s, "process_s": load_s}
            return {"stage": "load", "agent_id": agent_id, "worker": worker, **times}
        case PhaseEnded(phase, at_s, wall_s):
            return {"stage": phase, "at_s": at_s, "wall_s": wall_s}
    return None


def _task_columns(
    stage: str, event: PartitionAnswered | PartitionMerged | PartitionUndecided, now_s: float
) -> dict[str, Any]:
    return {
        "stage": stage,
        "partition": event.partition,
        "worker": event.worker,
        "at_s": now_s - event.wall_s,
        **{name: getattr(event, name) for name in _TIMES},
    }
