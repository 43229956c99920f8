"""How long things take and how full batches are, in bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mas_batch.aggregate.reductions import Partial, add_up
from mas_batch.latency.sketch import sketch, summary

RECENT = 256
"""Seconds that a `Meter` keeps one by one."""

_LATE = 0.95
_LATE_EVIDENCE = 20
"""Seconds that must be known before any can be called late."""
_LATE_EVERY = 16
"""Seconds after which it is found out anew what is late."""


class Meter:
    """Seconds of one kind: all of them as a sketch, the recent ones as they are."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._unsketched: list[float] = []
        self._sketch: Partial = {}
        self._late_s: float | None = None
        self._until_late = _LATE_EVIDENCE

    def note(self, seconds: float) -> None:
        """Count the seconds."""
        self._recent.append(seconds)
        self._unsketched.append(seconds)
        self._until_late -= 1
        if self._until_late <= 0:
            self._until_late = _LATE_EVERY
            self._late_s = float(np.quantile(self._recent, _LATE))
        if len(self._unsketched) == RECENT:
            self._fold()

    def summary(self) -> dict[str, float]:
        """Return count, mean and quantiles since the beginning; empty if there are none."""
        self._fold()
        return summary(self._sketch) if self._sketch else {}

    @property
    def late_s(self) -> float | None:
        """What 95 % of the recent seconds were below; None while too few are known."""
        return self._late_s

    def _fold(self) -> None:
        if self._unsketched:
            news = sketch(np.array(self._unsketched))
            self._sketch = add_up([self._sketch, news])
            self._unsketched.clear()


@dataclass(frozen=True, slots=True)
class AgentStats:
    """One agent of a pool."""

    num_replicas: int
    """Workers that can be asked or are at work."""
    waiting: int
    """Questions that no replica has taken yet."""
    in_flight: int
    """Questions that its replicas are at."""
    num_answered: int
    """Questions that it gave a valid answer to."""
    num_failed: int
    latency: Mapping[str, float]
    """From asking it to hearing its answer: count, mean_s, p50_s, p95_s, p99_s, max_s."""
    batch_sizes: Mapping[int, int]
    """Questions in a batch → how often."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool since it was opened."""

    pending: int
    """Questions that are not answered yet."""
    num_replied: int
    num_failed: int
    """Questions without an answer: no agent gave one, or none in time."""
    num_busy: int
    """Questions that were refused because too many were pending."""
    num_hedged: int
    """Parts of questions that were asked once more because the first was late."""
    latency: Mapping[str, Mapping[str, float]]
    """`queue`, `compute`, `transfer`, `processing`, `total` → count, mean_s, p50_s, …, max_s."""
    agents: Mapping[str, AgentStats]


@dataclass(slots=True)
class AgentMeter:
    """What `AgentStats` is made of."""

    num_answered: int = 0
    num_failed: int = 0
    latency: Meter = field(default_factory=Meter)
    batch_sizes: Counter[int] = field(default_factory=Counter)

    def stats(self, num_replicas: int, waiting: int, in_flight: int) -> AgentStats:
        """Return it all together with the agent's present state."""
        return AgentStats(
            num_replicas,
            waiting,
            in_flight,
            self.num_answered,
            self.num_failed,
            self.latency.summary(),
            dict(sorted(self.batch_sizes.items())),
        )
