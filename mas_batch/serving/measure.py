"""Measurements of a pool, in bounded memory: how long answers take and how full batches are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mas_batch.aggregate.reductions import Partial, add_up
from mas_batch.latency.sketch import sketch, summary

RECENT = 256
"""Measurements that a `Meter` keeps one by one."""

_LATE = 0.95
_LATE_EVIDENCE = 20
"""Measurements that a `Meter` needs before it says what is late."""
_LATE_EVERY = 16
"""Measurements after which it computes anew what is late."""


class Meter:
    """Measurements in seconds of one kind: all as a sketch, the recent ones as they are."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._unsketched: list[float] = []
        self._sketch: Partial = {}
        self._late_s: float | None = None
        self._until_late = _LATE_EVIDENCE

    def note(self, seconds: float) -> None:
        """Add a measurement."""
        self._recent.append(seconds)
        self._unsketched.append(seconds)
        self._until_late -= 1
        if self._until_late <= 0:
            self._until_late = _LATE_EVERY
            self._late_s = float(np.quantile(self._recent, _LATE))
        if len(self._unsketched) == RECENT:
            self._fold_into_sketch()

    def summary(self) -> dict[str, float]:
        """Return count, mean and quantiles since the beginning; empty without measurements."""
        self._fold_into_sketch()
        return summary(self._sketch) if self._sketch else {}

    @property
    def late_s(self) -> float | None:
        """The 95 % quantile of the recent measurements; None while there are too few."""
        return self._late_s

    def _fold_into_sketch(self) -> None:
        if self._unsketched:
            news = sketch(np.array(self._unsketched))
            self._sketch = add_up([self._sketch, news])
            self._unsketched.clear()


@dataclass(frozen=True, slots=True)
class AgentStats:
    """One agent of a pool."""

    num_hosts: int
    """Hosts that can be asked or are at work; other agents may share them."""
    waiting: int
    """Questions that no host has taken yet."""
    in_flight: int
    """Questions that its hosts work on."""
    num_answered: int
    """Questions to which it gave a valid answer."""
    num_failed: int
    latency: Mapping[str, float]
    """From asking the agent to hearing its answer: count, mean_s, p50_s, p95_s, p99_s, max_s."""
    batch_sizes: Mapping[int, int]
    """Number of questions in a batch → number of such batches."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool since it was opened."""

    pending: int
    """Questions that are not answered yet."""
    num_replied: int
    num_failed: int
    """Questions without an answer: no agent gave one, or no agent in time."""
    num_busy: int
    """Questions that were refused because too many were pending."""
    num_hedged: int
    """Parts for which another agent or host was asked because the answer was late."""
    latency: Mapping[str, Mapping[str, float]]
    """`queue`, `compute`, `transfer`, `processing`, `total` → count, mean_s, p50_s, …, max_s."""
    agents: Mapping[str, AgentStats]


@dataclass(slots=True)
class AgentMeter:
    """Counts the measurements of `AgentStats`."""

    num_answered: int = 0
    num_failed: int = 0
    latency: Meter = field(default_factory=Meter)
    batch_sizes: Counter[int] = field(default_factory=Counter)

    def stats(self, num_hosts: int, waiting: int, in_flight: int) -> AgentStats:
        """Return the measurements together with the agent's present state."""
        return AgentStats(
            num_hosts,
            waiting,
            in_flight,
            self.num_answered,
            self.num_failed,
            self.latency.summary(),
            dict(sorted(self.batch_sizes.items())),
        )
