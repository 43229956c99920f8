"""What an engine remembers of batches that its server's absence interrupted; in memory only.

What was answered before the interruption is not asked again when the partition comes back to the
same host. A request that was under way at every interruption may be what fells the server: it is
asked alone, and in the end it fails alone. Several threads may have such batches at once.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mas_batch.engines.base import Completion

ALONE_AFTER = 2
"""Interruptions after which a request is asked alone, when all others are answered."""
MAX_INTERRUPTIONS = 4
"""Interruptions, the last of them alone, after which a request is to blame."""
_MAX_KEPT = 10_000
"""Requests; a partition that goes to another host leaves some behind."""


class Interrupted:
    """The answered requests of interrupted batches, and those that were under way.

    Equal requests of several batches each have an answer of their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, list[list[Completion]]] = {}
        self._num_met: dict[str, int] = {}
        self._last_met: dict[str, object] = {}

    def keep(self, key: str, answer: list[Completion]) -> None:
        """Keep the answer to a request of a batch that was interrupted."""
        with self._lock:
            self._forget(key)
            self._answers.setdefault(key, []).append(answer)
            if len(self._answers) > _MAX_KEPT:
                del self._answers[next(iter(self._answers))]

    def take(self, key: str) -> list[Completion] | None:
        """Return a kept answer and forget it; None if there is none."""
        with self._lock:
            kept = self._answers.get(key)
            answer = kept.pop() if kept else None
            if not kept:
                self._answers.pop(key, None)
            return answer

    def met(self, key: str, interruption: object) -> None:
        """Note that the request was under way at an interruption.

        Args:
            interruption: tells it from others: equal requests that it met count once.
        """
        with self._lock:
            if self._last_met.get(key) is interruption:
                return
            self._last_met[key] = interruption
            self._num_met[key] = self._num_met.pop(key, 0) + 1
            if len(self._num_met) > _MAX_KEPT:
                self._forget(next(iter(self._num_met)))

    def answered(self, key: str) -> None:
        """Note that the request is answered."""
        with self._lock:
            self._forget(key)

    def is_suspect(self, key: str) -> bool:
        """Whether the request is to be asked alone."""
        return self._num_met.get(key, 0) >= ALONE_AFTER

    def is_to_blame(self, key: str) -> bool:
        """Whether the request is not to be asked any more."""
        return self._num_met.get(key, 0) >= MAX_INTERRUPTIONS

    def _forget(self, key: str) -> None:
        self._num_met.pop(key, None)
        self._last_met.pop(key, None)


class Turns:
    """Any number of threads ask together, or one asks alone; who wants to be alone comes next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_together = 0
        self._num_alone = 0
        """That wait, or ask."""
        self._is_alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait until nobody asks alone or wants to."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_alone == 0)
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else asks."""
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: self._num_together == 0 and not self._is_alone)
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._num_alone -= 1
                self._is_alone = False
                self._changed.notify_all()


def key_of(*facts: Any) -> str:
    """Return the name of a request: a hash of all that its answer depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
