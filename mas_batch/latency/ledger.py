"""The ledger of a run: a row for everything that took time, made from the run's events."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pyarrow as pa

from mas_batch.events import (
    AnswerFailed,
    Event,
    HostReady,
    PartitionAnswered,
    PartitionMerged,
    PartitionUndecided,
    PhaseEnded,
)
from mas_batch.records import LEDGER
from mas_batch.run_folder.names import LEDGER_FOLDER
from mas_batch.run_folder.storage import Store

_FLUSH_EVERY, _FLUSH_S = 5000, 60.0
"""Rows of a file at most, and how long rows are kept at most until the next event."""


class Ledger:
    """Turns events into rows of `LEDGER` and writes them to the run, many to a file.

    A killed process loses the rows since the last file, and never an answer.

    Args:
        execution: name of this execution, unique in the run.
        start: when the execution started, by `time.perf_counter`.
    """

    def __init__(self, store: Store, execution: str, start: float) -> None:
        self._store = store
        self._execution = execution
        self._start = start
        self._last_flush = time.perf_counter()
        self._rows: list[dict[str, Any]] = []
        self._num_files = 0

    def __call__(self, event: Event) -> None:
        """Keep a row if the event took time."""
        now = time.perf_counter()
        row = _row_of(event, now - self._start)
        if row is not None:
            self._rows.append({"execution": self._execution, **row})
        if len(self._rows) >= _FLUSH_EVERY or now - self._last_flush >= _FLUSH_S:
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
            own: dict[str, Any] = {"stage": "answer"}
        case PartitionMerged():
            own = {"stage": "merge", "num_records": event.num_results + event.num_failures}
        case PartitionUndecided():
            own = {"stage": "merge"}
        case AnswerFailed():
            own = {"stage": "failed answer", "queue_s": event.wall_s}
        case HostReady():
            own = {"stage": "load", "wall_s": event.load_s, "process_s": event.load_s}
            if len(event.agents) == 1:  # else it is no one agent's
                own["agent_id"] = event.agents[0]
        case PhaseEnded():
            own = {"stage": event.phase}
        case _:
            return None
    columns = (each.name for each in fields(event) if each.name in LEDGER.names)
    row = {**{name: getattr(event, name) for name in columns}, **own}
    return {"at_s": now_s - row["wall_s"], **row}  # a phase knows itself when it began
