"""One worker as the dispatcher sees it: what it has in flight, how fast it is, whether it fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

_DECAY = 0.8
"""Of the past, at each answer, in the measured rate: a replica's speed may change under way."""
_QUICK_S = 1.0
_MIN_TIMEOUT_S = 600.0
_TIMEOUT_FACTOR = 20.0
_UNMEASURED_TIMEOUT_S = 3600.0


class BreakerState(StrEnum):
    """Closed lets work through; open lets none; probing lets one partition through."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(slots=True)
class Breaker:
    """Keeps a replica that fails on everything from attracting all the work by failing fast.

    Failures in a row on `LIMIT` different partitions open it: one bad partition is not the
    replica's fault. A server that is away opens it at once. Each probe that fails doubles the
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
        """Whether the replica may be asked something further."""
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
        self._open(now)
        return True

    def away(self, now: float, retry_after_s: float) -> None:
        """Open at once: the replica's server is away, and wants to be left alone for so long."""
        if self.state is not BreakerState.OPEN:
            self._open(now)
        self.cool_down_s = max(self.cool_down_s, now - self.opened + retry_after_s)

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self.opened = now
        self.cool_down_s = min(self.MAX_S, 2 * self.cool_down_s or self.FIRST_S)


@dataclass(slots=True)
class Replica:
    """One worker that serves an agent. Works on what it is sent one after the other."""

    replica_id: str
    agent_id: str
    sent: dict[int, int] = field(default_factory=dict)
    """Partition → its estimated tokens (of all samples), oldest first: the first is the one that
    is being worked on. Also what is no longer needed: the worker is busy with it all the same."""
    paused: bool = False
    """It may finish what it has, but is asked nothing further."""
    hung: bool = False
    """It was silent for too long and is being restarted."""
    hung_since: float = 0.0
    num_asked: int = 0
    num_answered: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    away_since: float | None = None
    """When its server was first found away; None: it is not."""
    wait_s: float = 0.0
    """How long the server may be away."""
    away_message: str = ""
    """Which server, and what came instead of an answer."""
    _began: float = 0.0  # work on the first in flight
    _heard: float = 0.0  # last sign of life
    _answers: float = 0.0  # partitions answered, decayed
    _tokens: float = 0.0  # answered, decayed
    _seconds: float = 0.0  # spent on them, decayed

    def send(self, partition: int, tokens: int, now: float) -> None:
        """Note that a partition is on its way."""
        if not self.sent:
            self._began = self._heard = now
        self.sent[partition] = tokens
        self.num_asked += 1
        if self.breaker.state is BreakerState.OPEN:
            self.breaker.state = BreakerState.PROBING

    def answered(self, partition: int, now: float) -> bool:
        """Note an answer, needed or not; returns whether the breaker changed."""
        tokens = self.sent.pop(partition, None)
        if tokens is None:
            return False
        self.num_answered += 1
        self._answers = _DECAY * self._answers + 1
        self._tokens = _DECAY * self._tokens + tokens
        self._seconds = _DECAY * self._seconds + (now - self._began)
        self._began = self._heard = now
        self.away_since = None
        return self.breaker.succeeded()

    def failed(self, partition: int, now: float) -> bool:
        """Note a failure; returns whether the breaker changed."""
        if self.sent.pop(partition, None) is None:
            return False
        self._began = self._heard = now
        self.away_since = None
        return self.breaker.failed(partition, now)

    def away(self, partition: int, now: float, retry_after_s: float, wait_s: float) -> bool:
        """Note that its server is away; returns whether the partition was at it."""
        if self.sent.pop(partition, None) is None:
            return False
        self._began = self._heard = now
        self.away_since = now if self.away_since is None else self.away_since
        self.wait_s = wait_s
        self.breaker.away(now, retry_after_s)
        return True

    def heard(self, now: float) -> None:
        """Note a sign of life from the task that is being worked on."""
        self._heard = now

    def is_free(self, window: int, now: float) -> bool:
        """Whether it may be asked something further."""
        if self.paused or self.hung or len(self.sent) >= window:
            return False
        return self.breaker.lets_through(len(self.sent), now)

    @property
    def tokens_per_s(self) -> float | None:
        """Measured rate; None before the first answer (and where none took any time)."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    @property
    def is_quick(self) -> bool:
        """Whether a partition takes it so little time that the latency of asking counts."""
        return self._answers > 0 and self._seconds / self._answers < _QUICK_S

    def elapsed_s(self, now: float) -> float:
        """Seconds spent on the partition that is being worked on."""
        return now - self._began

    def silent_s(self, now: float) -> float:
        """Seconds since the last sign of life, 0 if it has nothing to do."""
        return now - self._heard if self.sent else 0.0

    def max_silent_s(self, timeout_s: float | None) -> float:
        """Longest silence that is not alarming."""
        if timeout_s is not None:
            return timeout_s
        rate = self.tokens_per_s
        if rate is None:
            return _UNMEASURED_TIMEOUT_S
        first = next(iter(self.sent.values()))
        return max(_MIN_TIMEOUT_S, _TIMEOUT_FACTOR * first / rate)
