"""What a task takes, learned from tasks that were measured: small linear models."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mas_batch.errors import RunError

try:
    from scipy.optimize import nnls
except ImportError as missing:
    raise RunError(
        "runs are predicted with scipy, which is not installed: pip install 'mas_batch[evaluate]'"
    ) from missing

Floats = NDArray[np.float64]

_EXACT = 1e-12
"""Of the sum of squares: a smaller error is none, and says nothing for a larger model."""
_TIE = 1e-6
"""Models that differ by less, in units of information, are equal: the simpler one is taken."""
_CLEARLY = 6.0
"""A difference of so much is odds of 20 to 1."""
_MIN_SETTLED = 4
"""With fewer later tasks of its workers, a fit uses their first tasks as well."""


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Seconds of a task = per_task_s + per_record_s · records + per_token_s · text tokens."""

    per_task_s: float = 0.0
    """Tasks that a host works on at once share it: an engine's batch takes it once."""
    per_record_s: float = 0.0
    per_token_s: float = 0.0
    first_s: float = 0.0
    """A worker's first task takes so much longer."""

    def seconds(self, num_records: float, text_tokens: float) -> float:
        """Return what a task takes on average, if it is not its worker's first."""
        return self.per_task_s + self.per_record_s * num_records + self.per_token_s * text_tokens

    def scaled(self, factor: float) -> ServiceTime:
        """Return the same for a machine on which everything takes `factor` times as long."""
        return ServiceTime(*(seconds * factor for seconds in astuple(self)))


def fit(tasks: pd.DataFrame, tokens_per_record: float) -> ServiceTime:
    """Learn what a task takes, by weighted least squares without negative coefficients.

    The variance is taken to grow with the task's size, so that where all tasks are alike the fit is
    the ratio of the sums. Akaike's criterion for few rows (Hurvich and Tsai, 1989) decides whether
    a record costs something beside its tokens. It also decides whether a task costs something by
    itself, but that must be clear: a mistake in it would make tasks of another size wrong several
    times.

    Args:
        tasks: measured, a row each and at least one: `num_records`; `text_tokens`, estimated and
            without what is to be generated; `seconds` on a machine that it has to itself;
            `share`, 1 divided by the tasks that its host worked on meanwhile, itself among them;
            `is_first`, whether it was its worker's first: that one warms caches up.
        tokens_per_record: what a record counts beside its text where both have one coefficient.
    """
    settled, first = tasks[~tasks["is_first"]], tasks[tasks["is_first"]]
    if len(settled) < _MIN_SETTLED:
        return _fit_best_model(tasks, tokens_per_record)
    found = _fit_best_model(settled, tokens_per_record)
    if not len(first):
        return found
    usual_s = found.seconds(first["num_records"].mean(), first["text_tokens"].mean())
    return replace(found, first_s=max(0.0, first["seconds"].mean() - usual_s))


def _fit_best_model(tasks: pd.DataFrame, tokens_per_record: float) -> ServiceTime:
    columns = tasks[["share", "num_records", "text_tokens"]].to_numpy(float)
    # What each coefficient of a model stands for: (per task, per record, per token).
    task, record, token = np.eye(3)
    size = np.array([0.0, tokens_per_record, 1.0])
    weights = 1 / np.maximum(1.0, columns @ size)
    seconds = tasks["seconds"].to_numpy(float)
    least, best = float("inf"), np.zeros(3)
    for model in ((size,), (record, token), (task, size), (task, record, token)):
        own_columns = columns @ np.stack(model).T
        found = nonnegative_least_squares(own_columns, seconds, weights)
        squared_error = float(weights @ (seconds - own_columns @ found) ** 2)
        error = max(squared_error, _EXACT * float(weights @ seconds**2), 1e-300)
        lost = _information_lost(error, len(seconds), int((found > 0).sum()))
        lost += _CLEARLY if model[0] is task else 0.0
        if lost < least - _TIE:
            least, best = lost, found @ np.stack(model)
    return ServiceTime(*best.tolist())


def _information_lost(squared_error: float, num_rows: int, num_coefficients: int) -> float:
    """Return AICc: less is better. The spread is estimated too, so it counts as one more."""
    used = num_coefficients + 1
    if num_rows <= used + 1:
        return 1e9 + used  # too few rows for this: the simplest is taken
    penalty = 2 * used * num_rows / (num_rows - used - 1)
    return num_rows * math.log(squared_error / num_rows) + penalty


def nonnegative_least_squares(columns: Floats, values: Floats, weights: Floats) -> Floats:
    """Return x ≥ 0 that minimises Σ w (values - columns · x)²; weights are above 0."""
    root = np.sqrt(weights)
    found: Floats = nnls(columns * root[:, None], values * root, maxiter=1000)[0]
    return found


def speeds(
    starts: Floats, ends: Floats, cores: Floats, hosts: Sequence[Hashable], num_cores: float
) -> Floats:
    """Return how fast each task was at work on average; 1: as on a machine that it had to itself.

    While more cores are wanted than there are, all hosts at work get the same share of them.
    The inverse of what `latency.simulate.Clock` does.

    Args:
        starts, ends: when each task was at work, waiting for its host's other tasks included.
        cores: how many its host keeps busy; 0: none of this machine, so nothing slows it.
        hosts: where each was; a host with several tasks wants its cores once.
    """
    if not len(starts):
        return np.zeros(0)
    spans = pd.DataFrame({"start": starts, "end": ends, "cores": cores, "host": hosts})
    spans = spans.sort_values("start", kind="stable")
    of_host = spans.groupby("host", sort=False)
    idle_before = spans["start"] > of_host["end"].cummax().groupby(spans["host"]).shift()
    spans["stretch"] = idle_before.groupby(spans["host"]).cumsum()
    busy = spans.groupby(["host", "stretch"], sort=False).agg(
        {"start": "min", "end": "max", "cores": "first"}
    )
    times, wanted = _levels(*(busy[name].to_numpy(float) for name in ("start", "end", "cores")))
    speed = np.minimum(1.0, num_cores / np.maximum(wanted, num_cores))
    return np.where(cores > 0, _means(times, speed, starts, ends), 1.0)


def shares(starts: Floats, ends: Floats) -> Floats:
    """Return 1 divided by the tasks at work, as each task of one host has seen it on average."""
    times, at_once = _levels(starts, ends, np.ones(len(starts)))
    return _means(times, 1 / np.maximum(at_once, 1.0), starts, ends)


def _levels(starts: Floats, ends: Floats, amounts: Floats) -> tuple[Floats, Floats]:
    """Return times, and the sum of the amounts that are there from each of them to the next."""
    times = np.unique(np.concatenate([starts, ends]))
    changes = np.zeros(len(times))
    np.add.at(changes, np.searchsorted(times, starts), amounts)
    np.add.at(changes, np.searchsorted(times, ends), -amounts)
    return times, np.cumsum(changes)[:-1]


def _means(times: Floats, values: Floats, starts: Floats, ends: Floats) -> Floats:
    """Return the mean of a step function over each interval; over an empty one it is 1."""
    passed = np.concatenate([[0.0], np.cumsum(values * np.diff(times))])
    lengths = ends - starts
    sums = np.interp(ends, times, passed) - np.interp(starts, times, passed)
    means: Floats = np.divide(sums, lengths, out=np.ones(len(starts)), where=lengths > 0)
    return means
