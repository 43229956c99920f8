"""How many workers each agent should have: from the backlog that only the dispatcher sees."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

PARTITIONS_PER_REPLICA = 2
"""Backlog that is worth one more worker: it must outlast a start and the load of a model."""


class Scaler(Protocol):
    """Starts and ends workers. The embedded cluster has one; users may bring their own.

    Dask's own `Adaptive` cannot do it: behind a bounded window the scheduler sees no backlog,
    and it does not know which kind of worker an agent lacks.
    """

    def scale(self, wanted: Mapping[str, int], retire: Collection[str]) -> None:
        """Have so many workers per agent; must return at once.

        Called whenever the number changes, and every second while there are fewer.

        Args:
            wanted: agent → number of workers, within the job's bounds.
            retire: names of workers that are idle and asked nothing further: end these.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many replicas an agent may have."""

    least: int
    most: int


def wanted_replicas(
    backlog: Mapping[str, int], current: Mapping[str, int], bounds: Mapping[str, Bounds]
) -> dict[str, int]:
    """Return agent → replicas: enough for the backlog, and never fewer while there is work.

    A replica is given up only when fewer partitions are left than replicas, so that the number
    does not swing with every answer.
    """
    wanted = {}
    for agent_id, bound in bounds.items():
        left, now = backlog.get(agent_id, 0), current.get(agent_id, 0)
        enough = max(min(now, left), -(-left // PARTITIONS_PER_REPLICA))
        wanted[agent_id] = min(bound.most, max(bound.least, enough))
    return wanted
