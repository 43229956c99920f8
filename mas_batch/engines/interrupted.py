"""What an engine remembers of batches that its server's absence interrupted; in memory only.

What was answered before the interruption is not asked again when the partition comes back to the
same replica. A request that was under way at every interruption may be what fells the server: it is
asked alone, and in the end it fails alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mas_batch.engines.base import Completion

ALONE_AFTER = 2
"""Interruptions after which a request is asked alone, when all others are answered."""
MAX_INTERRUPTIONS = 4
"""Interruptions, the last of them alone, after which a request is to blame."""
_MAX_KEPT = 10_000
"""Requests; a partition that goes to another replica leaves some behind."""


class Interrupted:
    """The answered requests of interrupted batches, and those that were under way."""

    def __init__(self) -> None:
        self._answers: dict[str, list[Completion]] = {}
        self._num_met: dict[str, int] = {}

    def keep(self, key: str, answer: list[Completion]) -> None:
        """Keep the answer to a request of a batch that was interrupted."""
        self._num_met.pop(key, None)
        self._answers[key] = answer
        if len(self._answers) > _MAX_KEPT:
            del self._answers[next(iter(self._answers))]

    def take(self, key: str) -> list[Completion] | None:
        """Return the kept answer and forget it; None if there is none."""
        return self._answers.pop(key, None)

    def met(self, key: str) -> None:
        """Note that the request was under way at an interruption."""
        self._num_met[key] = self._num_met.pop(key, 0) + 1
        if len(self._num_met) > _MAX_KEPT:
            del self._num_met[next(iter(self._num_met))]

    def answered(self, key: str) -> None:
        """Note that the request is answered."""
        self._num_met.pop(key, None)

    def is_suspect(self, key: str) -> bool:
        """Whether the request is to be asked alone."""
        return self._num_met.get(key, 0) >= ALONE_AFTER

    def is_to_blame(self, key: str) -> bool:
        """Whether the request is not to be asked any more."""
        return self._num_met.get(key, 0) >= MAX_INTERRUPTIONS


def key_of(*facts: Any) -> str:
    """Return the name of a request: a hash of all that its answer depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
