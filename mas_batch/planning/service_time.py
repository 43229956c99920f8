"""What a task takes, learned from tasks that were measured: small linear models, numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_EXACT = 1e-12
"""Of the sum of squares: an error so small is none, and says nothing for a larger model."""
_TIE = 1e-6
"""Models that differ by less, in units of information, are equal: the simpler one is taken."""
_CLEARLY = 6.0
"""A difference of so much is odds of 20 to 1."""
_MIN_SETTLED = 4
"""Later tasks of workers, without which their first ones have to serve too."""


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Measured tasks of one kind, a row each."""

    num_records: Floats
    text_tokens: Floats
    """Estimated tokens of their texts, without what is to be generated."""
    seconds: Floats
    """Of each, on a machine that it has to itself."""
    is_first: NDArray[np.bool_]
    """Whether it was its worker's first: that one warms caches and allocators up."""

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Tasks:
        """Return some of the rows."""
        return Tasks(
            self.num_records[rows], self.text_tokens[rows], self.seconds[rows], self.is_first[rows]
        )


@dataclass(frozen=True, slots=True, eq=False)
class ServiceTime:
    """Seconds of a task = per_task_s + per_record_s · records + per_token_s · text tokens."""

    per_task_s: float
    per_record_s: float
    per_token_s: float
    first_s: float = 0.0
    """A worker's first task takes so much longer."""
    spread: tuple[float, ...] = (1.0,)
    """Measured ÷ fitted, of mean 1: how far single tasks stray."""

    def seconds(self, num_records: float, text_tokens: float) -> float:
        """Return what a task takes on average, if it is not its worker's first."""
        return self.per_task_s + self.per_record_s * num_records + self.per_token_s * text_tokens

    def of(self, tasks: Tasks) -> Floats:
        """Return the same of each of these tasks."""
        return (
            self.per_task_s
            + self.per_record_s * tasks.num_records
            + self.per_token_s * tasks.text_tokens
        )

    def scaled(self, factor: float) -> ServiceTime:
        """Return the same for a machine on which everything takes `factor` times as long."""
        return replace(
            self,
            per_task_s=self.per_task_s * factor,
            per_record_s=self.per_record_s * factor,
            per_token_s=self.per_token_s * factor,
            first_s=self.first_s * factor,
        )


NOTHING = ServiceTime(0.0, 0.0, 0.0)
"""Of a kind of task that nobody has measured."""


def fit(
    tasks: Tasks, tokens_per_record: float, rng: np.random.Generator | None = None
) -> ServiceTime:
    """Learn what a task takes, by weighted least squares without negative coefficients.

    The variance is taken to grow with the task's size, so that where all tasks are alike the fit is
    the ratio of the sums. Whether a record costs something beside its tokens is decided by Akaike's
    criterion for few rows (Hurvich and Tsai, 1989); so is whether a task costs something by itself,
    but that must be clear: by a mistake in it, tasks of another size would be off several times.

    Args:
        tasks: at least one.
        tokens_per_record: what a record counts beside its text where both have one coefficient.
        rng: fit to seconds that might as well have been measured: the fitted ones, each times a
            ratio of a measured to its fitted one (bootstrap of the residuals).
    """
    settled = tasks.take(~tasks.is_first)
    has_settled = len(settled) >= _MIN_SETTLED
    used = settled if has_settled else tasks
    found = _fit(used, tokens_per_record)
    first = tasks.take(tasks.is_first)
    first_s = float(np.mean(first.seconds - found.of(first))) if has_settled and len(first) else 0.0
    if rng is not None:
        drawn = found.of(used) * rng.choice(np.array(found.spread), len(used))
        found = replace(_fit(replace(used, seconds=drawn), tokens_per_record), spread=found.spread)
    return replace(found, first_s=max(0.0, first_s))


