"""When nothing is left to ask: whose slow task is worth a second copy. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mas_batch.routing.replica import Replica

_OVERDUE = 1.5
"""A task that has taken so many times what was expected is believed to take as long again."""
_GAIN = 0.9
"""A copy must be expected to finish in less than this share of the time that is left."""


@dataclass(frozen=True, slots=True)
class Late:
    """A task in flight and how long it is expected to take yet."""

    partition: int
    busy: Replica
    left_s: float

    @property
    def agent_id(self) -> str:
        """The agent that was asked."""
        return self.busy.agent_id


def latest_first(
    in_flight: Iterable[tuple[int, Replica]], rates: Mapping[str, float], now: float
) -> list[Late]:
    """Order tasks in flight by how long they will take yet.

    Args:
        in_flight: partition and the replica that is at it.
        rates: agent → mean measured rate, for replicas that have no measure of their own.
    """
    late = [Late(index, busy, remaining_s(index, busy, rates, now)) for index, busy in in_flight]
    return sorted(late, key=lambda task: (-task.left_s, task.partition, task.busy.replica_id))


def is_worth_it(
    free: Replica, late: Late, rates: Mapping[str, float], samples: Mapping[str, int]
) -> bool:
    """Whether a copy at `free` should finish clearly before the original."""
    rate = free.tokens_per_s or rates.get(free.agent_id)
    if rate is None:
        return False
    tokens = late.busy.sent[late.partition]
    copy_s = tokens * samples[free.agent_id] / samples[late.agent_id] / rate
    return copy_s < _GAIN * late.left_s


def remaining_s(partition: int, busy: Replica, rates: Mapping[str, float], now: float) -> float:
    """Estimate how long the replica will be at the partition yet, what is before it included."""
    rate = busy.tokens_per_s or rates.get(busy.agent_id)
    elapsed_s = busy.elapsed_s(now)
    if rate is None:
        return elapsed_s  # as long again: all that is known of it is that it is not done
    ahead = 0
    for index, tokens in busy.sent.items():
        ahead += tokens
        if index == partition:
            break
    expected_s = ahead / rate
    if elapsed_s > _OVERDUE * expected_s:
        return elapsed_s
    return max(0.0, expected_s - elapsed_s)
