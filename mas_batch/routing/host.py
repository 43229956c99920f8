"""One host as the dispatcher sees it: what it has in flight, how fast it is, whether it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

_DECAY = 0.8
"""Of the past, in the measured rates, when as many partitions as are at work at once have been
answered: a host's speed may change under way."""
_QUICK_S = 1.0
_MIN_TIMEOUT_S = 600.0
_TIMEOUT_FACTOR = 20.0
_UNMEASURED_TIMEOUT_S = 3600.0

Task = tuple[int, str]
"""Partition and the agent that is asked about it."""


class BreakerState(StrEnum):
    """Closed lets work through; open lets none; probing lets one partition through."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(slots=True)
class Breaker:
    """Keeps a host at which an agent only fails from attracting all its work by failing fast.

    Failures in a row on `LIMIT` different partitions open it: one bad partition is not the
    host's fault. A server that is away opens it at once. Each probe that fails doubles the
    time until the next.

    Source: the circuit breaker of Nygard, "Release It!", 2007.
    """

    LIMIT = 3
    FIRST_S = 1.0
    MAX_S = 60.0

    state: BreakerState = BreakerState.CLOSED
    failed_on: set[int] = field(default_factory=set)
    num_failures: int = 0
    """In a row."""
    cool_down_s: float = 0.0
    opened: float = 0.0
    """When, on the dispatcher's clock."""

    def lets_through(self, num_in_flight: int, now: float) -> bool:
        """Whether something further may be asked."""
        if self.state is BreakerState.OPEN:
            return num_in_flight == 0 and now >= self.opened + self.cool_down_s
        return self.state is BreakerState.CLOSED

    def succeeded(self) -> bool:
        """Note an answer; returns whether the state changed."""
        changed = self.state is not BreakerState.CLOSED
        self.state = BreakerState.CLOSED
        self.failed_on.clear()
        self.num_failures = 0
        self.cool_down_s = 0.0
        return changed

    def failed(self, partition: int, now: float) -> bool:
        """Note a failure; returns whether the state changed."""
        self.failed_on.add(partition)
        self.num_failures += 1
        is_few = self.state is BreakerState.CLOSED and len(self.failed_on) < self.LIMIT
        if self.state is BreakerState.OPEN or is_few:
            return False
        self.open(now)
        return True

    def away(self, now: float, retry_after_s: float) -> None:
        """Open at once: the host's server is away, and wants to be left alone for so long."""
        if self.state is not BreakerState.OPEN:
            self.open(now)
        self.cool_down_s = max(self.cool_down_s, now - self.opened + retry_after_s)

    def open(self, now: float) -> None:
        """Let nothing through until it has cooled down."""
        self.state = BreakerState.OPEN
        self.opened = now
        self.cool_down_s = min(self.MAX_S, 2 * self.cool_down_s or self.FIRST_S)


