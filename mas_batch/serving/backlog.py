"""The parts that wait for an agent: new ones as batches, failed or late ones again, one by one.

Pure: knows neither clock nor network. Batching is continuous: a free host takes what waits, and
while all hosts are busy the next batch grows by itself. A fixed window would make a lone
question wait for others that may never come; `max_wait_s` is for engines on which a fuller batch
is worth the wait.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from mas_batch.serving.parts import AgentPart

Item = TypeVar("Item", bound=Hashable)


class Backlog:
    """The parts that wait for one agent, in the order in which its hosts take them.

    A part that is asked again is a batch of its own, taken by a host at which it has not failed;
    one at which a host has died is taken by an idle host only, so that it harms no other part.
    """

    def __init__(self, max_batch: int, max_wait_s: float) -> None:
        self._new: MicroBatcher[AgentPart] = MicroBatcher(max_batch, max_wait_s)
        self._again: list[AgentPart] = []

    def __len__(self) -> int:
        return len(self._new) + len(self._again)

    def __iter__(self) -> Iterator[AgentPart]:
        yield from [*self._again, *self._new]

    def add(self, part: AgentPart, now: float) -> None:
        """Let a new part wait."""
        self._new.add(part, now)

    def add_again(self, part: AgentPart) -> bool:
        """Let a part wait for another host; returns False if it waits for one already."""
        if part in self._again:
            return False
        self._again.append(part)
        return True

    def discard(self, part: AgentPart) -> None:
        """Remove the part, if it waits."""
        self._new.discard(part)
        if part in self._again:
            self._again.remove(part)

    def take(
        self,
        host_id: str,
        now: float,
        *,
        num_free: int = 1,
        idle: bool = True,
        only_alone: bool = False,
    ) -> list[AgentPart]:
        """Remove and return the parts that the host is to be asked next; empty: none yet.

        Args:
            num_free: hosts among which new parts are shared, this one included.
            idle: whether the host works on nothing else.
            only_alone: whether it takes nothing but a part at which a host has died.
        """
        for part in self._again:
            if host_id in part.tried or (part.num_deaths and not idle):
                continue
            if part.num_deaths or not only_alone:
                self._again.remove(part)
                return [part]
        return [] if only_alone else self._new.take(now, math.ceil(len(self._new) / num_free))

    def alone(self) -> list[AgentPart]:
        """Return the parts at which a host has died, first come first."""
        return [part for part in self._again if part.num_deaths]

    def take_hopeless(self, hosts: Collection[str]) -> list[AgentPart]:
        """Remove and return the parts that have been at all of these hosts."""
        hopeless = [part for part in self._again if hosts and part.tried.issuperset(hosts)]
        for part in hopeless:
            self._again.remove(part)
        return hopeless

    @property
    def is_for_some_only(self) -> bool:
        """Whether some parts wait that only some hosts may take."""
        return bool(self._again)

    @property
    def due(self) -> float:
        """See `MicroBatcher.due`."""
        return self._new.due


class MicroBatcher(Generic[Item]):
    """Items in the order in which they came; every item is taken once, or discarded.

    Args:
        max_batch: the most items that are taken together.
        max_wait_s: how long the oldest item may wait, with a host free, for a batch to fill;
            0: not at all.
    """

    def __init__(self, max_batch: int, max_wait_s: float = 0.0) -> None:
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._since: dict[Item, float] = {}  # a dict keeps the order and finds items fast

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._since)

    def add(self, item: Item, now: float) -> None:
        """Let the item wait.

        Raises:
            ValueError: the item waits already.
        """
        if item in self._since:
            raise ValueError(f"{item!r} waits already")
        self._since[item] = now

    def discard(self, item: Item) -> bool:
        """Remove the item; returns whether it was still waiting."""
        return self._since.pop(item, None) is not None

    def take(self, now: float, most: int | None = None) -> list[Item]:
        """Remove and return the next batch for a free host; empty: none is due yet.

        Args:
            most: the most items that are taken now; None: `max_batch`.
        """
        if now < self.due:
            return []
        batch = list(islice(self._since, min(self._max_batch, most or self._max_batch)))
        for item in batch:
            del self._since[item]
        return batch

    @property
    def due(self) -> float:
        """The time from which on `take` returns a batch, if no further item comes; inf: never."""
        if not self._since:
            return math.inf
        if len(self._since) >= self._max_batch:
            return -math.inf
        return next(iter(self._since.values())) + self._max_wait_s
