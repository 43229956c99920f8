"""Keeps every event of an execution in the run folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from mas_batch.monitor.events import Event
from mas_batch.storage import Store


class EventLog:
    """Writes events as JSON lines, `flush_every` to a file: object stores cannot append.

    A killed process loses the events since its last flush, never an answer.
    """

    def __init__(self, store: Store, flush_every: int = 1000) -> None:
        self._store = store
        self._flush_every = flush_every
        self._lines: list[str] = []
        self._execution = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self._num_files = 0

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"time": now, **event.to_dict()}, ensure_ascii=False))
        if len(self._lines) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write what is kept so far."""
        if self._lines:
            content = "\n".join(self._lines) + "\n"
            self._store.commit(
                f"events/{self._execution}-{self._num_files:04d}.jsonl", content.encode()
            )
            self._num_files += 1
            self._lines.clear()
