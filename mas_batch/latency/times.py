"""What a task on a worker spends its time on, measured on the worker by one clock without gaps."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from mas_batch.by_name import pickled_by_name
from mas_batch.records import Answer

MODEL = "model"
"""Name of the lap in which an engine is asked; the model's own time is a part of it."""


@pickled_by_name
@dataclass(frozen=True, slots=True)
class TaskTimes:
    """Seconds of one task: read + write + compute + process are all of it."""

    read_s: float = 0.0
    write_s: float = 0.0
    compute_s: float = 0.0
    """The model's own time."""
    prefill_s: float | None = None
    """Part of `compute_s` that reads prompts; None: not known."""
    process_s: float = 0.0
    """Tokenising, batching, parsing, merging; loading a model that was no longer resident."""
    idle_s: float = 0.0
    """How long the host had nothing to do before the task."""

    @property
    def own_s(self) -> float:
        """The task's own seconds."""
        return self.read_s + self.write_s + self.compute_s + self.process_s

    @property
    def decode_s(self) -> float | None:
        """The model's time without the prompts; None: not known."""
        return None if self.prefill_s is None else self.compute_s - self.prefill_s

    def heard_after(self, wall_s: float) -> dict[str, Any]:
        """Return the seconds for a row of `LEDGER`, and the sums T_transfer and T_processing.

        Args:
            wall_s: from sending the task to hearing of its end, by the sender's clock. The part
                of it that the task did not spend itself is `queue_s`.
        """
        queue_s = max(0.0, wall_s - self.own_s)
        return {
            **asdict(self),
            "decode_s": self.decode_s,
            "queue_s": queue_s,
            "wall_s": queue_s + self.own_s,
            "transfer_s": self.read_s + self.write_s,
            "processing_s": queue_s + self.process_s,
        }


class Stopwatch:
    """Adds up the seconds of a task's parts; its laps follow one another without a gap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._compute_s = 0.0
        self._prefill_s: float | None = None

    def lap(self, part: str) -> float:
        """Count the seconds since the last lap for this part of the task; returns them.

        Args:
            part: `read`, `write`, `process`, or `MODEL`.
        """
        now = time.perf_counter()
        lap_s = now - self._last
        self._spent[part] += lap_s
        self._last = now
        return lap_s

    def model(self, answers: list[Answer]) -> float:
        """End a lap in which an engine was asked; returns its seconds without the model's own."""
        lap_s = self.lap(MODEL)
        compute_s = sum(answer.t_compute_s for answer in answers)
        known = [answer.t_prefill_s for answer in answers if answer.t_prefill_s is not None]
        if len(known) == len(answers) and compute_s <= lap_s:
            self._prefill_s = sum(known)
        # A sum above the lap holds compute time of a worker that died, kept in its journal.
        self._compute_s = min(compute_s, lap_s)
        return lap_s - self._compute_s

    def times(self, idle_s: float = 0.0) -> TaskTimes:
        """Return all laps so far."""
        spent = self._spent
        return TaskTimes(
            read_s=spent["read"],
            write_s=spent["write"],
            compute_s=self._compute_s,
            prefill_s=self._prefill_s,
            process_s=spent["process"] + spent[MODEL] - self._compute_s,
            idle_s=idle_s,
        )
