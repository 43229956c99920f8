"""Score every system and say which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import numpy as np

from mas_batch.evaluation.bootstrap import interval, p_value, resampled_sums
from mas_batch.evaluation.metrics import Metrics, SumMetric
from mas_batch.evaluation.systems import Evidence, Matrix, System, Vector
from mas_batch.quality import Difference, MetricScore, Quality

_ROUNDING = 1e-9


class Worth(StrEnum):
    """How the run's merge compares with the best single agent, by the goal metric."""

    BETTER = "better, beyond noise"
    PERHAPS_BETTER = "better, within noise"
    EQUAL = "equal"
    PERHAPS_WORSE = "worse, within noise"
    WORSE = "worse, beyond noise"


def best_agent(agents: Sequence[System], goal: SumMetric) -> System:
    """Return the agent with the best score; of equals the first.

    Agents that were asked about less than half as many records as others do not compete: a
    few records, perhaps chosen for being hard, say little.
    """
    covered = [int(agent.covered.sum()) for agent in agents]
    rivals = [a for a, n in zip(agents, covered, strict=True) if 2 * n >= max(covered)]
    sign = 1 if goal.perfect else -1
    return max(rivals, key=lambda agent: sign * _point(agent.per_record(goal.statistics), goal))


def qualities(
    evidence: Evidence,
    systems: Sequence[System],
    baseline: System,
    metrics: Metrics,
    num_resamples: int,
    seed: int,
) -> tuple[Quality, ...]:
    """Score the systems; all are resampled alike and compared with the baseline."""
    # On the records that both were asked about; mostly all, and then these are the systems.
    pairs = {
        system: (system.within(baseline.covered), baseline.within(system.covered))
        for system in systems
    }
    scored = _score(dict.fromkeys(chain(systems, *pairs.values())), metrics, num_resamples, seed)
    missing = np.array([answer is None for answer in evidence.answers], np.bool_)
    result = []
    for system, (left, right) in pairs.items():
        scores = []
        for metric in metrics.sums:
            own, *sides = (scored[each, metric.name] for each in (system, left, right))
            alone = system is baseline or not len(left.records)
            difference = None if alone else _difference(*sides)
            scores.append(MetricScore(metric.name, own.point, *interval(own.resampled), difference))
        scores += [MetricScore(metric.name, metric.score(system)) for metric in metrics.whole]
        num_missing = int(missing[system.candidates].sum())
        num_records = int(system.covered.sum())
        result.append(Quality(system.kind, system.name, num_records, num_missing, tuple(scores)))
    return tuple(result)


def worth_of(merge: Quality, goal: SumMetric) -> Worth:
    """Say whether the merge was worth it."""
    difference = merge.score(goal.name).difference
    if difference is None or difference.value == 0 or math.isnan(difference.value):
        return Worth.EQUAL
    better = (difference.value > 0) == (goal.perfect > 0)
    if difference.low <= 0 <= difference.high:
        return Worth.PERHAPS_BETTER if better else Worth.PERHAPS_WORSE
    return Worth.BETTER if better else Worth.WORSE


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    point: float
    """Score of all records."""
    resampled: Vector
    """Scores of the resamples."""


def _score(
    systems: Iterable[System], metrics: Metrics, num_resamples: int, seed: int
) -> dict[tuple[System, str], _Scored]:
    """Score (system, metric) on the records and on the same resamples of them."""
    by_name = {metric.name: metric for metric in metrics.sums}
    tables = {
        (system, name): system.per_record(metric.statistics)
        for system in systems
        for name, metric in by_name.items()
    }
    sums = resampled_sums(tables, num_resamples, seed)
    return {
        key: _Scored(_point(table, by_name[key[1]]), by_name[key[1]].score(sums[key]))
        for key, table in tables.items()
    }


def _point(table: Matrix, metric: SumMetric) -> float:
    return float(metric.score(table.sum(axis=0, keepdims=True))[0])


def _difference(system: _Scored, baseline: _Scored) -> Difference:
    resampled = _without_rounding(system.resampled - baseline.resampled)
    (value,) = _without_rounding(np.array([system.point - baseline.point])).tolist()
    return Difference(value, *interval(resampled), p_value(resampled))


def _without_rounding(differences: Vector) -> Vector:
    """Equal scores may be summed in another order: that is no difference."""
    return np.where(np.abs(differences) < _ROUNDING, 0.0, differences)
