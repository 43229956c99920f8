"""The phases of an execution, one after the other without a gap: their sum is its wall time."""

from __future__ import annotations

import time

from mas_batch.events import Emit, PhaseEnded

READING = "reading corpus"
STARTING = "starting"
"""Workers are started, or found."""
FIRST_MODEL = "first model"
"""No worker holds its model yet; workers that come later load theirs while others answer."""
ANSWERING = "answering"
LEARNING = "learning"
COUNTING = "counting"
PUBLISHING = "publishing"
ALL = (READING, STARTING, FIRST_MODEL, ANSWERING, LEARNING, COUNTING, PUBLISHING)


class Phases:
    """Times phases by one clock; each is emitted as an event when the next begins."""

    def __init__(self, name: str, start: float) -> None:
        """Begin the first phase.

        Args:
            start: when the phase began, by `time.perf_counter`.
        """
        self.start = start
        self._name = name
        self._began = start
        self._emit: Emit | None = None
        self._ended: list[PhaseEnded] = []

    def emit_to(self, emit: Emit) -> None:
        """Emit the phases that have ended so far, and from now on each phase as it ends."""
        self._emit = emit
        for event in self._ended:
            emit(event)
        self._ended.clear()

    def begin(self, name: str) -> None:
        """End the present phase and begin another; the name of the present one changes nothing."""
        if name != self._name:
            self.end()
            self._name = name

    def end(self) -> None:
        """End the present phase; after the last one there is none to begin."""
        now = time.perf_counter()
        event = PhaseEnded(self._name, self._began - self.start, now - self._began)
        self._began = now
        if self._emit is None:
            self._ended.append(event)
        else:
            self._emit(event)