def _fit(tasks: Tasks, tokens_per_record: float) -> ServiceTime:
    ones, records, tokens = np.ones(len(tasks)), tasks.num_records, tasks.text_tokens
    size = np.maximum(1.0, tokens + tokens_per_record * records)
    # Each column with what its coefficient means: (per task, per record, per token).
    own = (ones, (1.0, 0.0, 0.0))
    both = (size, (0.0, tokens_per_record, 1.0))
    each = ((records, (0.0, 1.0, 0.0)), (tokens, (0.0, 0.0, 1.0)))
    lost, best = _better(tasks, 1 / size, (both,), each)
    lost_with_own, with_own = _better(tasks, 1 / size, (own, both), (own, *each))
    if lost_with_own < lost - _CLEARLY:
        best = with_own
    fitted = ServiceTime(float(best[0]), float(best[1]), float(best[2]))
    expected = fitted.of(tasks)
    known = expected > 0
    ratios = tasks.seconds[known] / expected[known]
    if not len(ratios) or ratios.mean() <= 0:
        return fitted
    return replace(fitted, spread=tuple((ratios / ratios.mean()).tolist()))


_Column = tuple[Floats, tuple[float, float, float]]


def _better(tasks: Tasks, weights: Floats, *models: Sequence[_Column]) -> tuple[float, Floats]:
    """Return the information lost and the coefficients of the best of these, simpler ones first."""
    least, best = float("inf"), np.zeros(3)
    for columns in models:
        stacked = np.stack([column for column, _ in columns], axis=1)
        found = nonnegative_least_squares(stacked, tasks.seconds, weights)
        num_used = int(np.count_nonzero(found))
        lost = _information_lost(tasks.seconds, stacked @ found, weights, num_used)
        if lost < least - _TIE:
            least, best = lost, found @ np.array([meaning for _, meaning in columns])
    return least, best


def _information_lost(values: Floats, fitted: Floats, weights: Floats, num_used: int) -> float:
    """Return AICc: less is better. The spread is estimated too, so it counts as one more."""
    count, used = len(values), num_used + 1
    if count <= used + 1:
        return float(1e9 + used)  # too few rows for this: the simplest is taken
    scale = float(weights @ values**2)
    error = max(float(weights @ (values - fitted) ** 2), _EXACT * scale, 1e-300)
    return count * math.log(error / count) + 2 * used * count / (count - used - 1)


def nonnegative_least_squares(columns: Floats, values: Floats, weights: Floats) -> Floats:
    """Return x ≥ 0 that minimises Σ w (values - columns · x)², with the fewest entries above 0.

    Every subset of the columns is tried: right for a handful, and there is no iteration to stop.

    Args:
        columns: (rows, k) with a small k.
        weights: (rows,), above 0.
    """
    root = np.sqrt(weights)
    weighted, target = columns * root[:, None], values * root
    best, least = np.zeros(columns.shape[1]), float(target @ target)
    for size in range(1, columns.shape[1] + 1):
        for subset in combinations(range(columns.shape[1]), size):
            chosen = weighted[:, subset]
            found, _, rank, _ = np.linalg.lstsq(chosen, target, rcond=None)
            if rank < size or (found < 0).any():
                continue
            rest = target - chosen @ found
            if (error := float(rest @ rest)) < least * (1 - 1e-9):
                best, least = np.zeros(columns.shape[1]), error
                best[list(subset)] = found
    return best


def work_done(starts: Floats, ends: Floats, cores: Floats, num_cores: float) -> Floats:
    """Return what each task would have taken on a machine that it had to itself.

    While more cores are wanted than there are, all who are at work get the same share of them.
    The inverse of what `latency.simulate.Clock` does.

    Args:
        starts, ends: when each task was at work.
        cores: how many it keeps busy; 0: none of this machine, so nothing slows it.
    """
    if not len(starts):
        return np.zeros(0)
    times = np.unique(np.concatenate([starts, ends]))
    wanted = np.zeros(len(times))
    np.add.at(wanted, np.searchsorted(times, starts), cores)
    np.add.at(wanted, np.searchsorted(times, ends), -cores)
    level = np.cumsum(wanted)[:-1]
    speed = np.minimum(1.0, num_cores / np.maximum(level, num_cores))
    progress = np.concatenate([[0.0], np.cumsum(speed * np.diff(times))])
    shared = np.interp(ends, times, progress) - np.interp(starts, times, progress)
    return np.where(cores > 0, shared, ends - starts)


def waits(sent: Floats, heard: Floats, own: Floats) -> Floats:
    """Return how long each of one worker's tasks waited without the worker being busy.

    Args:
        sent, heard: when, in the order in which they were heard of.
        own: seconds that each took by itself.
    """
    before = np.concatenate([[-np.inf], heard[:-1]])
    return np.asarray(np.maximum(0.0, heard - np.maximum(sent, before) - own))
