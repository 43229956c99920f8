"""What waits for one agent: new parts as batches, and one by one what has failed elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mas_batch.serving.microbatch import MicroBatcher
from mas_batch.serving.parts import AgentPart


class Backlog:
    """Parts in the order in which they are to be taken.

    What is asked again is taken alone: if it killed a worker, it shall not take its neighbours
    along; and by a replica that it has not failed at.
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
        """Let a part wait for another replica; returns whether it did not wait for one already."""
        if part in self._again:
            return False
        self._again.append(part)
        return True

    def discard(self, part: AgentPart) -> None:
        """Forget the part, if it waits."""
        self._new.discard(part)
        if part in self._again:
            self._again.remove(part)

    def take(self, replica_id: str, now: float) -> list[AgentPart]:
        """Return what the replica shall be asked; empty: nothing, or not yet."""
        for part in self._again:
            if replica_id not in part.tried:
                self._again.remove(part)
                return [part]
        return self._new.take(now)

    def take_hopeless(self, replicas: Collection[str]) -> list[AgentPart]:
        """Return what has been at all these replicas, and let it wait no more."""
        hopeless = [part for part in self._again if replicas and part.tried.issuperset(replicas)]
        for part in hopeless:
            self._again.remove(part)
        return hopeless

    @property
    def is_for_some_only(self) -> bool:
        """Whether a replica may find nothing here that another can take."""
        return bool(self._again)

    @property
    def due(self) -> float:
        """See `MicroBatcher.due`."""
        return self._new.due
