"""Histories of bounded size: the last minute, and a whole run however long it gets."""

from __future__ import annotations

from dataclasses import dataclass, field

_BUCKET_S = 5.0
_NUM_BUCKETS = 12
WINDOW_S = _BUCKET_S * _NUM_BUCKETS
"""Rates are over so many seconds."""

MAX_POINTS = 240


@dataclass(slots=True)
class Bucket:
    """What was counted in one stretch of five seconds."""

    index: int
    """Unix time of its beginning, in buckets."""
    num_records: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class Recent:
    """Counts of the last minute, for rates that are not an average over the whole run."""

    since: float | None = None
    """Unix time of the first sign; before it nothing could be counted."""
    buckets: list[Bucket] = field(default_factory=list)

    def begin(self, at: float) -> None:
        """Count from now on."""
        if self.since is None:
            self.since = at

    def add(self, at: float, num_records: int, num_tokens: int) -> None:
        """Count at a Unix time; times that go back a little are taken as the latest."""
        self.begin(at)
        index = int(at // _BUCKET_S)
        if not self.buckets or self.buckets[-1].index < index:
            self.buckets.append(Bucket(index))
            while self.buckets[0].index <= index - _NUM_BUCKETS:
                del self.buckets[0]
        self.buckets[-1].num_records += num_records
        self.buckets[-1].num_tokens += num_tokens

    def rates(self, now: float) -> tuple[float, float]:
        """Return (records, tokens) per second over the last minute, or since counting began."""
        if self.since is None:
            return 0.0, 0.0
        seconds = min(WINDOW_S, max(_BUCKET_S, now - self.since))
        last = [b for b in self.buckets if b.index > int(now // _BUCKET_S) - _NUM_BUCKETS]
        return (
            sum(bucket.num_records for bucket in last) / seconds,
            sum(bucket.num_tokens for bucket in last) / seconds,
        )


@dataclass(slots=True)
class TimelinePoint:
    """One step of a run's history."""

    index: int
    """When, in steps after the history's start."""
    waiting: int
    answering: int
    answered: int
    merged: int
    """Partitions in each state, at the step's end."""
    num_records: int = 0
    """Merged during the step."""
    num_tokens: int = 0
    """Generated during the step."""


@dataclass(slots=True)
class Timeline:
    """A whole run in at most `MAX_POINTS` points: when they are full, two become one."""

    start: float
    """Unix time."""
    step_s: float = 1.0
    points: list[TimelinePoint] = field(default_factory=list)

    def note(
        self, at: float, states: tuple[int, int, int, int], num_records: int, num_tokens: int
    ) -> None:
        """Set the states of a moment and add to the counts of its step.

        Args:
            states: partitions waiting, answering, answered, merged.
        """
        while (index := max(0, int((at - self.start) / self.step_s))) >= MAX_POINTS:
            self._halve()
        if not self.points or self.points[-1].index < index:
            self.points.append(TimelinePoint(index, *states))
        last = self.points[-1]
        last.waiting, last.answering, last.answered, last.merged = states
        last.num_records += num_records
        last.num_tokens += num_tokens

    def _halve(self) -> None:
        merged: list[TimelinePoint] = []
        for point in self.points:
            point.index //= 2
            if merged and merged[-1].index == point.index:
                point.num_records += merged[-1].num_records
                point.num_tokens += merged[-1].num_tokens
                merged[-1] = point
            else:
                merged.append(point)
        self.points = merged
        self.step_s *= 2
