"""How many hosts each post should have: from the backlog that only the dispatcher sees."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

PARTITIONS_PER_HOST = 2
"""Backlog that is worth one more host: it must outlast a start and the load of a model."""


class Scaler(Protocol):
    """Starts and ends workers. The embedded cluster has one; users may bring their own.

    Dask's own `Adaptive` cannot do it: behind a bounded window the scheduler sees no backlog,
    and it does not know which kind of worker is lacking.
    """

    def scale(self, wanted: Mapping[str, int], retire: Collection[str]) -> None:
        """Have so many hosts per post; must return at once.

        Called whenever the number changes, and every second while there are fewer. A host is
        one worker here (`Post.size`).

        Args:
            wanted: post → number of hosts, within the job's bounds. A post is named like its
                agent; of agents that share hosts the names are joined: `plain+sampled`, or
                `plain+2` where that is long. `agents.posts.posts_of(job)` lists them.
            retire: names of workers that are idle and asked nothing further: end these.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many hosts a post may have."""

    least: int
    most: int


def wanted_hosts(
    backlog: Mapping[str, int], current: Mapping[str, int], bounds: Mapping[str, Bounds]
) -> dict[str, int]:
    """Return post → hosts: enough for the backlog, and never fewer while there is work.

    A host is given up only when fewer partitions are left than hosts, so that the number does not
    swing with every answer.
    """
    wanted = {}
    for post, bound in bounds.items():
        left, now = backlog.get(post, 0), current.get(post, 0)
        enough = max(min(now, left), -(-left // PARTITIONS_PER_HOST))
        wanted[post] = min(bound.most, max(bound.least, enough))
    return wanted
