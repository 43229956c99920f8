"""What waits for an agent becomes batches: pure, knows neither clock nor network.

Continuous: whoever is free takes what waits, and while all are busy the next batch grows by
itself. A fixed window would make a lone question wait for company that may never come; `max_wait_s`
is for engines on which a fuller batch is worth that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class MicroBatcher(Generic[Item]):
    """Items in the order in which they came; every one is taken once, or discarded.

    Args:
        max_batch: the most items that are taken together.
        max_wait_s: how long the oldest may wait, with a replica free, for a batch to fill;
            0: not at all.
    """

    def __init__(self, max_batch: int, max_wait_s: float = 0.0) -> None:
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._since: dict[Item, float] = {}  # a dict keeps the order, and finds

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._since)

    def add(self, item: Item, now: float) -> None:
        """Let the item wait.

        Raises:
            ValueError: it waits already.
        """
        if item in self._since:
            raise ValueError(f"{item!r} waits already")
        self._since[item] = now

    def discard(self, item: Item) -> bool:
        """Forget the item; returns whether it was still waiting."""
        return self._since.pop(item, None) is not None

    def take(self, now: float) -> list[Item]:
        """Return the next batch for a replica that is free; empty: nothing, or not yet."""
        if now < self.due:
            return []
        batch = list(islice(self._since, self._max_batch))
        for item in batch:
            del self._since[item]
        return batch

    @property
    def due(self) -> float:
        """From when on `take` returns something, if nothing further comes; inf: never."""
        if not self._since:
            return math.inf
        if len(self._since) >= self._max_batch:
            return -math.inf
        return next(iter(self._since.values())) + self._max_wait_s
