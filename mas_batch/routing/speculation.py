"""When nothing is left to ask: whose slow task is worth a second copy. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from mas_batch.routing.host import Host, Task

_OVERDUE = 1.5
"""A task that has taken so many times what was expected is believed to take as long again."""
_GAIN = 0.9
"""A copy must be expected to finish in less than this share of the time that is left."""


@dataclass(frozen=True, slots=True)
class Late:
    """A task in flight and how long it is expected to take yet."""

    task: Task
    busy: Host
    left_s: float

    @property
    def partition(self) -> int:
        """The partition that is asked about."""
        return self.task[0]

    @property
    def agent_id(self) -> str:
        """The agent that was asked."""
        return self.task[1]


def latest_first(
    in_flight: Iterable[tuple[Task, Host]], rates: Mapping[str, float], now: float
) -> list[Late]:
    """Order tasks in flight by how long they will take yet.

    Args:
        in_flight: task and the host that is at it.
        rates: agent → mean measured rate of a task, for hosts that have no measure of their own.
    """
    late = [Late(task, busy, remaining_s(task, busy, rates, now)) for task, busy in in_flight]
    return sorted(late, key=lambda each: (-each.left_s, each.task, each.busy.host_id))


def is_worth_it(
    free: Host,
    agent_id: str,
    late: Late,
    rates: Mapping[str, float],
    samples: Mapping[str, int],
) -> bool:
    """Whether a copy by the agent at `free` should finish clearly before the original.

    By what a task takes there beside others, so with several at once rather too few are made.
    """
    rate = free.task_tokens_per_s or rates.get(agent_id)
    if rate is None:
        return False
    tokens = late.busy.sent[late.task]
    copy_s = tokens * samples[agent_id] / samples[late.agent_id] / rate
    return copy_s < _GAIN * late.left_s


def remaining_s(task: Task, busy: Host, rates: Mapping[str, float], now: float) -> float:
    """Estimate how long the host will be at the task yet, what is before it included."""
    rate = busy.task_tokens_per_s or rates.get(task[1])
    elapsed_s = busy.elapsed_s(task, now)
    if task in busy.begun:
        return _left_s(busy.sent[task], elapsed_s, rate)
    begun = [_left_s(busy.sent[t], busy.elapsed_s(t, now), rate) for t in busy.begun]
    if rate is None:
        return min(begun)
    ahead = 0
    for other, tokens in islice(busy.sent.items(), busy.concurrent, None):
        ahead += tokens
        if other == task:
            break
    return min(begun) + ahead / rate


def _left_s(tokens: int, elapsed_s: float, rate: float | None) -> float:
    """Return how long a task will take yet that is being worked on."""
    if rate is None:
        return elapsed_s  # as long again: all that is known of it is that it is not done
    expected_s = tokens / rate
    if elapsed_s > _OVERDUE * expected_s:
        return elapsed_s
    return max(0.0, expected_s - elapsed_s)