@dataclass(slots=True)
class Host:
    """What holds an engine and answers for the engine's agents, several partitions at once.

    What it is sent it begins in that order, `concurrent` at a time, and ends in any order. Whether
    a failure is the engine's or one agent's (a prompt that its engine cannot take) is not known
    when it comes. So each agent has a breaker here, and failures in a row of whichever agents
    open them all: who of them answers is let in again, and who goes on to fail is not.
    """

    host_id: str
    agents: tuple[str, ...]
    concurrent: int = 1
    """How many partitions it works on at once."""
    max_in_flight: int | None = None
    """Partitions that its worker has room for beside a merge; None: as many as the window's."""
    sent: dict[Task, int] = field(default_factory=dict)
    """Task → its estimated tokens (of all samples), oldest first: the first `concurrent` are begun.
    Also what is no longer needed: the host is busy with it all the same."""
    alone: Task | None = None
    """In flight: beside it the host is sent nothing, so that its death has one suspect."""
    set_aside: bool = False
    """It takes nothing but a task that must be alone."""
    paused: bool = False
    """It may finish what it has, but is asked nothing further."""
    hung: bool = False
    """It was silent for too long and is being restarted."""
    hung_since: float = 0.0
    num_asked: Counter[str] = field(default_factory=Counter)
    num_answered: Counter[str] = field(default_factory=Counter)
    breakers: dict[str, Breaker] = field(default_factory=dict)
    """By agent."""
    away_since: float | None = None
    """When its server was first found away; None: it is not."""
    wait_s: float = 0.0
    """How long the server may be away."""
    away_message: str = ""
    """Which server, and what came instead of an answer."""
    _failed_on: set[int] = field(default_factory=set)  # since the last answer, of any agent
    _began: dict[Task, float] = field(default_factory=dict)  # of those that are begun
    _since: float = 0.0  # until when its time at work is counted
    _heard: float = 0.0  # last sign of life
    # Decayed sums over what was answered:
    _answers: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0  # in which anything was at work
    _task_seconds: float = 0.0  # of each task since it was begun

    def __post_init__(self) -> None:
        self.breakers = {agent: Breaker() for agent in self.agents}

    # What happens to it

    def send(self, task: Task, tokens: int, now: float, *, alone: bool = False) -> None:
        """Note that a task is on its way."""
        if not self.sent:
            self._since = self._heard = now
        self.sent[task] = tokens
        self._begin(now)
        self.num_asked[task[1]] += 1
        if alone:
            self.alone = task
        breaker = self.breakers[task[1]]
        if breaker.state is BreakerState.OPEN:
            breaker.state = BreakerState.PROBING

    def answered(self, task: Task, now: float) -> list[str]:
        """Note an answer, needed or not; returns the agents whose breakers changed."""
        tokens = self.sent.get(task)
        if tokens is None:
            return []
        self.num_answered[task[1]] += 1
        decay = _DECAY ** (1 / self.concurrent)
        self._answers = decay * self._answers + 1
        self._tokens = decay * self._tokens + tokens
        self._seconds = decay * self._seconds + (now - self._since)
        self._task_seconds = decay * self._task_seconds + self.elapsed_s(task, now)
        self._since = now
        self._end(task, now)
        self._failed_on.clear()
        was_away, self.away_since = self.away_since is not None, None
        # The engine works: who has not failed by itself since need not be left alone.
        innocent = [a for a, b in self.breakers.items() if was_away or not b.num_failures]
        return [
            a for a in self.agents if a in {task[1], *innocent} and self.breakers[a].succeeded()
        ]

    def failed(self, task: Task, now: float) -> list[str]:
        """Note a failure; returns the agents whose breakers changed."""
        if task not in self.sent:
            return []
        if len(self._began) < 2:
            self._since = now  # else others were at work meanwhile, and their time counts
        self._end(task, now)
        self.away_since = None
        partition, agent = task
        changed = [agent] if self.breakers[agent].failed(partition, now) else []
        self._failed_on.add(partition)
        if len(self._failed_on) >= Breaker.LIMIT:
            for other, breaker in self.breakers.items():
                if breaker.state is BreakerState.CLOSED:
                    breaker.open(now)
                    changed.append(other)
        return changed

    def away(self, task: Task, now: float, retry_after_s: float, wait_s: float) -> bool:
        """Note that its server is away; returns whether the task was at it."""
        if task not in self.sent:
            return False
        self._since = now
        self._end(task, now)
        self.away_since = now if self.away_since is None else self.away_since
        self.wait_s = wait_s
        for breaker in self.breakers.values():
            breaker.away(now, retry_after_s)
        return True

    def heard(self, now: float) -> None:
        """Note a sign of life from a task that it works on."""
        self._heard = now

    def _begin(self, now: float) -> None:
        """Note when it begins what it may begin."""
        if len(self._began) < min(self.concurrent, len(self.sent)):
            for task in self.begun:
                self._began.setdefault(task, now)

    def _end(self, task: Task, now: float) -> None:
        del self.sent[task]
        self._began.pop(task, None)
        self._heard = now
        if task == self.alone:
            self.alone = None
        self._begin(now)

    # What it may be asked

    def is_free(self, window: int, now: float) -> bool:
        """Whether it may be asked something further, by an agent whose breaker lets it."""
        if self.paused or self.hung or self.alone is not None:
            return False
        if self.away_since is not None and self.sent:
            return False  # one probe tells of the server, whichever agent's
        return not self.sent if self.set_aside else len(self.sent) < window

    def lets_through(self, agent: str, now: float) -> bool:
        """Whether the agent's breaker lets something further through."""
        breaker = self.breakers[agent]
        if breaker.state is BreakerState.CLOSED:
            return True
        return breaker.lets_through(sum(task[1] == agent for task in self.sent), now)

    def is_closed(self, agent: str) -> bool:
        """Whether the agent's breaker is closed."""
        return self.breakers[agent].state is BreakerState.CLOSED

    @property
    def begun(self) -> Iterator[Task]:
        """What it works on; what else it was sent only waits."""
        return islice(self.sent, self.concurrent)

    @property
    def has_idle_slot(self) -> bool:
        """Whether it would begin at once what it is sent."""
        return len(self.sent) < self.concurrent

    # How fast it is

    @property
    def tokens_per_s(self) -> float | None:
        """Measured rate of all that it works on; None before an answer (or where none took time).

        The time is that in which anything was at work: of tasks that overlap it counts once.
        """
        return self._tokens / self._seconds if self._seconds > 0 else None

    @property
    def task_tokens_per_s(self) -> float | None:
        """Measured rate of one among those that it works on."""
        return self._tokens / self._task_seconds if self._task_seconds > 0 else None

    @property
    def is_quick(self) -> bool:
        """Whether a partition takes it so little time that the latency of asking counts."""
        return self._answers > 0 and self._task_seconds / self._answers < _QUICK_S

    def elapsed_s(self, task: Task, now: float) -> float:
        """Seconds for which it has worked on the task; 0 where that only waits."""
        return now - self._began.get(task, now)

    def silent_s(self, now: float) -> float:
        """Seconds since the last sign of life, 0 if it has nothing to do."""
        return now - self._heard if self.sent else 0.0

    def max_silent_s(self, timeout_s: float | None) -> float:
        """Longest silence that is not alarming."""
        if timeout_s is not None:
            return timeout_s
        rate = self.task_tokens_per_s
        if rate is None:
            return _UNMEASURED_TIMEOUT_S
        longest = max(self.sent[task] for task in self.begun)
        return max(_MIN_TIMEOUT_S, _TIMEOUT_FACTOR * longest / rate)
